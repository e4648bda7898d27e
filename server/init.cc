#include "server/init.h"

#include <fcntl.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/ids.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "server/certificates.h"
#include "server/config.h"
#include "server/store/sqlite_job_store.h"

namespace itwin::server {
namespace {

constexpr int kTokenBytes = 32;

bool Exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

std::string HostName() {
  char name[256] = "";
  if (gethostname(name, sizeof name - 1) != 0) return "";
  return name;
}

std::string UserName() {
  std::string name;
  if (const passwd* entry = getpwuid(getuid())) name = entry->pw_name;
  name.erase(std::remove_if(name.begin(), name.end(),
                            [](char c) { return !absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_' && c != '-'; }),
             name.end());
  return name.empty() ? "admin" : name.substr(0, 40);
}

absl::Status MakePrivateDirectory(const std::string& path) {
  ITWIN_RETURN_IF_ERROR(MakeDirectories(path, 0700));
  if (chmod(path.c_str(), 0700) != 0) return ErrnoStatus(errno, path);
  return absl::OkStatus();
}

std::string ClientConfigText(const std::string& endpoint) {
  return absl::StrCat("# How to reach this gateway. Paths are relative to this file.\nendpoint: ", endpoint,
                      "\nca_file: ca.pem\ntoken_file: token\n");
}

absl::Status MakeTls(const DataDirectory& data, std::vector<std::string> hosts, InitReport* report) {
  KeyAndCertificate authority;
  if (Exists(data.tls("ca.key")) && Exists(data.tls("ca.pem"))) {
    ITWIN_ASSIGN_OR_RETURN(authority.key_pem, ReadFile(data.tls("ca.key")));
    ITWIN_ASSIGN_OR_RETURN(authority.certificate_pem, ReadFile(data.tls("ca.pem")));
  } else {
    ITWIN_ASSIGN_OR_RETURN(authority, MakeAuthority(absl::StrCat("itwin gateway ", RandomHex(4)), absl::Now()));
    ITWIN_RETURN_IF_ERROR(WriteFileAtomically(data.tls("ca.key"), authority.key_pem));
    ITWIN_RETURN_IF_ERROR(WriteFileAtomically(data.tls("ca.pem"), authority.certificate_pem));
    report->done.push_back("a certificate authority of its own");
  }
  bool issue = !Exists(data.tls("server.key")) || !Exists(data.tls("server.pem"));
  if (!issue) {
    ITWIN_ASSIGN_OR_RETURN(const std::string pem, ReadFile(data.tls("server.pem")));
    ITWIN_ASSIGN_OR_RETURN(const CertificateFacts facts, ReadCertificate(pem));
    for (const std::string& host : hosts) {
      issue |= std::find(facts.hosts.begin(), facts.hosts.end(), host) == facts.hosts.end();
    }
    issue |= facts.expires < absl::Now() + absl::Hours(24 * 30);
    for (const std::string& host : facts.hosts) {
      if (std::find(hosts.begin(), hosts.end(), host) == hosts.end()) hosts.push_back(host);
    }
  }
  if (issue) {
    ITWIN_ASSIGN_OR_RETURN(const KeyAndCertificate server, IssueServerCertificate(authority, hosts, absl::Now()));
    ITWIN_RETURN_IF_ERROR(WriteFileAtomically(data.tls("server.key"), server.key_pem));
    ITWIN_RETURN_IF_ERROR(WriteFileAtomically(data.tls("server.pem"), server.certificate_pem));
    report->done.push_back(absl::StrCat("a server certificate for ", absl::StrJoin(hosts, ", ")));
  }
  report->hosts = hosts;
  const auto shown = ReadFile(data.client("ca.pem"));
  if (!shown.ok() || *shown != authority.certificate_pem) {
    ITWIN_RETURN_IF_ERROR(WriteFileAtomically(data.client("ca.pem"), authority.certificate_pem));
  }
  return absl::OkStatus();
}

// The first user's token: the file's text and the database's hash belong together, also after one of them was lost.
absl::Status MakeFirstToken(const DataDirectory& data, const std::string& user, TokenStore* tokens, InitReport* report) {
  const std::string path = data.client("token");
  const auto add_as = [&](const std::string& hash) -> absl::Status {
    TokenRow row;
    row.name = user;
    row.sha256 = hash;
    row.role = TokenRole::kAdmin;
    row.created = absl::Now();
    absl::Status status = tokens->AddToken(row);
    if (status.code() == absl::StatusCode::kAlreadyExists) {
      row.name = absl::StrCat(user, "-", RandomHex(3));  // the old one's text is lost; its jobs stay with it
      status = tokens->AddToken(row);
    }
    if (status.ok()) report->done.push_back(absl::StrCat("a token for '", row.name, "'"));
    return status;
  };
  if (Exists(path)) {
    ITWIN_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, 4096));
    const std::string hash = Sha256Hex(absl::StripAsciiWhitespace(text));
    ITWIN_ASSIGN_OR_RETURN(const std::optional<TokenRow> known, tokens->FindToken(hash));
    return known ? absl::OkStatus() : add_as(hash);
  }
  const std::string text = RandomHex(kTokenBytes);
  // First the file: a token that the database knows but nobody holds would be useless.
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(path, text + "\n"));
  return add_as(Sha256Hex(text));
}

absl::Status InstallClient(const DataDirectory& data, InitReport* report) {
  const char* xdg = getenv("XDG_CONFIG_HOME");
  const char* home = getenv("HOME");
  if ((xdg == nullptr || *xdg == '\0') && (home == nullptr || *home == '\0')) {
    return absl::FailedPreconditionError("--install-client needs HOME to be set");
  }
  const std::string directory = home != nullptr && *home != '\0' ? absl::StrCat(home, "/.config/itwin") : absl::StrCat(xdg, "/itwin");
  ITWIN_RETURN_IF_ERROR(MakeDirectories(directory, 0700));
  for (const char* name : {"ca.pem", "token", "config.yaml"}) {
    ITWIN_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(data.client(name)));
    ITWIN_RETURN_IF_ERROR(WriteFileAtomically(absl::StrCat(directory, "/", name), bytes));
  }
  report->installed_config = directory + "/config.yaml";
  return absl::OkStatus();
}

}  // namespace

