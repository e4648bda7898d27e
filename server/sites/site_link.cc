#include "server/sites/site_link.h"

#include <pwd.h>
#include <unistd.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/status_macros.h"
#include "server/tunnel/process_tunnel.h"
#include "server/tunnel/ssh_tunnel.h"

namespace itwin::server {
namespace {

std::string OwnUser() {
  const struct passwd* entry = getpwuid(getuid());
  return entry != nullptr ? entry->pw_name : "";
}

}  // namespace

absl::StatusOr<std::vector<SshHost>> ParseJump(absl::string_view text) {
  std::vector<SshHost> out;
  for (absl::string_view part : absl::StrSplit(text, ',', absl::SkipWhitespace())) {
    part = absl::StripAsciiWhitespace(part);
    SshHost& host = out.emplace_back();
    if (const size_t at = part.rfind('@'); at != absl::string_view::npos) {
      host.user = std::string(part.substr(0, at));
      part.remove_prefix(at + 1);
    }
    const bool bracket = !part.empty() && part[0] == '[';
    const size_t end = bracket ? part.find(']') : absl::string_view::npos;
    const size_t colon = bracket ? (end == absl::string_view::npos ? end : part.find(':', end)) : part.rfind(':');
    if (colon != absl::string_view::npos &&
        (!absl::SimpleAtoi(part.substr(colon + 1), &host.port) || host.port < 1 || host.port > 65535)) {
      return absl::InvalidArgumentError(absl::StrCat("ssh.jump: '", text, "' is no host; write user@host or user@host:port"));
    }
    absl::string_view name = colon == absl::string_view::npos ? part : part.substr(0, colon);
    if (bracket) name = name.substr(1, name.size() - 2);
    host.host = std::string(name);
    if (host.host.empty()) return absl::InvalidArgumentError(absl::StrCat("ssh.jump: '", text, "' is no host; write user@host or user@host:port"));
  }
  return out;
}

absl::StatusOr<SshTunnelOptions> SshOptionsOf(const SiteFile& site) {
  if (!site.ssh) return absl::FailedPreconditionError(absl::StrCat("site ", site.name, " is not reached by SSH"));
  const SshSettings& ssh = *site.ssh;
  SshTunnelOptions out;
  for (const std::string& host : ssh.hosts) out.hosts.push_back({.host = host, .port = ssh.port});
  out.user = ssh.user.empty() ? OwnUser() : ssh.user;
  ITWIN_ASSIGN_OR_RETURN(out.jump, ParseJump(ssh.jump));
  out.command = ConnectCommand(site);
  out.identity_file = ssh.key;
  out.passphrase_file = ssh.passphrase_file;
  out.certificate_file = ssh.certificate;
  out.use_agent = ssh.agent;
  if (!ssh.one_time_code_program.empty()) out.answers = AnswersFromProgram({ssh.one_time_code_program});
  out.known_hosts_file = ssh.known_hosts;
  out.fingerprints = ssh.fingerprints;
  out.keepalive_interval = ssh.keepalive;
  return out;
}

absl::StatusOr<std::unique_ptr<Tunnel>> MakeTunnel(const SiteFile& site) {
  if (!site.ssh) return std::unique_ptr<Tunnel>(new ProcessTunnel({.argv = site.command, .env = {}}));
  ITWIN_ASSIGN_OR_RETURN(SshTunnelOptions options, SshOptionsOf(site));
  ITWIN_ASSIGN_OR_RETURN(std::unique_ptr<SshTunnel> tunnel, SshTunnel::Create(std::move(options)));
  return std::unique_ptr<Tunnel>(std::move(tunnel));
}

}  // namespace itwin::server
