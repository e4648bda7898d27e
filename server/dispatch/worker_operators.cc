#include "server/dispatch/worker_operators.h"

#include <nlohmann/json.hpp>

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace itwin::server {

absl::Status WorkerOperators::LoadOnce() {
  if (!ask_) return absl::OkStatus();
  const Ask ask = std::exchange(ask_, nullptr);
  ITWIN_ASSIGN_OR_RETURN(const std::string text, ask());
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const bool right = json.is_object() && json.contains("libtorch") && json["libtorch"].is_string() &&
                     json.contains("operators") && json["operators"].is_array() && !json["operators"].empty();
  if (!right) {
    return absl::InvalidArgumentError(absl::StrCat(where_, ": is not what `itwin-worker --operators` prints"));
  }
  libtorch_ = json["libtorch"].get<std::string>();
  for (const nlohmann::json& name : json["operators"]) {
    if (name.is_string()) names_.insert(name.get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status WorkerOperators::Load() {
  absl::MutexLock lock(&mu_);
  return LoadOnce();
}

WorkerOperators::Missing WorkerOperators::WhatLacks(absl::Span<const std::string> operators) {
  absl::MutexLock lock(&mu_);
  if (const absl::Status status = LoadOnce(); !status.ok()) {
    log::Warn("models are not checked against the worker's LibTorch before they run: {}", std::string(status.message()));
  }
  Missing missing{.libtorch = libtorch_, .names = {}};
  if (names_.empty()) return missing;
  for (const std::string& name : operators) {
    // TorchScript's own (prim::) are part of the language; other namespaces are known at the site alone.
    if (!absl::StartsWith(name, "aten::") || names_.contains(name)) continue;
    const bool any_overload = !absl::StrContains(name.substr(6), ".");
    const auto next = names_.lower_bound(name + ".");
    if (any_overload && next != names_.end() && absl::StartsWith(*next, name + ".")) continue;
    missing.names.push_back(name);
  }
  return missing;
}

}  // namespace itwin::server
