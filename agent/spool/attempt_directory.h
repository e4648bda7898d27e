#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/ids.h"

namespace itwin::agent {

// The paths of one attempt's spool, `<root>/<job>/<number>/`; docs/worker-contract.md says what each file is and
// who writes it. A value; touches no file except where a method says so.
class AttemptDirectory {
 public:
  AttemptDirectory(std::string root, AttemptKey key);
  // From the directory's own path, as the script is given it. kInvalidArgument when it is no attempt's directory.
  static absl::StatusOr<AttemptDirectory> FromPath(const std::string& path);

  const AttemptKey& key() const { return key_; }
  const std::string& root() const { return root_; }
  const std::string& path() const { return path_; }
  std::string job_path() const { return root_ + "/" + key_.job().text(); }

  std::string request_path() const { return path_ + "/request.pb"; }
  std::string spec_path() const { return path_ + "/spec.json"; }
  std::string script_path() const { return path_ + "/script.sh"; }
  std::string script_log_path() const { return path_ + "/script.log"; }
  std::string lease_path() const { return path_ + "/lease"; }
  std::string owner_path() const { return path_ + "/lease/owner.json"; }
  std::string program_path() const { return path_ + "/lease/program.json"; }
  // Changes every few seconds while the script lives.
  std::string beat_path() const { return path_ + "/lease/beat"; }
  // Space kept back so that the last records can be written on a full disk.
  std::string reserve_path() const { return path_ + "/lease/reserve"; }
  std::string lifecycle_path() const { return path_ + "/lifecycle.jsonl"; }
  std::string metrics_path() const { return path_ + "/metrics.jsonl"; }
  std::string node_path(const std::string& host) const { return path_ + "/node-" + host + ".jsonl"; }
  std::string stdout_path() const { return path_ + "/stdout.log"; }
  std::string stderr_path() const { return path_ + "/stderr.log"; }
  std::string dropped_path() const { return path_ + "/dropped.json"; }
  std::string work_path() const { return path_ + "/work"; }
  std::string checkpoints_path() const { return path_ + "/checkpoints"; }
  std::string outputs_path() const { return path_ + "/outputs"; }
  std::string result_path() const { return path_ + "/result.json"; }
  std::string stop_path() const { return path_ + "/stop"; }
  std::string trace_request_path() const { return path_ + "/profile"; }
  std::string cancelled_path() const { return path_ + "/cancelled"; }
  std::string launch_error_path() const { return path_ + "/launch_error"; }
  std::string ended_path() const { return path_ + "/ended.pb"; }

  // These look at the disk.
  bool HasRequest() const;
  bool HasLease() const;
  bool IsCancelled() const;
  // A checkpoint of our worker with its manifest; of other programs any file (not "." or ".tmp" ones).
  bool HasCheckpoint() const;

 private:
  std::string root_;
  AttemptKey key_;
  std::string path_;
};

// "node-<host>.jsonl" -> host; nothing for other names.
std::optional<std::string> HostOfNodeFile(const std::string& name);

// Every attempt directory below the root, in order of key, whatever is in it.
absl::StatusOr<std::vector<AttemptKey>> ListAttemptDirectories(const std::string& root);

bool FileExists(const std::string& path);

}  // namespace itwin::agent
