#include "agent/worker/data/cf_time.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <string_view>
#include <tuple>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr double kDay = 86400;
constexpr double kMostMonths = 1e7;  // from its reference; beyond, a time axis is damaged
constexpr int64_t kMostYears = 1000000;

struct Date {
  int64_t year = 1;
  int month = 1, day = 1;
  double seconds = 0;  // of the day
  int precision = 1;   // 1 year, 2 month, 3 day, 4 minute
};

// In small letters, all white space as blanks.
std::string Lower(const std::string& text) {
  std::string lower;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    lower += std::isspace(byte) ? ' ' : static_cast<char>(std::tolower(byte));
  }
  return lower;
}

bool IsProlepticLeap(int64_t year) { return (year % 4 == 0 && year % 100 != 0) || year % 400 == 0; }

enum class Calendar { kStandard, kProleptic, kJulian, kNoLeap, kAllLeap, k360 };

Calendar ParseCalendar(const std::string& name, const std::string& what) {
  const std::string lower = Lower(name);
  if (lower.empty() || lower == "standard" || lower == "gregorian") return Calendar::kStandard;
  if (lower == "proleptic_gregorian") return Calendar::kProleptic;
  if (lower == "julian") return Calendar::kJulian;
  if (lower == "noleap" || lower == "365_day") return Calendar::kNoLeap;
  if (lower == "all_leap" || lower == "366_day") return Calendar::kAllLeap;
  if (lower == "360_day") return Calendar::k360;
  throw UserError(what + ": the calendar \"" + name +
                  "\" is unknown; known: standard, proleptic_gregorian, julian, noleap, all_leap, "
                  "360_day");
}

// Days of the Gregorian or Julian calendar since 1 March of year 0, continued backwards.
int64_t CivilDays(int64_t year, int month, int day, bool gregorian) {
  if (month <= 2) --year;
  const int64_t of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); };
  int64_t days = year * 365 + floor_div(year, 4) + of_year;
  if (gregorian) days += floor_div(year, 400) - floor_div(year, 100);
  return days;
}

int64_t DayNumber(const Date& date, Calendar calendar) {
  constexpr std::array<int, 12> kBefore = {0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334};
  switch (calendar) {
    case Calendar::kStandard: {
      // The Julian calendar until 4 October 1582, whose next day was the 15th: two days apart from
      // the Gregorian count at year 0.
      const bool gregorian =
          std::tuple(date.year, date.month, date.day) >= std::tuple(int64_t{1582}, 10, 15);
      return CivilDays(date.year, date.month, date.day, gregorian) - (gregorian ? 0 : 2);
    }
    case Calendar::kProleptic:
      return CivilDays(date.year, date.month, date.day, true);
    case Calendar::kJulian:
      return CivilDays(date.year, date.month, date.day, false);
    case Calendar::kNoLeap:
      return date.year * 365 + kBefore[static_cast<size_t>(date.month - 1)] + date.day - 1;
    case Calendar::kAllLeap:
      return date.year * 366 + kBefore[static_cast<size_t>(date.month - 1)] +
             (date.month > 2 ? 1 : 0) + date.day - 1;
    case Calendar::k360:
      return date.year * 360 + (date.month - 1) * 30 + date.day - 1;
  }
  return 0;
}

int DaysInMonth(const Date& date, Calendar calendar) {
  if (calendar == Calendar::k360) return 30;
  constexpr std::array<int, 12> kDays = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
  const bool leap = calendar == Calendar::kAllLeap ||
                    (calendar == Calendar::kJulian && date.year % 4 == 0) ||
                    (calendar == Calendar::kStandard && date.year < 1582 && date.year % 4 == 0) ||
                    ((calendar == Calendar::kProleptic || calendar == Calendar::kStandard) &&
                     IsProlepticLeap(date.year));
  return kDays[static_cast<size_t>(date.month - 1)] + (date.month == 2 && leap ? 1 : 0);
}

double SecondsOf(const Date& date, Calendar calendar) {
  return static_cast<double>(DayNumber(date, calendar)) * kDay + date.seconds;
}

