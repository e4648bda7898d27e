#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/files.h"
#include "common/sha256.h"

namespace itwin::server {

// Immutable files named by their SHA-256: <data>/blobs/<first two digits>/<hash>. What has not arrived whole lies in
// <data>/partial/<hash> and survives a restart. Thread-safe; several stores must not share a directory.
class BlobStore {
 public:
  struct Options {
    std::string directory;               // made when missing
    int64_t max_blob_bytes = int64_t{1} << 40;
    int64_t min_free_bytes = int64_t{256} << 20;  // kept free on the disk: beyond it kResourceExhausted
  };
  struct Stat {
    bool complete = false;
    int64_t size_bytes = 0;      // when complete
    int64_t received_bytes = 0;  // of a partial upload
  };

  // The end of an upload. Append in order, then Commit. Destroyed before Commit: what was appended stays for a resume.
  // One thread at a time.
  class Writer {
   public:
    ~Writer();
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;
    // Where to go on from: bytes already there.
    int64_t offset() const { return offset_; }
    // Already complete: Append and Commit do nothing.
    bool complete() const { return complete_; }
    // kInvalidArgument beyond the announced size. kResourceExhausted: disk full; what fitted stays.
    absl::Status Append(absl::string_view bytes);
    // Durable afterwards. kDataLoss when the hash does not fit: the partial file is removed. kFailedPrecondition when
    // bytes are missing: it stays.
    absl::Status Commit();

   private:
    friend class BlobStore;
    Writer(BlobStore* store, std::string sha256, int64_t size);
    BlobStore* const store_;
    const std::string sha256_;
    const int64_t size_;
    int64_t offset_ = 0;
    bool complete_ = false;
    int64_t checked_ = 0;  // free space was looked at when so much was there
    FileDescriptor file_;
    Sha256 hash_;
  };

  // Reads one complete blob from any offset. One thread at a time; valid as long as the store.
  class Reader {
   public:
    int64_t size() const { return size_; }
    // Up to `max_bytes` from `offset`; empty at the end.
    absl::StatusOr<std::string> Read(int64_t offset, int64_t max_bytes) const;

   private:
    friend class BlobStore;
    FileDescriptor file_;
    int64_t size_ = 0;
    std::string path_;
  };

  static absl::StatusOr<std::unique_ptr<BlobStore>> Open(const Options& options);

  // Never fails for an unknown hash: nothing of it is there then. kInvalidArgument when it is no hash.
  absl::StatusOr<Stat> StatBlob(absl::string_view sha256) const;
  // Goes on at `offset`, which must not be beyond what is there (kFailedPrecondition naming that); bytes behind it are
  // dropped. While another writer has the same hash: kAborted; try again, it may be complete then.
  absl::StatusOr<std::unique_ptr<Writer>> OpenWriter(absl::string_view sha256, int64_t size, int64_t offset);
  // As OpenWriter, from where the partial upload stands.
  absl::StatusOr<std::unique_ptr<Writer>> ResumeWriter(absl::string_view sha256, int64_t size);
  // kNotFound when unknown or incomplete.
  absl::StatusOr<Reader> OpenReader(absl::string_view sha256) const;
  // Of a complete blob. kNotFound.
  absl::StatusOr<std::string> PathOf(absl::string_view sha256) const;
  // Drops partial uploads that nobody has touched since then. Returns how many.
  int RemoveStalePartials(absl::Time before);
  // Hashes and stores a small text (a document, a generated file). Returns its hash.
  absl::StatusOr<std::string> PutText(absl::string_view bytes);

 private:
  explicit BlobStore(const Options& options);
  std::string BlobPath(absl::string_view sha256) const;
  std::string PartialPath(absl::string_view sha256) const;
  absl::Status Claim(const std::string& sha256);
  void Unclaim(const std::string& sha256);

  absl::Status CheckRoom(int64_t bytes) const;

  const Options options_;
  absl::Mutex mu_;
  absl::flat_hash_set<std::string> writers_ ABSL_GUARDED_BY(mu_);  // hashes being written
};

}  // namespace itwin::server
