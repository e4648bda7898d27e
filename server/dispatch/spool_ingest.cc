#include "server/dispatch/spool_ingest.h"

#include <simdjson.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace itwin::server {
namespace {

using agent::v1::SpoolChunk;

constexpr size_t kMaxNamesKept = 20'000;  // of an attempt; beyond it starts anew
constexpr absl::string_view kNodePrefix = "node/";

// Times outside of 1970..2200 are a program's mistake, not a date.
constexpr double kMaxUnixSeconds = 7.3e9;

absl::string_view View(std::string_view text) { return absl::string_view(text.data(), text.size()); }

bool IsSeriesName(std::string_view name) {
  // simdjson has checked that it is UTF-8.
  return !name.empty() && name.size() <= kMaxSeriesNameBytes &&
         std::none_of(name.begin(), name.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; });
}

// A number, or one of the three words for what JSON has no number for.
bool ReadValue(const simdjson::dom::element& element, double* value) {
  if (element.get_double().get(*value) == simdjson::SUCCESS) return true;
  std::string_view word;
  if (element.get_string().get(word) != simdjson::SUCCESS) return false;
  if (word == "NaN") {
    *value = std::numeric_limits<double>::quiet_NaN();
  } else if (word == "Infinity") {
    *value = std::numeric_limits<double>::infinity();
  } else if (word == "-Infinity") {
    *value = -std::numeric_limits<double>::infinity();
  } else {
    return false;
  }
  return true;
}

// An integer, also when written 120.0.
bool ReadInteger(const simdjson::dom::element& element, int64_t* value) {
  if (element.get_int64().get(*value) == simdjson::SUCCESS) return true;
  double number;
  if (element.get_double().get(number) != simdjson::SUCCESS) return false;
  if (std::abs(number) > 9e15 || number != std::floor(number)) return false;
  *value = static_cast<int64_t>(number);
  return true;
}

bool ReadProgress(const simdjson::dom::element& element, v1::Progress* progress) {
  simdjson::dom::object object;
  if (element.get_object().get(object) != simdjson::SUCCESS) return false;
  progress->set_seconds_left(-1);
  for (const auto& [key, value] : object) {
    int64_t integer = 0;
    double number = 0;
    if (key == "step" || key == "steps" || key == "epoch" || key == "epochs") {
      if (!ReadInteger(value, &integer)) return false;
      const int32_t small = static_cast<int32_t>(std::clamp<int64_t>(integer, 0, std::numeric_limits<int32_t>::max()));
      if (key == "step") progress->set_step(std::max<int64_t>(0, integer));
      if (key == "steps") progress->set_steps(std::max<int64_t>(0, integer));
      if (key == "epoch") progress->set_epoch(small);
      if (key == "epochs") progress->set_epochs(small);
    } else if (key == "samples_per_second" || key == "seconds_left") {
      if (!ReadValue(value, &number)) return false;
      if (!std::isfinite(number)) continue;
      if (key == "samples_per_second") progress->set_samples_per_second(number);
      if (key == "seconds_left") progress->set_seconds_left(number);
    }
  }
  return true;
}

}  // namespace

struct SpoolParser::Json {
  simdjson::dom::parser parser{kMaxLineBytes};
  std::vector<char> buffer;  // the chunk and simdjson's padding
  std::vector<std::pair<std::string_view, double>> values;  // of the line at hand
  std::string node_series;                                  // the name at hand, with its node

  // The name under which a series is stored; good until the next call. `node`: of a node file, else empty.
  absl::string_view StoredName(std::string_view name, const std::string& node) {
    const absl::string_view own = View(name);
    if (node.empty() || !absl::StartsWith(own, kNodePrefix)) return own;
    node_series.assign(kNodePrefix.data(), kNodePrefix.size());
    absl::StrAppend(&node_series, node, "/", own.substr(kNodePrefix.size()));
    return node_series;
  }

