#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "client/cli/render.h"
#include "itwin/v1/jobs.pb.h"

namespace itwin::cli {

// What a watcher has seen of a job, bounded in memory, and the lines that show it. Not thread-safe; no I/O.
class WatchModel {
 public:
  void Add(const v1::JobUpdate& update);

  const v1::Job& job() const { return job_; }
  // Newest value of a series; nothing when it has none.
  const std::vector<double>& History(const std::string& series) const;

  // The picture of the job, each line at most `width` columns.
  std::vector<std::string> Lines(int width, Glyphs glyphs) const;
  // "epoch 12/40, step 400/1200 (31 %), 412 samples/s, ETA 2m10s"; empty before the first progress.
  std::string ProgressText() const;
  // "train/loss 0.0521  test/rmse 0.2373": newest values, losses first, the machine's own left out.
  std::string MetricsText() const;
  double Fraction() const;

 private:
  struct Series {
    std::vector<double> history;
    int64_t per_entry = 1;  // points averaged into one entry of the history
    double pending_sum = 0;
    int64_t pending = 0;
    double last = 0;
    int64_t points = 0;
    bool moves = false;  // not the same value every time
  };
  std::string StateLine() const;
  std::vector<std::string> Ordered() const;
  std::string NodeText() const;
  void AddValue(const std::string& series, double value);

  v1::Job job_;
  std::vector<std::string> states_;
  std::map<std::string, Series> series_;
};

}  // namespace itwin::cli
