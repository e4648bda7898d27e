#include "client/cli/render.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"

namespace itwin::cli {
namespace {

constexpr size_t kShortestId = 8;

// The next character of valid UTF-8 (else a byte of it) and how many bytes it takes.
char32_t NextCharacter(absl::string_view text, size_t* bytes) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  *bytes = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : first >= 0xc0 ? 2 : 1;
  if (*bytes > text.size()) {
    *bytes = 1;
    return U'?';
  }
  if (*bytes == 1) return first < 0x80 ? first : U'?';
  char32_t code = first & (0x7f >> *bytes);
  for (size_t i = 1; i < *bytes; ++i) code = code << 6 | (byte(i) & 0x3f);
  return code;
}

// Independent of the process's locale, unlike wcwidth.
int Columns(char32_t c) {
  if (c < 0x20 || (c >= 0x7f && c < 0xa0)) return 0;
  const bool combining = (c >= 0x300 && c <= 0x36f) || (c >= 0x200b && c <= 0x200f) || (c >= 0x20d0 && c <= 0x20ff) ||
                         (c >= 0xfe00 && c <= 0xfe0f) || (c >= 0x1ab0 && c <= 0x1aff);
  if (combining) return 0;
  const bool wide = (c >= 0x1100 && c <= 0x115f) || (c >= 0x2e80 && c <= 0x303e) || (c >= 0x3041 && c <= 0x33ff) ||
                    (c >= 0x3400 && c <= 0x4dbf) || (c >= 0x4e00 && c <= 0x9fff) || (c >= 0xa000 && c <= 0xa4cf) ||
                    (c >= 0xac00 && c <= 0xd7a3) || (c >= 0xf900 && c <= 0xfaff) || (c >= 0xfe30 && c <= 0xfe6f) ||
                    (c >= 0xff00 && c <= 0xff60) || (c >= 0xffe0 && c <= 0xffe6) || (c >= 0x1f300 && c <= 0x1faff) ||
                    (c >= 0x20000 && c <= 0x3fffd);
  return wide ? 2 : 1;
}

}  // namespace

int DisplayWidth(absl::string_view text) {
  int width = 0;
  while (!text.empty()) {
    size_t bytes = 0;
    width += Columns(NextCharacter(text, &bytes));
    text.remove_prefix(bytes);
  }
  return width;
}

std::string Truncated(absl::string_view text, int width, Glyphs glyphs) {
  if (DisplayWidth(text) <= width) return std::string(text);
  if (width <= 0) return "";
  const std::string mark = glyphs.unicode ? "…" : "~";
  std::string out;
  int used = 0;
  while (!text.empty()) {
    size_t bytes = 0;
    const int columns = Columns(NextCharacter(text, &bytes));
    if (used + columns > width - 1) break;
    out.append(text.data(), bytes);
    used += columns;
    text.remove_prefix(bytes);
  }
  return out + mark;
}

std::string Printable(absl::string_view text) {
  std::string out;
  while (!text.empty()) {
    size_t bytes = 0;
    const char32_t c = NextCharacter(text, &bytes);
    if (c < 0x20 || (c >= 0x7f && c < 0xa0)) {
      out += '?';
    } else {
      out.append(text.data(), bytes);
    }
    text.remove_prefix(bytes);
  }
  return out;
}

std::string Bar(double fraction, int width, Glyphs glyphs) {
  if (width <= 0) return "";
  if (!(fraction > 0)) fraction = 0;
  fraction = std::min(fraction, 1.0);
  const int halves = static_cast<int>(std::floor(fraction * width * 2 + 1e-9));
  std::string out;
  for (int i = 0; i < width; ++i) {
    const bool full = 2 * (i + 1) <= halves;
    const bool half = !full && 2 * i + 1 <= halves;
    out += glyphs.unicode ? (full ? "━" : half ? "╸" : "─") : (full ? "#" : half ? "=" : "-");
  }
  return out;
}

