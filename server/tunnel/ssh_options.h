#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

// How to reach an account over SSH: plain data, made from a site file.
namespace itwin::server {

struct SshHost {
  std::string host;       // name or address
  int port = 22;
  std::string user = {};  // "": that of the options
};

// What a server asks in keyboard-interactive authentication, for example for a one-time code.
struct SshPrompt {
  std::string text;
  bool echo = false;  // what is answered is no secret
};
struct SshChallenge {
  std::string user;
  std::string host;
  std::string name;         // often ""
  std::string instruction;  // often ""
  std::vector<SshPrompt> prompts;
};
// One answer per prompt. Called on the thread that opens the connection; must end at the deadline.
using SshAnswerFunction =
    std::function<absl::StatusOr<std::vector<std::string>>(const SshChallenge& challenge, absl::Time deadline)>;

// Everything that is a secret stands in a file that is named here.
struct SshTunnelOptions {
  // Login nodes of one site: any of them will do, the last one that worked is taken first.
  std::vector<SshHost> hosts = {};
  std::string user = {};
  // Hosts to go through, in this order; the first is reached directly. Same credentials, same checks of host keys.
  std::vector<SshHost> jump = {};
  // For the account's shell at the far end (QuoteForShell makes words of anything). With a forced command the server
  // runs its own instead.
  std::string command = {};

  // Ways to log in, tried in this order as far as they are given and the server takes them: certificate with key, key,
  // agent, keyboard-interactive. A server may ask for several.
  std::string identity_file = {};     // private key, OpenSSH or PEM
  std::string passphrase_file = {};   // of that key; the first line counts
  std::string certificate_file = {};  // "": identity_file + "-cert.pub", where there is one
  bool use_agent = false;
  std::string agent_socket = {};  // "": $SSH_AUTH_SOCK
  SshAnswerFunction answers = nullptr;

  // Host keys are taken when the file has them (OpenSSH's format) or their fingerprint ("SHA256:...") is listed; any
  // other key is refused.
  std::string known_hosts_file = {};
  std::vector<std::string> fingerprints = {};

  // A link that has been silent for interval times count is given up; after each silent interval an answer is asked for.
  absl::Duration keepalive_interval = absl::Seconds(5);
  int keepalive_count = 3;
  absl::Duration connect_timeout = absl::Seconds(10);  // for each login node: name, TCP, key exchange, authentication
  std::string ciphers = {};                            // OpenSSH's names with commas; "": AES-GCM first
};

// Checks what can be checked without a connection: kInvalidArgument names the option.
absl::Status CheckSshOptions(const SshTunnelOptions& options);

// Answers by running a program: it gets the prompt as one line on its standard input (challenge name and instruction in
// ITWIN_SSH_NAME, ITWIN_SSH_INSTRUCTION, user and host in ITWIN_SSH_USER, ITWIN_SSH_HOST), and the first line that it prints is
// the answer. Once per prompt. Answers are never logged.
SshAnswerFunction AnswersFromProgram(std::vector<std::string> argv);

}  // namespace itwin::server
