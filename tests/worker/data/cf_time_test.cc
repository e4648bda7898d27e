#include "agent/worker/data/cf_time.h"

#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;
using testing::UserErrorOf;

constexpr double kDay = 86400;

double Between(const std::string& a, const std::string& b, const std::string& calendar) {
  return (CfSeconds(0, "days since " + b, calendar, "t") -
          CfSeconds(0, "days since " + a, calendar, "t")) /
         kDay;
}

TEST(CfTime, CountsTheDaysOfEachCalendar) {
  EXPECT_EQ(Between("1999-12-31", "2000-03-01", "standard"), 61);
  EXPECT_EQ(Between("1900-02-28", "1900-03-01", "gregorian"), 1);
  EXPECT_EQ(Between("1900-02-28", "1900-03-01", "julian"), 2);
  EXPECT_EQ(Between("1582-10-04", "1582-10-15", "standard"), 1) << "the days that were left out";
  EXPECT_EQ(Between("1582-10-04", "1582-10-15", "proleptic_gregorian"), 11);
  EXPECT_EQ(Between("2000-02-28", "2000-03-01", "noleap"), 1);
  EXPECT_EQ(Between("2001-02-28", "2001-03-01", "all_leap"), 2);
  EXPECT_EQ(Between("2001-02-28", "2001-03-01", "360_day"), 3);
  EXPECT_EQ(Between("2000-01-01", "2001-01-01", "360_day"), 360);
  EXPECT_EQ(Between("-0001-01-01", "0001-01-01", "365_day"), 730);
}

TEST(CfTime, ReadsUnitsAsTheyAreWritten) {
  const double begin = CfSeconds(0, "seconds since 1970-01-01", "", "t");
  EXPECT_EQ(CfSeconds(25, "hours since 1970-1-1 00:00:00", "", "t") - begin, 25 * 3600);
  EXPECT_EQ(CfSeconds(1, "day since 1970-01-01T12:30:15.5Z", "", "t") - begin, kDay + 45015.5);
  EXPECT_EQ(CfSeconds(-2, "minutes since 1970-01-01 00:00:0.0 UTC", "standard", "t") - begin, -120);
  EXPECT_EQ(CfSeconds(1, "Days Since 1970-01-01", "", "t") - begin, kDay);
  EXPECT_EQ(CfSeconds(1, "HOURS\tSINCE 1970-01-01t00:00z", "", "t") - begin, 3600);
  EXPECT_THAT(UserErrorOf([] { CfSeconds(0, "fortnights since 1970-01-01", "", "time"); }),
              HasSubstr("time: the units \"fortnights since 1970-01-01\" are not"));
  EXPECT_NE(UserErrorOf([] { CfSeconds(0, "degrees_north", "", "t"); }), "");
  EXPECT_NE(UserErrorOf([] { CfSeconds(0, "days since 1970-13-01", "", "t"); }), "");
  EXPECT_NE(UserErrorOf([] { CfSeconds(0, "days since", "", "t"); }), "");
  EXPECT_THAT(UserErrorOf([] { CfSeconds(0, "days since 1970-01-01", "maya", "t"); }),
              HasSubstr("the calendar \"maya\" is unknown"));
}

TEST(CfTime, TimeZonesAreOffsetsFromUtc) {
  const double begin = CfSeconds(0, "seconds since 1970-01-01", "", "t");
  const auto at = [&](const std::string& clock) {
    return CfSeconds(0, "days since 1970-01-01 " + clock, "", "t") - begin;
  };
  for (const char* zone : {"Z", "z", " Z", " UTC", " gmt", "+0:00", " +00:00", " 0:00", "-00:00"}) {
    EXPECT_EQ(at(std::string("12:00") + zone), 12 * 3600) << zone;
  }
  EXPECT_EQ(at("12:00:00 +1:00"), 11 * 3600);
  EXPECT_EQ(at("12:00:00+01:00"), 11 * 3600);
  EXPECT_EQ(at("12:00:00.0 -6:00"), 18 * 3600);
  EXPECT_EQ(at("12:00 +0530"), 6.5 * 3600);
  EXPECT_EQ(at("12:00 -3"), 15 * 3600);
  for (const char* zone : {" +", " 25:00", " +1:60", " CET", " +1:00x", " 1", "ZZ"}) {
    EXPECT_THAT(UserErrorOf([&] { at(std::string("12:00") + zone); }),
                HasSubstr("are not those of a time axis"))
        << zone;
  }
}

