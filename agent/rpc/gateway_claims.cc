#include "agent/rpc/gateway_claims.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

using nlohmann::json;

constexpr size_t kMaxIdBytes = 64;

bool IsPlain(const std::string& id) {
  return !id.empty() && id.size() <= kMaxIdBytes &&
         std::all_of(id.begin(), id.end(), [](char c) { return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-'; });
}

std::string WordOf(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : std::string();
}

}  // namespace

GatewayClaims::GatewayClaims(std::string root, Clock* clock) : root_(std::move(root)), clock_(clock) {}

std::string GatewayClaims::PathOf(const std::string& id) const { return absl::StrCat(root_, "/gateways/", id, ".json"); }

absl::Status GatewayClaims::Greet(const v1::HelloRequest& request) {
  const std::string& id = request.gateway_id();
  if (request.gateway_place().empty() || !IsPlain(id)) return absl::OkStatus();
  absl::MutexLock lock(&mu_);
  const absl::Time now = clock_->Now();
  auto claim = claims_.find(id);
  if (claim == claims_.end()) {
    const absl::StatusOr<std::string> text = ReadFile(PathOf(id), 1 << 16);
    const json record = text.ok() ? json::parse(*text, nullptr, /*allow_exceptions=*/false) : json();
    if (record.is_object() && !WordOf(record, "place").empty()) {
      claim = claims_.insert({id, {WordOf(record, "place"), WordOf(record, "label"), now}}).first;
    }
  }
  if (claim != claims_.end() && claim->second.place == request.gateway_place()) {
    claim->second.heard = now;
    return absl::OkStatus();
  }
  if (claim != claims_.end() && now < claim->second.heard + kGone) {
    return absl::FailedPreconditionError(absl::StrCat(
        "fenced: another gateway with the same identity (", claim->second.label, ") works with the spool ", root_,
        ". Is the data directory of this one (", request.gateway_label(), ") a copy? Stop one of the two; this one takes over ",
        absl::FormatDuration(kGone), " after the other has gone"));
  }
  ITWIN_RETURN_IF_ERROR(MakeDirectories(root_ + "/gateways"));
  const json record = {{"place", request.gateway_place()}, {"label", request.gateway_label()}};
  ITWIN_RETURN_IF_ERROR(
      WriteFileAtomically(PathOf(id), record.dump(-1, ' ', false, json::error_handler_t::replace) + "\n"));
  if (claim != claims_.end()) {
    log::Warn("gateway {} at {} takes over from {}", id, request.gateway_label(), claim->second.label);
  }
  claims_[id] = {request.gateway_place(), request.gateway_label(), now};
  return absl::OkStatus();
}

}  // namespace itwin::agent