  // The line's values and facts, or what is wrong with it.
  const char* ReadLine(const char* line, size_t size, absl::Time now, int64_t* time_us, int64_t* step,
                       std::optional<v1::Progress>* progress) {
    if (size > kMaxLineBytes) return "longer than 1 MiB";
    simdjson::dom::element document;
    const simdjson::error_code error = parser.parse(line, size, /*realloc_if_needed=*/false).get(document);
    if (error == simdjson::UTF8_ERROR) return "not valid UTF-8";
    if (error == simdjson::DEPTH_ERROR) return "nested too deeply";
    if (error != simdjson::SUCCESS) return "not JSON";
    simdjson::dom::object object;
    if (document.get_object().get(object) != simdjson::SUCCESS) return "not a JSON object";
    values.clear();
    *time_us = absl::ToUnixMicros(now);
    *step = 0;
    for (const auto& [key, value] : object) {
      if (key == "metrics") {
        simdjson::dom::object metrics;
        if (value.get_object().get(metrics) != simdjson::SUCCESS) return "'metrics' is not an object";
        for (const auto& [name, element] : metrics) {
          double number;
          if (!IsSeriesName(name)) return "a series name must be 1 to 200 bytes without control characters";
          if (!ReadValue(element, &number)) return "a metric's value is not a number";
          values.emplace_back(name, number);
        }
      } else if (key == "t") {
        double seconds;
        if (value.get_double().get(seconds) != simdjson::SUCCESS || !(seconds >= 0 && seconds < kMaxUnixSeconds)) {
          return "'t' is not a time in seconds since 1970";
        }
        *time_us = std::llround(seconds * 1e6);
      } else if (key == "step") {
        if (!ReadInteger(value, step)) return "'step' is not an integer";
      } else if (key == "progress") {
        v1::Progress read;
        if (!ReadProgress(value, &read)) return "'progress' cannot be read";
        *progress = std::move(read);
      }
    }
    if (progress->has_value()) (*progress)->set_updated_us(*time_us);
    return nullptr;
  }
};

SpoolParser::SpoolParser() : json_(std::make_unique<Json>()) {
  // One allocation for all lines; deep nesting costs nothing and is refused.
  const simdjson::error_code error = json_->parser.allocate(kMaxLineBytes, kMaxJsonDepth);
  (void)error;  // out of memory: parse() says so for each line
}
SpoolParser::~SpoolParser() = default;

ParsedChunk SpoolParser::Parse(const AttemptKey& attempt, const SpoolChunk& chunk, absl::Time now,
                               SeriesNames* names) {
  ParsedChunk out;
  SpoolBatch& batch = out.batch;
  batch.attempt = attempt;
  batch.file = chunk.file();
  batch.host = chunk.host();
  batch.begin_offset = chunk.offset();
  const std::string& data = chunk.data();
  batch.end_offset = chunk.offset() + static_cast<int64_t>(data.size());
  if (chunk.file() == agent::v1::SPOOL_FILE_STDOUT || chunk.file() == agent::v1::SPOOL_FILE_STDERR) {
    batch.log = data;
    return out;
  }
  if (data.empty()) return out;

  size_t whole = data.rfind('\n');
  whole = whole == std::string::npos ? data.size() : whole + 1;
  batch.end_offset = chunk.offset() + static_cast<int64_t>(whole);
  if (json_->buffer.size() < whole + simdjson::SIMDJSON_PADDING) {
    json_->buffer.resize(whole + simdjson::SIMDJSON_PADDING);
  }
  std::memcpy(json_->buffer.data(), data.data(), whole);
  std::memset(json_->buffer.data() + whole, ' ', simdjson::SIMDJSON_PADDING);

  ++batch_;
  if (names->known_.size() > kMaxNamesKept) names->known_.clear();
  std::string first_bad;
  const char* const begin = json_->buffer.data();
  const char* const end = begin + whole;
  for (const char* line = begin; line < end;) {
    const char* newline = static_cast<const char*>(std::memchr(line, '\n', static_cast<size_t>(end - line)));
    const char* const line_end = newline != nullptr ? newline : end;
    const size_t size = static_cast<size_t>(line_end - line);
    const bool blank = std::all_of(line, line_end, [](char c) { return c == ' ' || c == '\t' || c == '\r'; });
    if (!blank) {
      int64_t time_us = 0, step = 0;
      std::optional<v1::Progress> progress;
      const char* wrong = newline == nullptr
                              ? "without an end"
                              : json_->ReadLine(line, size, now, &time_us, &step, &progress);
      if (wrong != nullptr) {
        if (batch.bad_lines++ == 0) {
          const std::string shown = absl::CHexEscape(absl::string_view(line, std::min(size, kMaxExampleBytes)));
          first_bad = absl::StrCat(wrong, ", at byte ", chunk.offset() + (line - begin), ": ",
                                   shown.substr(0, kMaxExampleBytes), shown.size() > kMaxExampleBytes || size > kMaxExampleBytes ? "…" : "");
        }
      } else {
        if (progress) batch.progress = std::move(progress);
        for (const auto& [name, value] : json_->values) {
          const absl::string_view series = json_->StoredName(name, chunk.host());
          auto known = names->known_.find(series);
          if (known == names->known_.end()) {
            known = names->known_.emplace(std::string(series), SeriesNames::Slot{}).first;
          }
          if (known->second.batch != batch_) {
            known->second = {batch_, batch.points.size()};
            batch.points.push_back(PointColumns{known->first, {}, {}, {}});
          }
          PointColumns& columns = batch.points[known->second.column];
          columns.steps.push_back(step);
          columns.times_us.push_back(time_us);
          columns.values.push_back(value);
          ++out.points;
        }
      }
    }
    line = newline != nullptr ? newline + 1 : end;
  }

  const std::string file = SpoolFileName(chunk.file(), chunk.host());
  if (batch.bad_lines > 0) {
    out.complaint = absl::StrCat(batch.bad_lines, batch.bad_lines == 1 ? " line of " : " lines of ", file,
                                 " could not be read and ", batch.bad_lines == 1 ? "was" : "were",
                                 " skipped; the first: ", first_bad);
  }
  return out;
}

