// Operators that do something else in training than in evaluation, and the argument that says
// which.
#pragma once

#include <optional>
#include <span>

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>

namespace itwin::worker {

struct TrainingArgument {
  const char* op;        // without overload
  const char* argument;  // a bool, or the probability of dropping something
  double off = 0;        // what it is in evaluation
};

// All of LibTorch's that the allow-list has, of every version.
std::span<const TrainingArgument> TrainingArguments();

// Where an operator's flag is.
struct TrainingFlag {
  size_t argument;  // index in the schema
  c10::IValue off;  // its value in evaluation
  std::optional<size_t>
      statistic;                // without this argument the flag stays as it is: a normalisation
                                // without running statistics uses the batch's in evaluation, too
  std::optional<size_t> share;  // where this argument is 0 the flag has no effect
};

// nullopt for an operator that has none. Operators of a library of the site have one when a bool is
// called "train" or "training".
std::optional<TrainingFlag> FindTrainingFlag(const c10::FunctionSchema& schema);

}  // namespace itwin::worker
