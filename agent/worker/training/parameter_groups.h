// Which parameters a pattern of the spec means, and what differs for them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/spec/train_spec.h"

namespace itwin::worker {

// `*` is any text, also none, and `?` one character. "encoder" alone also means all below it
// ("encoder.weight").
bool MatchesPattern(const std::string& pattern, const std::string& name);

// Takes requires_grad from the parameters of groups with `freeze`. Throws UserError for a pattern
// that matches no parameter (it would do nothing) with the nearest names, and when nothing is left
// to train.
void FreezeParameters(const std::vector<ParameterGroupSpec>& groups,
                      const std::vector<std::pair<std::string, at::Tensor>>& parameters);

// The group that counts for a parameter: the first that matches; null when none does.
const ParameterGroupSpec* GroupOf(const std::vector<ParameterGroupSpec>& groups,
                                  const std::string& parameter);

}  // namespace itwin::worker