std::string Sparkline(const std::vector<double>& values, int width, Glyphs glyphs) {
  static const char* const kBlocks[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  static const char* const kAscii[] = {"_", ".", "-", "~", "=", "+", "*", "#"};
  const int count = std::min<int>(width, static_cast<int>(values.size()));
  if (count <= 0) return "";
  std::vector<double> buckets;
  for (int i = 0; i < count; ++i) {
    const size_t begin = values.size() * static_cast<size_t>(i) / static_cast<size_t>(count);
    const size_t end = values.size() * static_cast<size_t>(i + 1) / static_cast<size_t>(count);
    double sum = 0;
    int finite = 0;
    for (size_t j = begin; j < end; ++j) {
      if (!std::isfinite(values[j])) continue;
      sum += values[j];
      ++finite;
    }
    buckets.push_back(finite > 0 ? sum / finite : std::nan(""));
  }
  double low = 0, high = 0;
  bool any = false;
  for (double value : buckets) {
    if (!std::isfinite(value)) continue;
    low = any ? std::min(low, value) : value;
    high = any ? std::max(high, value) : value;
    any = true;
  }
  std::string out;
  for (double value : buckets) {
    if (!std::isfinite(value)) {
      out += " ";
      continue;
    }
    const double place = high > low ? (value - low) / (high - low) : 0;
    const int level = std::clamp(static_cast<int>(place * 7.999), 0, 7);
    out += glyphs.unicode ? kBlocks[level] : kAscii[level];
  }
  return out;
}

std::string NumberText(double value) { return absl::StrFormat("%.4g", value); }

std::string DurationText(absl::Duration value) {
  if (value < absl::ZeroDuration()) value = absl::ZeroDuration();
  if (value == absl::InfiniteDuration()) return "-";
  const int64_t seconds = absl::ToInt64Seconds(value);
  if (seconds < 60) return absl::StrFormat("%ds", seconds);
  if (seconds < 3600) return absl::StrFormat("%dm%02ds", seconds / 60, seconds % 60);
  if (seconds < 86400) return absl::StrFormat("%dh%02dm", seconds / 3600, seconds / 60 % 60);
  return absl::StrFormat("%dd%02dh", seconds / 86400, seconds / 3600 % 24);
}

std::string BytesText(int64_t bytes) {
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  double value = static_cast<double>(bytes);
  const char* unit = "";
  for (const char* next : {"KiB", "MiB", "GiB", "TiB"}) {
    if (value < 1024) break;
    value /= 1024;
    unit = next;
  }
  return absl::StrFormat("%.1f %s", value, unit);
}

std::string TimeText(int64_t micros) {
  if (micros == 0) return "-";
  return absl::FormatTime("%Y-%m-%d %H:%M:%S", absl::FromUnixMicros(micros), absl::LocalTimeZone());
}

std::string StateText(v1::JobState state) {
  if (!v1::JobState_IsValid(state)) return absl::StrCat("STATE ", static_cast<int>(state));
  return std::string(absl::StripPrefix(v1::JobState_Name(state), "JOB_STATE_"));
}

std::string StateText(v1::SiteState state) {
  if (!v1::SiteState_IsValid(state)) return absl::StrCat("STATE ", static_cast<int>(state));
  return std::string(absl::StripPrefix(v1::SiteState_Name(state), "SITE_STATE_"));
}

std::string SiteCheckText(v1::SiteCheck verdict) {
  switch (static_cast<int>(verdict)) {
    case v1::SITE_CHECK_UNSPECIFIED: return "";
    case v1::SITE_CHECK_OK: return "ok";
    case v1::SITE_CHECK_WARNING: return "warning";
    case v1::SITE_CHECK_ERROR: return "ERROR";
    case v1::SITE_CHECK_SKIPPED: return "skipped";
    default: return absl::StrCat("verdict ", static_cast<int>(verdict));
  }
}

std::string FailureText(v1::FailureClass failure) {
  if (failure == v1::FAILURE_CLASS_UNSPECIFIED) return "";
  if (!v1::FailureClass_IsValid(failure)) return absl::StrCat("class ", static_cast<int>(failure));
  return absl::AsciiStrToLower(absl::StripPrefix(v1::FailureClass_Name(failure), "FAILURE_CLASS_"));
}

std::vector<std::string> ShortIds(const std::vector<std::string>& ids) {
  std::vector<std::string> sorted = ids;
  std::sort(sorted.begin(), sorted.end());
  const auto common = [](const std::string& a, const std::string& b) {
    size_t n = 0;
    while (n < a.size() && n < b.size() && a[n] == b[n]) ++n;
    return n;
  };
  std::vector<std::string> out;
  for (const std::string& id : ids) {
    const auto at = std::lower_bound(sorted.begin(), sorted.end(), id);
    size_t length = kShortestId;
    if (at != sorted.begin()) length = std::max(length, common(*std::prev(at), id) + 1);
    if (std::next(at) != sorted.end()) length = std::max(length, common(*std::next(at), id) + 1);
    out.push_back(id.substr(0, length));
  }
  return out;
}

}  // namespace itwin::cli
