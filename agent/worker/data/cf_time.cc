#include "agent/worker/data/cf_time.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <tuple>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr double kDay = 86400;
constexpr double kYear = 365.242198781 * kDay;  // tropical, as UDUNITS

struct Date {
  int64_t year = 1;
  int month = 1, day = 1;
  double seconds = 0;  // of the day
  int precision = 1;   // 1 year, 2 month, 3 day, 4 minute
};

bool IsProlepticLeap(int64_t year) {
  return (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
}

enum class Calendar { kStandard, kProleptic, kJulian, kNoLeap, kAllLeap, k360 };

Calendar ParseCalendar(const std::string& name, const std::string& what) {
  std::string lower;
  for (const char c : name) lower += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
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

// "1982", "1982-1", "1982-01-31", "1982-01-31 12:00:00.0", with T or a space. False for another text.
bool ParseDate(const std::string& text, Date* date) {
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
  if (date->precision == 3 && at < end && (skip('T') || skip(' ')) && at < end) {
    int hours = 0, minutes = 0;
    double seconds = 0;
    date->precision = 4;
    if (!number(&hours)) return false;
    if (skip(':') && !number(&minutes)) return false;
    if (skip(':') && !number(&seconds)) return false;
    if (hours < 0 || hours > 24 || minutes < 0 || minutes > 59 || !(seconds >= 0 && seconds < 61)) {
      return false;
    }
    date->seconds = hours * 3600 + minutes * 60 + seconds;
    if (!skip('Z')) {
      skip(' ');
      if (std::string(at, end) == "UTC" || std::string(at, end) == "0:00" ||
          std::string(at, end) == "00:00" || std::string(at, end) == "+00:00") {
        at = end;
      }
    }
  }
  return at == end;
}

double UnitSeconds(const std::string& unit) {
  std::string name;
  for (const char c : unit) name += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (name == "months" || name == "month") return kYear / 12;
  if (name == "years" || name == "year" || name == "yr") return kYear;
  if (name == "weeks" || name == "week") return 7 * kDay;
  if (name == "days" || name == "day" || name == "d") return kDay;
  if (name == "hours" || name == "hour" || name == "hr" || name == "hrs" || name == "h") return 3600;
  if (name == "minutes" || name == "minute" || name == "min" || name == "mins") return 60;
  if (name == "seconds" || name == "second" || name == "sec" || name == "secs" || name == "s") return 1;
  if (name == "milliseconds" || name == "millisecond" || name == "msec" || name == "ms") return 1e-3;
  return 0;
}

std::string Trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

}  // namespace

double CfSeconds(double value, const std::string& units, const std::string& calendar,
                 const std::string& what) {
  const Calendar parsed = ParseCalendar(calendar, what);
  const size_t since = units.find(" since ");
  Date reference;
  const double unit =
      since == std::string::npos ? 0 : UnitSeconds(Trimmed(units.substr(0, since)));
  if (unit == 0 || !ParseDate(Trimmed(units.substr(since + 7)), &reference)) {
    throw UserError(what + ": the units \"" + units +
                    "\" are not those of a time axis, such as \"days since 1950-01-01\"");
  }
  return SecondsOf(reference, parsed) + value * unit;
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
