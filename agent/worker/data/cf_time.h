// Time axes as the CF conventions write them: numbers with units such as "hours since 1901-01-15
// 00:00:00" in one of several calendars.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace itwin::worker {

// Whether units are "… since …", in any case.
bool AreTimeUnits(const std::string& units);

// Seconds since the beginning of the calendar of a time given as a number. Months and years are those
// of the calendar: the day of the reference is kept. Throws UserError for units or a calendar that
// cannot be read, and for a number of months or years that is no date (a fraction where they differ in
// length, a day that the month does not have); `what` names the variable.
double CfSeconds(double value, const std::string& units, const std::string& calendar,
                 const std::string& what);

struct TimeAxis {
  std::vector<double> seconds;  // of each step, by CfSeconds
  std::string calendar;
};

// Steps that do not follow the one before them: later than it by more than one and a half times the
// median step (months differ by less), or not later. None where no step is later than another.
std::vector<int64_t> FindJumps(const TimeAxis& axis);

// The half-open range of steps within "1982-01..1990-12": both ends are included, each to its
// precision (year, month, day, or minute: "1982-01-31T12:00"). Throws UserError for a text that is no
// such range, for one without a step in it, and where the axis does not increase; `field` names the
// key.
std::pair<int64_t, int64_t> StepsWithin(const TimeAxis& axis, const std::string& text,
                                        const std::string& field);

}  // namespace itwin::worker