TEST(CfTime, MonthsAndYearsAreThoseOfTheCalendar) {
  const auto days = [](double value, const std::string& units, const std::string& calendar) {
    const size_t since = units.find("since");
    return (CfSeconds(value, units, calendar, "t") -
            CfSeconds(0, "days " + units.substr(since), calendar, "t")) /
           kDay;
  };
  EXPECT_EQ(days(1, "months since 1982-01-15", "standard"), 31);
  EXPECT_EQ(days(2, "months since 1982-01-15", "noleap"), 59);
  EXPECT_EQ(days(2, "months since 1984-01-15", "noleap"), 59);
  EXPECT_EQ(days(2, "Month since 1984-01-15", "standard"), 60);
  EXPECT_EQ(days(-1, "months since 1984-01-15", ""), -31);
  EXPECT_EQ(days(-25, "months since 1984-01-15 06:00", ""), -761);  // 1981-12-15
  EXPECT_EQ(days(2, "months since 1982-01-31", ""), 59);
  EXPECT_EQ(days(7, "months since 1982-01-01", "360_day"), 210);
  EXPECT_EQ(days(0.5, "months since 1982-01-01", "360_day"), 15);
  EXPECT_EQ(days(1.5, "years since 1982-01-01", "360_day"), 540);
  EXPECT_EQ(days(1, "years since 1984-01-01", "standard"), 366);
  EXPECT_EQ(days(1, "years since 1984-01-01", "noleap"), 365);
  EXPECT_EQ(days(0.2, "years since 1984-01-01", "noleap"), 73) << "all its years are as long";
  EXPECT_EQ(days(1, "year since 1985-01-01", "all_leap"), 366);

  const auto error = [](double value, const std::string& units, const std::string& calendar) {
    return UserErrorOf([&] { CfSeconds(value, units, calendar, "a.nc, variable time"); });
  };
  EXPECT_THAT(error(1, "months since 1982-01-31", ""),
              AllOf(HasSubstr("a.nc, variable time: 1 \"months since 1982-01-31\""),
                    HasSubstr("1982-02 has no day 31")));
  EXPECT_THAT(error(1, "years since 1984-02-29", ""), HasSubstr("1985-02 has no day 29"));
  EXPECT_THAT(error(0.5, "months since 1982-01-01", "standard"),
              AllOf(HasSubstr("0.5 \"months since 1982-01-01\""), HasSubstr("not whole")));
  EXPECT_THAT(error(0.5, "months since 1982-01-01", "noleap"), HasSubstr("not whole"));
  EXPECT_THAT(error(0.5, "years since 1982-01-01", ""), HasSubstr("not whole"));
  EXPECT_THAT(error(NAN, "months since 1982-01-01", ""), HasSubstr("not whole"));
  EXPECT_THAT(error(1e30, "months since 1982-01-01", ""), HasSubstr("not whole"));
}

// The 15th of each month from January 1982 on.
TimeAxis Monthly(int months) {
  TimeAxis axis;
  for (int i = 0; i < months; ++i) {
    char text[40];
    std::snprintf(text, sizeof(text), "days since %d-%02d-15", 1982 + i / 12, i % 12 + 1);
    axis.seconds.push_back(CfSeconds(0, text, "", "t"));
  }
  return axis;
}

TEST(CfTime, RangesIncludeBothEndsToTheirPrecision) {
  const TimeAxis axis = Monthly(132);
  EXPECT_THAT(StepsWithin(axis, "1982-01..1990-12", "f"), Pair(0, 108));
  EXPECT_THAT(StepsWithin(axis, "1991..1992", "f"), Pair(108, 132));
  EXPECT_THAT(StepsWithin(axis, "1982-02-15..1982-03-15", "f"), Pair(1, 3));
  EXPECT_THAT(StepsWithin(axis, "1982-02-16..1982-03-15T00:00", "f"), Pair(2, 3));
  EXPECT_THAT(UserErrorOf([&] { StepsWithin(axis, "1982-02-16..1982-03-14T23:58", "f"); }),
              HasSubstr("no step"));
}

TEST(CfTime, JumpsAreStepsThatDoNotFollow) {
  const auto jumps = [](std::vector<double> days) {
    for (double& day : days) day *= kDay;
    return FindJumps({days, ""});
  };
  EXPECT_THAT(FindJumps(Monthly(132)), ElementsAre()) << "months are of 28 to 31 days";
  EXPECT_THAT(jumps({0, 1, 2, 3, 5, 6, 7, 7, 8, 4, 5, 6}), ElementsAre(4, 7, 9));
  EXPECT_THAT(jumps({0, 31, 59, 120, 151, 181}), ElementsAre(3)) << "a month is missing";
  EXPECT_THAT(jumps({0, 365, 731, 1096}), ElementsAre());
  EXPECT_THAT(jumps({0, 1, NAN, 3, 4, 5}), ElementsAre(2, 3));
  EXPECT_THAT(jumps({0, 0, 0}), ElementsAre()) << "no time is written";
  EXPECT_THAT(jumps({}), ElementsAre());
  EXPECT_THAT(jumps({5}), ElementsAre());
}

TEST(CfTime, RefusesWhatIsNoRange) {
  const TimeAxis axis = Monthly(24);
  EXPECT_THAT(UserErrorOf([&] { StepsWithin(axis, "1990-01..1991-01", "f"); }),
              HasSubstr("no step of the data lies within"));
  EXPECT_THAT(UserErrorOf([&] { StepsWithin(axis, "1982-02-30..1983-01", "f"); }),
              HasSubstr("a day that its month does not have"));
  for (const char* text :
       {"1982-01", "1982-01..", "..", "1982-01...1983", "x..y", "1982-00..1983"}) {
    EXPECT_NE(UserErrorOf([&] { StepsWithin(axis, text, "f"); }), "") << text;
  }
  TimeAxis back = axis;
  std::swap(back.seconds[3], back.seconds[4]);
  EXPECT_THAT(UserErrorOf([&] { StepsWithin(back, "1982-01..1982-12", "f"); }),
              HasSubstr("does not increase at step 4"));
}

}  // namespace
}  // namespace itwin::worker