// What may follow a clock: "", "z", "utc", "gmt", or by how much the clock is ahead: "+1", "-6:00",
// "+0530". Only with a colon may the sign be left out. False for another text.
bool ParseZone(std::string_view text, double* ahead_seconds) {
  *ahead_seconds = 0;
  if (text.empty() || text == "z" || text == "utc" || text == "gmt") return true;
  const bool is_signed = text.front() == '+' || text.front() == '-';
  const double sign = text.front() == '-' ? -1 : 1;
  if (is_signed) text.remove_prefix(1);
  const auto digits = [&](size_t most, int* value) {
    const size_t count = std::min(text.find_first_not_of("0123456789"), text.size());
    if (count == 0 || count > most) return false;
    std::from_chars(text.data(), text.data() + count, *value);
    text.remove_prefix(count);
    return true;
  };
  int hours = 0, minutes = 0;
  if (!digits(4, &hours)) return false;
  if (text.starts_with(':')) {
    text.remove_prefix(1);
    if (!digits(2, &minutes)) return false;
  } else if (!is_signed) {
    return false;
  } else if (hours >= 100) {
    minutes = hours % 100;
    hours /= 100;
  }
  *ahead_seconds = sign * (hours * 3600 + minutes * 60);
  return text.empty() && hours < 24 && minutes < 60;
}

// "1982", "1982-1", "1982-01-31", "1982-01-31 12:00:00.0 +1:00", with T or a space. False for
// another text.
bool ParseDate(const std::string& original, Date* date) {
  const std::string text = Lower(original);
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto number = [&](auto* value) {
    const auto [stop, error] = std::from_chars(at, end, *value);
    if (error != std::errc()) return false;
    at = stop;
    return true;
  };
  const auto skip = [&](char c) { return at < end && *at == c && (++at, true); };
  *date = Date{};
  if (!number(&date->year)) return false;
  if (skip('-')) {
    date->precision = 2;
    if (!number(&date->month)) return false;
    if (skip('-')) {
      date->precision = 3;
      if (!number(&date->day)) return false;
    }
  }
  if (date->month < 1 || date->month > 12 || date->day < 1 || date->day > 31) return false;
  if (date->precision == 3 && at < end && (skip('t') || skip(' ')) && at < end) {
    int hours = 0, minutes = 0;
    double seconds = 0;
    date->precision = 4;
    if (!number(&hours)) return false;
    if (skip(':') && !number(&minutes)) return false;
    if (skip(':') && !number(&seconds)) return false;
    if (hours < 0 || hours > 24 || minutes < 0 || minutes > 59 || !(seconds >= 0 && seconds < 61)) {
      return false;
    }
    while (skip(' ')) {
    }
    double ahead_seconds = 0;
    if (!ParseZone(std::string_view(at, static_cast<size_t>(end - at)), &ahead_seconds))
      return false;
    date->seconds = hours * 3600 + minutes * 60 + seconds - ahead_seconds;
    at = end;
  }
  return at == end;
}

// Either a fixed length or calendar months.
struct Unit {
  double seconds = 0;
  int months = 0;
};

// Neither for another text.
Unit ParseUnit(const std::string& name) {
  if (name == "months" || name == "month") return {.months = 1};
  if (name == "years" || name == "year" || name == "yr") return {.months = 12};
  if (name == "weeks" || name == "week") return {.seconds = 7 * kDay};
  if (name == "days" || name == "day" || name == "d") return {.seconds = kDay};
  if (name == "hours" || name == "hour" || name == "hr" || name == "hrs" || name == "h")
    return {.seconds = 3600};
  if (name == "minutes" || name == "minute" || name == "min" || name == "mins")
    return {.seconds = 60};
  if (name == "seconds" || name == "second" || name == "sec" || name == "secs" || name == "s")
    return {.seconds = 1};
  if (name == "milliseconds" || name == "millisecond" || name == "msec" || name == "ms")
    return {.seconds = 1e-3};
  return {};
}

// Months or years that are always as long, in days; 0 where they differ.
double EvenDays(int months, Calendar calendar) {
  if (calendar == Calendar::k360) return 30 * months;
  if (months == 12 && calendar == Calendar::kNoLeap) return 365;
  if (months == 12 && calendar == Calendar::kAllLeap) return 366;
  return 0;
}

// The same day and clock, a whole number of months or years later. `what` begins the error.
Date Later(const Date& date, double value, int months, Calendar calendar, const std::string& what) {
  if (!(std::abs(value) <= kMostMonths) || value != std::floor(value)) {
    throw UserError(
        what +
        " is not whole, and months and years of this calendar differ in length; write the "
        "time axis in days");
  }
  const int64_t count = date.year * 12 + date.month - 1 + static_cast<int64_t>(value) * months;
  Date later = date;
  later.month = static_cast<int>((count % 12 + 12) % 12) + 1;
  later.year = (count - (later.month - 1)) / 12;
  if (date.day > DaysInMonth(later, calendar)) {
    char month[40];
    std::snprintf(month, sizeof(month), "%04lld-%02d", static_cast<long long>(later.year),
                  later.month);
    throw UserError(what + " is no date: " + month + " has no day " + std::to_string(date.day) +
                    "; write the time axis in days");
  }
  return later;
}