std::string ClientEndpoint(const std::string& host, int port) {
  std::string name = host;
  if (host == "0.0.0.0") name = "127.0.0.1";
  if (host == "::") name = "::1";
  return absl::StrCat(name.find(':') == std::string::npos ? name : absl::StrCat("[", name, "]"), ":", port);
}

absl::Status UpdateClientEndpoint(const DataDirectory& data, const std::string& endpoint) {
  const std::string text = ClientConfigText(endpoint);
  const auto there = ReadFile(data.client("config.yaml"));
  if (there.ok() && *there == text) return absl::OkStatus();
  return WriteFileAtomically(data.client("config.yaml"), text);
}

absl::StatusOr<std::string> AddToken(TokenStore* tokens, const std::string& name, TokenRole role) {
  const std::string text = RandomHex(kTokenBytes);
  TokenRow row;
  row.name = name;
  row.sha256 = Sha256Hex(text);
  row.role = role;
  row.created = absl::Now();
  ITWIN_RETURN_IF_ERROR(tokens->AddToken(row));
  return text;
}

absl::StatusOr<InitReport> Init(const InitOptions& options) {
  ITWIN_ASSIGN_OR_RETURN(const HostAndPort listen, ParseListen(options.listen));
  const DataDirectory data{options.data};
  InitReport report;
  for (const char* part : {"", "/tls", "/client", "/blobs", "/sites", "/run"}) {
    ITWIN_RETURN_IF_ERROR(MakePrivateDirectory(data.root + part));
  }
  std::vector<std::string> hosts = {"localhost", "127.0.0.1", "::1"};
  if (const std::string name = HostName(); !name.empty()) hosts.push_back(name);
  if (listen.host != "0.0.0.0" && listen.host != "::") hosts.push_back(listen.host);
  hosts.insert(hosts.end(), options.hosts.begin(), options.hosts.end());
  std::vector<std::string> unique;
  for (const std::string& host : hosts) {
    if (std::find(unique.begin(), unique.end(), host) == unique.end()) unique.push_back(host);
  }
  ITWIN_RETURN_IF_ERROR(MakeTls(data, unique, &report));

  SqliteJobStore::Options store;
  store.path = data.database();
  store.exclusive = false;
  store.readers = 1;
  const bool fresh = !Exists(store.path);
  ITWIN_ASSIGN_OR_RETURN(const std::unique_ptr<SqliteJobStore> opened, SqliteJobStore::Open(store));
  if (fresh) report.done.push_back("a database");
  ITWIN_RETURN_IF_ERROR(MakeFirstToken(data, options.user.empty() ? UserName() : options.user, opened.get(), &report));

  if (!Exists(data.client("config.yaml"))) {
    ITWIN_RETURN_IF_ERROR(UpdateClientEndpoint(data, ClientEndpoint(listen.host, listen.port)));
    report.done.push_back("a client configuration");
  }
  report.client_config = data.client("config.yaml");
  if (options.install_client) ITWIN_RETURN_IF_ERROR(InstallClient(data, &report));
  return report;
}

}  // namespace itwin::server
