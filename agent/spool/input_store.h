#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/files.h"
#include "common/sha256.h"

namespace itwin::agent {

struct InputState {
  bool complete = false;
  int64_t received_bytes = 0;
};

// The site's content store, `<root>/inputs/<sha256>`: input files that were sent once and are used by many
// attempts. A file is there whole and verified or not at all; one under way is `<sha256>.part`.
// Thread-safe and safe between processes: all its state is the directory.
class InputStore {
 public:
  explicit InputStore(std::string directory) : directory_(std::move(directory)) {}

  absl::Status Create();

  // kInvalidArgument unless 64 lower-case hex digits. An entry that was altered since it was verified is
  // verified again and, if wrong, removed.
  absl::StatusOr<InputState> Stat(const std::string& sha256);

  // One upload under way. Dropping it keeps what was written, to go on from.
  class Upload {
   public:
    Upload(Upload&&) = default;
    // kResourceExhausted: disk or quota full. kInvalidArgument: more than the size that was announced.
    absl::Status Write(absl::string_view bytes);
    // kDataLoss: content does not have the name it was sent under, and is thrown away. kInvalidArgument: too short.
    absl::Status Finish();

   private:
    friend class InputStore;
    Upload() = default;
    std::string sha256_, directory_, part_path_, final_path_;
    FileDescriptor file_;
    Sha256 hash_;
    int64_t size_ = 0;
    int64_t received_ = 0;
    bool complete_ = false;  // it was there already
  };
  // kFailedPrecondition: `offset` is beyond what is there (says how much that is). kAborted: another upload of the
  // same content is under way. kResourceExhausted: not enough space for the rest.
  absl::StatusOr<Upload> BeginUpload(const std::string& sha256, int64_t size, int64_t offset);

  // Puts the content at `path` for a job to read: a hard link where that protects the store, else a copy. An
  // executable is always a copy. Replaces what is there. kFailedPrecondition: not complete in the store.
  absl::Status Place(const std::string& sha256, const std::string& path, bool executable);

  // Removes what no attempt's directory links to and nobody has asked for, placed or sent since `since`; also uploads that
  // were given up. Returns the bytes. Errors are left for the next time.
  int64_t RemoveUnused(absl::Time since);

 private:
  std::string PathOf(const std::string& sha256) const { return directory_ + "/" + sha256; }
  std::string directory_;
};

}  // namespace itwin::agent