std::string Trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

}  // namespace

bool AreTimeUnits(const std::string& units) {
  return Lower(units).find(" since ") != std::string::npos;
}

double CfSeconds(double value, const std::string& units, const std::string& calendar,
                 const std::string& what) {
  const Calendar parsed = ParseCalendar(calendar, what);
  const std::string lower = Lower(units);
  const size_t since = lower.find(" since ");
  Date reference;
  const Unit unit =
      since == std::string::npos ? Unit{} : ParseUnit(Trimmed(lower.substr(0, since)));
  if ((unit.seconds == 0 && unit.months == 0) ||
      !ParseDate(Trimmed(lower.substr(since + 7)), &reference) ||
      std::abs(reference.year) > kMostYears) {
    throw UserError(what + ": the units \"" + units +
                    "\" are not those of a time axis, such as \"days since 1950-01-01\"");
  }
  if (unit.months == 0) return SecondsOf(reference, parsed) + value * unit.seconds;
  // UDUNITS' month, a twelfth of 365.2422 days, is in no calendar, and CF advises against it.
  const double days = EvenDays(unit.months, parsed);
  if (days > 0) return SecondsOf(reference, parsed) + value * days * kDay;
  char number[40];
  std::snprintf(number, sizeof(number), "%.9g", value);
  return SecondsOf(
      Later(reference, value, unit.months, parsed, what + ": " + number + " \"" + units + "\""),
      parsed);
}

std::vector<int64_t> FindJumps(const TimeAxis& axis) {
  constexpr double kLongest = 1.5;  // of the median; a month is at most 31/28 of another
  std::vector<double> forward;
  for (size_t i = 1; i < axis.seconds.size(); ++i) {
    const double step = axis.seconds[i] - axis.seconds[i - 1];
    if (step > 0) forward.push_back(step);
  }
  std::vector<int64_t> jumps;
  if (forward.empty()) return jumps;
  const auto middle = forward.begin() + static_cast<std::ptrdiff_t>(forward.size() / 2);
  std::nth_element(forward.begin(), middle, forward.end());
  for (size_t i = 1; i < axis.seconds.size(); ++i) {
    const double step = axis.seconds[i] - axis.seconds[i - 1];
    if (!(step > 0 && step <= kLongest * *middle)) jumps.push_back(static_cast<int64_t>(i));
  }
  return jumps;
}

std::pair<int64_t, int64_t> StepsWithin(const TimeAxis& axis, const std::string& text,
                                        const std::string& field) {
  const Calendar calendar = ParseCalendar(axis.calendar, field);
  const size_t dots = text.find("..");
  Date first, last;
  if (dots == std::string::npos || !ParseDate(text.substr(0, dots), &first) ||
      !ParseDate(text.substr(dots + 2), &last)) {
    throw UserError(field + ": \"" + text +
                    "\" is no range of time; write dates, such as \"1982-01..1990-12\"");
  }
  for (const Date& date : {first, last}) {
    if (date.day > DaysInMonth(date, calendar)) {
      throw UserError(field + ": \"" + text + "\" has a day that its month does not have");
    }
  }
  for (size_t i = 1; i < axis.seconds.size(); ++i) {
    if (!(axis.seconds[i] > axis.seconds[i - 1])) {
      throw UserError(field + ": the time axis does not increase at step " + std::to_string(i) +
                      ", so a range of time is no range of samples; give sample numbers");
    }
  }
  const double begin = SecondsOf(first, calendar);
  Date after = last;  // the first moment that is no longer in it
  switch (last.precision) {
    case 1:
      ++after.year;
      break;
    case 2:
      after.month = last.month % 12 + 1;
      after.year += last.month == 12 ? 1 : 0;
      break;
    case 3:
      after.seconds += kDay;
      break;
    default:
      after.seconds += 60;
      break;
  }
  const double end = SecondsOf(after, calendar);
  const auto at = [&](double time) {
    return std::lower_bound(axis.seconds.begin(), axis.seconds.end(), time) - axis.seconds.begin();
  };
  const std::pair<int64_t, int64_t> range = {at(begin), at(end)};
  if (range.first >= range.second) {
    throw UserError(field + ": no step of the data lies within \"" + text + "\"");
  }
  return range;
}

}  // namespace itwin::worker