std::string RefusedComplaint(const SpoolBatch& batch, int64_t refused_points) {
  return absl::StrCat(refused_points, " points in ", SpoolFileName(batch.file, batch.host),
                      " belong to series beyond the limit of ", kMaxSeriesPerJob, " per job, or have names of more than ",
                      kMaxSeriesNameBytes, " bytes, and were left out; use fewer, longer series");
}

std::string SpoolFileName(agent::v1::SpoolFile file, const std::string& host) {
  switch (static_cast<int>(file)) {
    case agent::v1::SPOOL_FILE_METRICS:
      return "metrics.jsonl";
    case agent::v1::SPOOL_FILE_STDOUT:
      return "stdout.log";
    case agent::v1::SPOOL_FILE_STDERR:
      return "stderr.log";
    case agent::v1::SPOOL_FILE_NODE:
      return absl::StrCat("node-", host, ".jsonl");
    default:
      return "an unknown file";
  }
}

int64_t CursorOf(const agent::v1::SpoolCursor& cursor, agent::v1::SpoolFile file, const std::string& host) {
  switch (static_cast<int>(file)) {
    case agent::v1::SPOOL_FILE_METRICS:
      return cursor.metrics();
    case agent::v1::SPOOL_FILE_STDOUT:
      return cursor.stdout_log();
    case agent::v1::SPOOL_FILE_STDERR:
      return cursor.stderr_log();
    case agent::v1::SPOOL_FILE_NODE: {
      const auto found = cursor.nodes().find(host);
      return found == cursor.nodes().end() ? 0 : found->second;
    }
    default:
      return 0;
  }
}

void SetCursor(agent::v1::SpoolFile file, const std::string& host, int64_t offset, agent::v1::SpoolCursor* cursor) {
  switch (static_cast<int>(file)) {
    case agent::v1::SPOOL_FILE_METRICS:
      cursor->set_metrics(offset);
      break;
    case agent::v1::SPOOL_FILE_STDOUT:
      cursor->set_stdout_log(offset);
      break;
    case agent::v1::SPOOL_FILE_STDERR:
      cursor->set_stderr_log(offset);
      break;
    case agent::v1::SPOOL_FILE_NODE:
      (*cursor->mutable_nodes())[host] = offset;
      break;
    default:
      break;
  }
}

bool ReachedEnd(const agent::v1::SpoolCursor& cursor, const agent::v1::SpoolSizes& sizes) {
  if (cursor.metrics() < sizes.metrics() || cursor.stdout_log() < sizes.stdout_log() ||
      cursor.stderr_log() < sizes.stderr_log()) {
    return false;
  }
  for (const auto& [host, size] : sizes.nodes()) {
    if (CursorOf(cursor, agent::v1::SPOOL_FILE_NODE, host) < size) return false;
  }
  return true;
}

}  // namespace itwin::server
