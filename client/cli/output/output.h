#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/cli/terminal.h"
#include "itwin/v1/jobs.pb.h"
#include "itwin/v1/sites.pb.h"

// Commands return data; how it looks is decided here alone.
namespace itwin::cli {

struct DownloadedFile {
  v1::OutputFile file;
  std::string path;  // on this machine
};

struct CancelResult {
  std::string job;     // as the user wrote it
  absl::Status status;
  v1::Job after;       // when OK
};

// A watch as it happens.
class WatchView {
 public:
  virtual ~WatchView() = default;
  virtual void OnUpdate(const v1::JobUpdate& update) = 0;
  virtual void OnReconnect(const absl::Status& why, absl::Duration delay) = 0;
  // The job as last seen; nothing follows.
  virtual void OnEnd(const v1::Job& job) = 0;
};

class PointSink {
 public:
  virtual ~PointSink() = default;
  virtual void OnBlock(const v1::PointBlock& block) = 0;
  virtual void OnEnd() = 0;
};

// The steps of a survey of a site as they happen.
class SiteView {
 public:
  virtual ~SiteView() = default;
  virtual void OnProgress(const v1::SiteProgress& progress) = 0;
  virtual void OnEnd() = 0;
};

class Output {
 public:
  virtual ~Output() = default;
  virtual void Job(const v1::Job& job) = 0;
  virtual void Jobs(const std::vector<v1::Job>& jobs, bool more) = 0;
  virtual void Submitted(const v1::SubmitJobResponse& response) = 0;
  virtual void Cancelled(const std::vector<CancelResult>& results) = 0;
  virtual void Validated(const v1::ValidateJobResponse& response, bool by_gateway) = 0;
  virtual void Events(const std::vector<v1::JobEvent>& events) = 0;
  virtual void Series(const std::vector<v1::SeriesBuckets>& series) = 0;
  virtual void Downloaded(const std::vector<DownloadedFile>& files, const std::string& directory) = 0;
  virtual void Traced(const DownloadedFile& trace) = 0;
  virtual void Sites(const std::vector<v1::Site>& sites) = 0;
  virtual void Site(const v1::Site& site) = 0;
  virtual void SiteRemoved(const std::string& name) = 0;
  virtual std::unique_ptr<SiteView> SiteChecks() = 0;
  virtual void Version(const v1::GetVersionResponse& gateway) = 0;
  virtual void Error(const absl::Status& status) = 0;
  virtual std::unique_ptr<WatchView> Watch() = 0;
};

// `terminal` outlives them.
std::unique_ptr<Output> MakeTableOutput(const Terminal& terminal);
std::unique_ptr<Output> MakeJsonOutput(const Terminal& terminal);
std::unique_ptr<PointSink> MakeCsvPoints(const Terminal& terminal);
std::unique_ptr<PointSink> MakeJsonPoints(const Terminal& terminal);

}  // namespace itwin::cli
