#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/store/job_store.h"
#include "server/store/token_store.h"

namespace itwin::server {

class SqliteDatabase;

// Both stores in one SQLite file (WAL, synchronous=FULL). One writer thread groups concurrent writes into one commit;
// reads have connections of their own.
class SqliteJobStore final : public JobStore, public TokenStore {
 public:
  struct Options {
    std::string path;  // of the database file; made when missing, its directory must exist
    int64_t log_mirror_bytes = int64_t{16} << 20;  // kept of stdout and stderr each, per attempt
    int64_t max_live_jobs_per_owner = 20'000;
    int readers = 4;                // read connections
    int max_waiting_writes = 4096;  // beyond it: kResourceExhausted
    int64_t max_database_bytes = 0;  // 0: as the disk allows
    // One gateway at a time. False is for short administrative commands beside a running one, such as adding a token.
    bool exclusive = true;
  };
  struct Statistics {
    int64_t writes = 0;   // asked for
    int64_t commits = 0;  // transactions on disk
  };

  // Opens or makes the database, brings its schema up to date and checks it (cheaply; see Verify).
  // kFailedPrecondition: made by a newer program, or another gateway has it open. kDataLoss: not a database of ours.
  static absl::StatusOr<std::unique_ptr<SqliteJobStore>> Open(const Options& options);
  // Finishes the writes that wait.
  ~SqliteJobStore() override;

  // Random, fixed when the database was made: names the spool subtree at the sites.
  const std::string& gateway_id() const;
  Statistics statistics() const;
  // Every job's record equals Apply() folded over its events and the counters fit the rows; without `all` only for live
  // jobs and the newest hundred. kDataLoss naming the first job that does not fit.
  absl::Status Verify(bool all);
  // A consistent copy, while others read and write. The file must not exist.
  absl::Status Backup(const std::string& path);

  absl::StatusOr<Submitted> Submit(const NewJob& job) override;
  absl::StatusOr<std::optional<JobRow>> FindSubmitted(const NewJob& job) override;
  absl::StatusOr<JobRow> AppendEvent(const JobId& job, const JobEvent& event,
                                     const AttemptUpdate& update = {}) override;
  absl::Status UpdateAttempt(const AttemptKey& attempt, const AttemptUpdate& update) override;
  absl::StatusOr<std::vector<SpoolCommit>> CommitSpool(const std::vector<SpoolBatch>& batches) override;
  absl::StatusOr<int> RemoveFinished(absl::Time before, int limit) override;
  absl::StatusOr<std::string> PinSpool(const std::string& site, const std::string& spool_id) override;
  absl::Status ForgetSpool(const std::string& site) override;

  absl::StatusOr<JobRow> GetJob(const JobId& job) override;
  absl::StatusOr<v1::JobSpec> GetSpec(const JobId& job) override;
  absl::StatusOr<JobId> ResolveJob(absl::string_view prefix, absl::string_view owner = "") override;
  absl::StatusOr<JobPage> ListJobs(const JobFilter& filter) override;
  absl::StatusOr<std::vector<JobRow>> ListLive(absl::string_view site = "", int64_t after_version = 0) override;
  absl::StatusOr<int64_t> CountLive(absl::string_view owner = "") override;
  absl::StatusOr<std::vector<AttemptRow>> ListAttempts(const JobId& job) override;
  absl::StatusOr<AttemptRow> GetAttempt(const AttemptKey& attempt) override;
  absl::StatusOr<std::vector<StoredEvent>> ListEvents(const JobId& job, int64_t after_sequence, int limit) override;
  absl::StatusOr<std::vector<v1::OutputFile>> ListOutputs(const JobId& job) override;
  absl::StatusOr<PointsPage> ListPoints(const JobId& job, int64_t cursor, const std::vector<std::string>& patterns,
                                        int limit) override;
  absl::StatusOr<std::vector<v1::SeriesBuckets>> QuerySeries(const JobId& job,
                                                             const std::vector<std::string>& patterns,
                                                             int buckets) override;
  absl::StatusOr<LogSlice> ReadLog(const JobId& job, int attempt, v1::LogStream stream, int64_t offset,
                                   int limit) override;
  void AddListener(CommitListener* listener) override;
  void RemoveListener(CommitListener* listener) override;

  absl::Status AddToken(const TokenRow& token) override;
  absl::StatusOr<std::optional<TokenRow>> FindToken(absl::string_view sha256) override;
  absl::Status RevokeToken(absl::string_view name) override;
  absl::StatusOr<std::vector<TokenRow>> ListTokens() override;

 private:
  class WriterCaches;
  explicit SqliteJobStore(const Options& options);
  template <typename T, typename Body>
  absl::StatusOr<T> Read(const Body& body);

  const Options options_;
  const std::unique_ptr<WriterCaches> caches_;  // the writer thread's
  std::unique_ptr<SqliteDatabase> database_;
};

}  // namespace itwin::server
