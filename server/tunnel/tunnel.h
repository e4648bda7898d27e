#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/files.h"

// A way to a site: a byte stream whose far end is the standard input and output of `itwin-agent connect`.
// How it gets there (a child process, an SSH channel) is all that implementations differ in.
namespace itwin::server {

// One open stream. Thread-safe, but for TakeSocket (once). The destructor closes.
class TunnelStream {
 public:
  virtual ~TunnelStream() = default;

  // A connected, non-blocking stream socket; the caller owns it from now on. Reading it gives end of file
  // after the far end has gone, whatever the reason. Call once.
  virtual FileDescriptor TakeSocket() = 0;

  // The last lines that the far side wrote to its standard error, and how it ended: at most
  // kMaxDiagnosticsBytes, for people.
  virtual std::string Diagnostics() const = 0;

  // False once the far end has gone.
  virtual bool alive() const = 0;

  // Ends the stream and what serves it, also when the socket is still held elsewhere. Returns within a few
  // seconds, with everything released. Idempotent.
  virtual void Close() = 0;
};

inline constexpr size_t kMaxDiagnosticsBytes = 4096;

// Thread-safe.
class Tunnel {
 public:
  virtual ~Tunnel() = default;

  // A new stream, independent of those before. kUnavailable: could not be reached, worth another try later;
  // kNotFound / kPermissionDenied / kUnauthenticated / kFailedPrecondition: a person has to change something first, the
  // message says what. kUnauthenticated is about our credentials, kFailedPrecondition about the host's identity.
  virtual absl::StatusOr<std::unique_ptr<TunnelStream>> Open(absl::Time deadline) = 0;

  // Ends every Open under way with kCancelled and lets none begin; open streams go on. Idempotent.
  virtual void Cancel() = 0;

  // When the credentials that it logs in with end; InfiniteFuture: never, or not known.
  virtual absl::Time CredentialsExpire() const { return absl::InfiniteFuture(); }

  // Where it leads, for people: "ssh alice@login.example" or the command line.
  virtual std::string description() const = 0;
};

}  // namespace itwin::server
