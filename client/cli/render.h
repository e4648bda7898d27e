#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "itwin/v1/jobs.pb.h"
#include "itwin/v1/sites.pb.h"

// Pieces of text for terminals. Pure.
namespace itwin::cli {

// What the terminal can show.
struct Glyphs {
  bool unicode = true;
};

// Columns that UTF-8 text takes (wide characters two, combining ones none); escape sequences are not expected in it.
int DisplayWidth(absl::string_view text);
// At most `width` columns; an ellipsis marks what was cut.
std::string Truncated(absl::string_view text, int width, Glyphs glyphs);
// Control characters (which could drive the terminal) become '?'.
std::string Printable(absl::string_view text);

// Exactly `width` columns; 0 <= fraction <= 1.
std::string Bar(double fraction, int width, Glyphs glyphs);
// At most `width` columns, the newest value at the right; values that are not finite leave a gap.
std::string Sparkline(const std::vector<double>& values, int width, Glyphs glyphs);

std::string NumberText(double value);           // four significant digits
std::string DurationText(absl::Duration value); // "45s", "2m10s", "1h05m", "3d04h"
std::string BytesText(int64_t bytes);           // "12.3 MiB"
std::string TimeText(int64_t micros);           // local; "-" for 0
std::string StateText(v1::JobState state);      // "RUNNING"
std::string StateText(v1::SiteState state);     // "READY"
std::string SiteCheckText(v1::SiteCheck verdict);   // "ok", "warning", "ERROR", "skipped"; "" while under way
std::string FailureText(v1::FailureClass failure);  // "infra"; empty for none

// The shortest prefixes that tell these ids apart, at least eight digits.
std::vector<std::string> ShortIds(const std::vector<std::string>& ids);

}  // namespace itwin::cli
