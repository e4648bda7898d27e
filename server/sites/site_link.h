#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/sites/site_file.h"
#include "server/tunnel/ssh_options.h"
#include "server/tunnel/tunnel.h"

// From a site's file to a way there.
namespace itwin::server {

// Of a site with `ssh`. Pure, but for the account's own name where the file has none.
absl::StatusOr<SshTunnelOptions> SshOptionsOf(const SiteFile& site);
// "alice@jump.example:2222, bob@other" as hosts. kInvalidArgument.
absl::StatusOr<std::vector<SshHost>> ParseJump(absl::string_view text);

absl::StatusOr<std::unique_ptr<Tunnel>> MakeTunnel(const SiteFile& site);

}  // namespace itwin::server
