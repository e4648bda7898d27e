#include <stdlib.h>

#include <algorithm>
#include <filesystem>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/spec/nearest_name.h"
#include "common/spec/yaml_tree.h"
#include "common/status_macros.h"
#include "itwin/connect.h"

namespace itwin::client {
namespace {

constexpr int64_t kMaxConfigBytes = 64 << 10;
constexpr int64_t kMaxTokenBytes = 4096;

absl::Status Explain(const absl::Status& status, absl::string_view what, absl::string_view next_step) {
  return absl::Status(status.code(), absl::StrCat(what, ": ", status.message(), "; ", next_step));
}

std::string RelativeTo(const std::filesystem::path& directory, const std::string& path) {
  return std::filesystem::path(path).is_absolute() ? path : (directory / path).string();
}

absl::StatusOr<bool> ParseSwitch(absl::string_view name, absl::string_view text) {
  if (text == "1" || text == "true") return true;
  if (text == "0" || text == "false" || text.empty()) return false;
  return absl::InvalidArgumentError(absl::StrCat(name, ": '", text, "' is neither true nor false"));
}

// Fills what is empty in `options` from the file.
absl::Status ReadConfigFile(const std::string& path, bool token_given, ConnectOptions* options) {
  std::string endpoint_of_file;
  const bool own_ca = options->ca_file.empty();  // so the file's is used, if it has one
  absl::StatusOr<std::string> text = ReadFile(path, kMaxConfigBytes);
  if (!text.ok()) return Explain(text.status(), "configuration", "give a readable YAML file or unset ITWIN_CONFIG");
  const auto wrong = [&](absl::string_view where, absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", where, where.empty() ? "" : ": ", what));
  };
  absl::StatusOr<YamlNodePtr> root = ParseYaml(*text);
  if (!root.ok()) return wrong("", root.status().message());
  if ((*root)->kind != YamlNode::Kind::kMap) return wrong((*root)->where, "expected keys such as endpoint and token_file");
  const std::filesystem::path directory = std::filesystem::path(path).parent_path();
  const std::vector<std::string> known = {"endpoint", "ca_file", "token_file", "server_name", "insecure"};
  for (const auto& [key, value] : (*root)->entries) {
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      return wrong(value->where, absl::StrCat(key, ": unknown key; ", UnknownNameHint(key, known)));
    }
    if (value->kind != YamlNode::Kind::kScalar) return wrong(value->where, absl::StrCat(key, ": expected text"));
    if (key == "endpoint") endpoint_of_file = value->text;
    if (key == "server_name" && options->server_name.empty()) options->server_name = value->text;
    if (key == "ca_file" && options->ca_file.empty()) options->ca_file = RelativeTo(directory, value->text);
    if (key == "token_file" && !token_given) options->token_file = RelativeTo(directory, value->text);
    if (key == "insecure" && !options->insecure) {
      ITWIN_ASSIGN_OR_RETURN(options->insecure, ParseSwitch(absl::StrCat(path, ": ", value->where, ": insecure"), value->text));
    }
  }
  if (options->endpoint.empty()) options->endpoint = endpoint_of_file;
  // The token was given for the file's gateway: another one gets it only if it proves itself to the file's CA.
  const bool proven = own_ca && !options->ca_file.empty() && !options->insecure;
  if (!token_given && !options->token_file.empty() && options->endpoint != endpoint_of_file && !proven) {
    return absl::UnauthenticatedError(
        absl::StrCat("the token of ", path, " belongs to ", endpoint_of_file.empty() ? "another gateway" : endpoint_of_file,
                     " and is not sent to ", options->endpoint, "; set ITWIN_TOKEN_FILE for this gateway"));
  }
  return absl::OkStatus();
}

}  // namespace

Environment ProcessEnvironment() {
  return [](const std::string& name) -> std::optional<std::string> {
    const char* value = getenv(name.c_str());
    if (value == nullptr || *value == '\0') return std::nullopt;
    return std::string(value);
  };
}

absl::StatusOr<ConnectOptions> ResolveOptions(ConnectOptions given, const Environment& environment) {
  ConnectOptions options = std::move(given);
  const auto from_environment = [&](const char* name, std::string* field) {
    if (!field->empty()) return;
    if (std::optional<std::string> value = environment(name)) *field = *value;
  };
  from_environment("ITWIN_ENDPOINT", &options.endpoint);
  from_environment("ITWIN_CA_FILE", &options.ca_file);
  from_environment("ITWIN_SERVER_NAME", &options.server_name);
  if (options.token.empty() && options.token_file.empty()) {
    from_environment("ITWIN_TOKEN_FILE", &options.token_file);
    if (options.token_file.empty()) from_environment("ITWIN_TOKEN", &options.token);
  }
  if (!options.insecure) {
    ITWIN_ASSIGN_OR_RETURN(options.insecure,
                           ParseSwitch("ITWIN_INSECURE", environment("ITWIN_INSECURE").value_or("")));
  }

  const std::optional<std::string> named = environment("ITWIN_CONFIG");
  const std::optional<std::string> home = environment("HOME");
  const std::string path = named ? *named : home ? absl::StrCat(*home, "/.config/itwin/config.yaml") : "";
  std::error_code ignored;
  if (named || (!path.empty() && std::filesystem::exists(path, ignored))) {
    const bool token_given = !options.token.empty() || !options.token_file.empty();
    ITWIN_RETURN_IF_ERROR(ReadConfigFile(path, token_given, &options));
  }
  if (options.endpoint.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "no gateway is configured; set ITWIN_ENDPOINT (host:port), or write endpoint, ca_file and token_file into ",
        path.empty() ? "a file named by ITWIN_CONFIG" : path));
  }
  if (absl::StartsWith(options.endpoint, "https://")) options.endpoint = options.endpoint.substr(8);
  if (options.token.empty()) {
    if (options.token_file.empty()) {
      return absl::UnauthenticatedError(
          "no token is configured; set ITWIN_TOKEN_FILE, or token_file in the configuration, to the file that "
          "`itwin-gateway` made for you");
    }
    absl::StatusOr<std::string> token = ReadFile(options.token_file, kMaxTokenBytes);
    if (!token.ok()) return Explain(token.status(), "token file", "set ITWIN_TOKEN_FILE to the file with your token");
    options.token = std::string(absl::StripAsciiWhitespace(*token));
  }
  const bool printable = !options.token.empty() && std::all_of(options.token.begin(), options.token.end(), [](char c) {
    return absl::ascii_isgraph(static_cast<unsigned char>(c));
  });
  if (!printable) {
    return absl::UnauthenticatedError(absl::StrCat(
        options.token_file.empty() ? "the token" : options.token_file,
        ": is not a token (one line of printable characters); ask for a new one"));
  }
  return options;
}

}  // namespace itwin::client
