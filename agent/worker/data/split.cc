#include "agent/worker/data/split.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

std::string RangeText(const IndexRange& range) {
  return "\"" + std::to_string(range.first) + ".." + std::to_string(range.last) + "\"";
}

void CheckRange(Split split, const IndexRange& range, int64_t samples) {
  const std::string field =
      std::string("train.data.split.") + SplitName(split) + ": " + RangeText(range);
  const std::string right = "; there are " + std::to_string(samples) +
                            " samples, so a range within \"0.." + std::to_string(samples) +
                            "\" is possible (the last number is not included)";
  if (range.first < 0 || range.last > samples)
    throw UserError(field + " reaches beyond the data" + right);
  if (range.first >= range.last) throw UserError(field + " is empty" + right);
}

int64_t CountOf(const char* field, double fraction, size_t pool) {
  if (!(fraction >= 0 && fraction < 1)) {
    throw UserError(std::string("train.data.split.") + field + ": " + std::to_string(fraction) +
                    " must be at least 0 and less than 1");
  }
  const auto count = static_cast<int64_t>(std::llround(fraction * static_cast<double>(pool)));
  if (fraction > 0 && count == 0) {
    throw UserError(std::string("train.data.split.") + field + ": " + std::to_string(fraction) +
                    " of " + std::to_string(pool) + " samples is none; ask for a larger fraction");
  }
  return count;
}

// In [0, 1), by SplitMix64 of both.
double HashDraw(uint64_t seed, uint64_t sample) {
  uint64_t z = (seed ^ 0x5eed5b117ULL) + (sample + 1) * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

}  // namespace

SplitIndices DrawSplits(const SplitSpec& spec, int64_t samples, bool separate_test, uint64_t seed) {
  if (samples <= 0) throw UserError("train.data: has no samples");
  if (separate_test && (spec.test || spec.test_fraction != 0)) {
    throw UserError(
        "train.data.split.test: the data have test files of their own; name either those or a "
        "split");
  }
  const std::pair<Split, const std::optional<IndexRange>*> named[] = {
      {Split::kTrain, &spec.train},
      {Split::kValidation, &spec.validation},
      {Split::kTest, &spec.test}};
  SplitIndices indices;
  std::vector<char> taken(static_cast<size_t>(samples), 0);
  for (const auto& [split, range] : named) {
    if (!*range) continue;
    CheckRange(split, **range, samples);
    auto& list = indices[static_cast<size_t>(split)];
    for (int64_t i = (*range)->first; i < (*range)->last; ++i) {
      if (taken[static_cast<size_t>(i)]) {
        throw UserError(std::string("train.data.split.") + SplitName(split) + ": " +
                        RangeText(**range) + " shares sample " + std::to_string(i) +
                        " with another split; a model must not be judged on what it has seen");
      }
      taken[static_cast<size_t>(i)] = 1;
      list.push_back(i);
    }
  }
  auto& train = indices[static_cast<size_t>(Split::kTrain)];
  if (!spec.train) {
    for (int64_t i = 0; i < samples; ++i) {
      if (!taken[static_cast<size_t>(i)]) train.push_back(i);
    }
  }

  const int64_t test_count =
      spec.test ? 0 : CountOf("test_fraction", spec.test_fraction, train.size());
  const int64_t validation_count =
      spec.validation ? 0 : CountOf("validation_fraction", spec.validation_fraction, train.size());
  if (test_count + validation_count > 0 && spec.by_hash) {
    // Each sample's own draw: its place among the splits does not depend on how many there are.
    std::vector<int64_t> rest;
    const double test_end = spec.test ? 0 : spec.test_fraction;
    const double validation_end = test_end + (spec.validation ? 0 : spec.validation_fraction);
    for (const int64_t sample : train) {
      const double draw = HashDraw(seed, static_cast<uint64_t>(sample));
      if (draw < test_end) {
        indices[static_cast<size_t>(Split::kTest)].push_back(sample);
      } else if (draw < validation_end) {
        indices[static_cast<size_t>(Split::kValidation)].push_back(sample);
      } else {
        rest.push_back(sample);
      }
    }
    train = std::move(rest);
    for (const auto& [split, count] :
         {std::pair{Split::kValidation, validation_count}, {Split::kTest, test_count}}) {
      if (count > 0 && indices[static_cast<size_t>(split)].empty()) {
        throw UserError(std::string("train.data.split.by_hash: leaves no samples in the ") +
                        SplitName(split) + " split; ask for a larger fraction");
      }
    }
  } else if (test_count + validation_count > 0) {
    // Fisher-Yates by hand: std::shuffle differs between standard libraries.
    std::mt19937_64 random(seed ^ 0x5eed5b117ULL);
    for (size_t i = train.size(); i > 1; --i) std::swap(train[i - 1], train[random() % i]);
    const auto cut = [&train](int64_t count) {
      const auto taking = std::min<size_t>(static_cast<size_t>(count), train.size());
      std::vector<int64_t> part(train.end() - static_cast<std::ptrdiff_t>(taking), train.end());
      train.resize(train.size() - taking);
      std::sort(part.begin(), part.end());
      return part;
    };
    if (test_count > 0) indices[static_cast<size_t>(Split::kTest)] = cut(test_count);
    if (validation_count > 0)
      indices[static_cast<size_t>(Split::kValidation)] = cut(validation_count);
    std::sort(train.begin(), train.end());
  }
  if (train.empty()) {
    throw UserError("train.data.split: leaves no samples for training out of " +
                    std::to_string(samples));
  }
  return indices;
}

}  // namespace itwin::worker
