// The way to a site: SshTunnel over a real sshd on this machine, against OpenSSH's own programs in the same run.
//   tunnel_benchmark [NAME...]   all, or: bytes messages latency connect link
// Each figure is a line of JSON (figures.h). As `tunnel_benchmark --serve` it is the far end.
#include <grpcpp/grpcpp.h>
#include <grpcpp/server_posix.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <functional>
#include <iostream>
#include <map>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "itwin/agent/v1/agent.grpc.pb.h"
#include "server/dispatch/agent_client.h"
#include "server/tunnel/shell_quote.h"
#include "server/tunnel/ssh_tunnel.h"
#include "tests/benchmark/figures.h"
#include "tests/testing/sshd.h"
#include "tests/testing/tcp_proxy.h"

namespace itwin::benchmark {
namespace {

using server::SshStream;
using server::SshTunnel;
using server::SshTunnelOptions;
using testing::Sshd;

constexpr int kRuns = 5;
constexpr int64_t kBytes = int64_t{512} << 20;
constexpr int kPings = 3000;
constexpr size_t kChunk = 1 << 20;

template <typename T>
T ValueOrDie(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::cerr << value.status() << "\n";
    std::exit(1);
  }
  return std::move(value).value();
}
void OkOrDie(const absl::Status& status) {
  if (!status.ok()) {
    std::cerr << status << "\n";
    std::exit(1);
  }
}
absl::Time Soon() { return absl::Now() + absl::Minutes(2); }

double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(q * static_cast<double>(values.size())))];
}
double SecondsOf(const std::function<void()>& work) {
  const absl::Time start = absl::Now();
  work();
  return absl::ToDoubleSeconds(absl::Now() - start);
}

// ---- the far end ----

// The agent's calls without an agent behind them: takes what is sent, sends zeros.
class EmptyAgent : public agent::v1::Agent::Service {
  grpc::Status StatInputs(grpc::ServerContext*, const agent::v1::StatInputsRequest*, agent::v1::StatInputsResponse*) override {
    return grpc::Status::OK;
  }
  grpc::Status PutInput(grpc::ServerContext*, grpc::ServerReader<agent::v1::PutInputRequest>* reader, agent::v1::PutInputResponse*) override {
    agent::v1::PutInputRequest request;
    while (reader->Read(&request)) {
    }
    return grpc::Status::OK;
  }
  grpc::Status ReadFile(grpc::ServerContext*, const agent::v1::ReadFileRequest*, grpc::ServerWriter<agent::v1::ReadFileResponse>* writer) override {
    agent::v1::ReadFileResponse response;
    response.set_data(std::string(kChunk, '\0'));
    for (int64_t sent = 0; sent < kBytes; sent += kChunk) {
      if (!writer->Write(response)) break;
    }
    return grpc::Status::OK;
  }
};

void Copy(int from, int to) {
  std::vector<char> buffer(1 << 18);
  while (true) {
    const ssize_t got = read(from, buffer.data(), buffer.size());
    if (got <= 0) break;
    for (ssize_t at = 0; at < got;) {
      const ssize_t put = write(to, buffer.data() + at, static_cast<size_t>(got - at));
      if (put <= 0) return;
      at += put;
    }
  }
}

int Serve() {
  EmptyAgent service;
  grpc::ServerBuilder builder;
  builder.RegisterService(&service);
  builder.SetMaxReceiveMessageSize(32 << 20);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  int pair[2];
  ITWIN_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  ITWIN_CHECK(fcntl(pair[0], F_SETFL, O_NONBLOCK) == 0);
  grpc::AddInsecureChannelFromFd(server.get(), pair[0]);
  std::thread out([&] { Copy(pair[1], 1); });
  Copy(0, pair[1]);
  _exit(0);
}

// ---- this end ----

// Writes `count` zeros or reads until the end.
void SendZeros(int fd, int64_t count) {
  const std::string zeros(kChunk, '\0');
  while (count > 0) {
    const ssize_t sent = send(fd, zeros.data(), static_cast<size_t>(std::min<int64_t>(kChunk, count)), MSG_NOSIGNAL);
    if (sent > 0) count -= sent;
    pollfd entry{fd, POLLOUT, 0};
    if (sent < 0 && poll(&entry, 1, 60'000) != 1) std::exit(1);
  }
}
int64_t ReadToEnd(int fd) {
  std::vector<char> buffer(kChunk);
  int64_t count = 0;
  while (true) {
    pollfd entry{fd, POLLIN, 0};
    if (poll(&entry, 1, 60'000) != 1) std::exit(1);
    const ssize_t got = recv(fd, buffer.data(), buffer.size(), 0);
    if (got == 0 || (got < 0 && errno != EAGAIN)) return count;
    if (got > 0) count += got;
  }
}

std::vector<std::string> OpenSsh(const Sshd& sshd, const std::string& program) {
  return {program, program == "sftp" ? "-P" : "-p", absl::StrCat(sshd.port()), "-F", "/dev/null", "-i", sshd.client_key(), "-o", "IdentitiesOnly=yes",
          "-o", "BatchMode=yes", "-o", absl::StrCat("UserKnownHostsFile=", sshd.known_hosts())};
}

// Seconds of sftp for a file of kBytes, without its start.
double Sftp(const Sshd& sshd, bool up, double start_seconds) {
  const std::string batch = sshd.file("batch");
  testing::WriteText(batch, up ? absl::StrCat("put ", sshd.file("zeros"), " /dev/null\n") : absl::StrCat("get ", sshd.file("zeros"), " /dev/null\n"));
  std::vector<std::string> argv = OpenSsh(sshd, "sftp");
  argv.insert(argv.end(), {"-b", batch, "-q", absl::StrCat(testing::CurrentUser(), "@127.0.0.1")});
  return SecondsOf([&] { testing::MustRun(argv); }) - start_seconds;
}
double SshStartSeconds(const Sshd& sshd) {
  std::vector<std::string> argv = OpenSsh(sshd, "ssh");
  argv.insert(argv.end(), {absl::StrCat(testing::CurrentUser(), "@127.0.0.1"), "true"});
  return SecondsOf([&] { testing::MustRun(argv); });
}

void Bytes(const Sshd& sshd, bool messages) {
  testing::MustRun({"truncate", "-s", absl::StrCat(kBytes), sshd.file("zeros")});
  const double mib = static_cast<double>(kBytes) / (1 << 20);
  std::vector<double> up, down, sftp_up, sftp_down, up_ratio, down_ratio;
  const auto self = ValueOrDie(server::CommandLine({std::filesystem::read_symlink("/proc/self/exe").string(), "--serve"}));
  for (int run = 0; run < kRuns; ++run) {
    const auto tunnel = ValueOrDie(SshTunnel::Create(sshd.Options()));
    if (messages) {
      const auto stream = [&] { return std::unique_ptr<server::TunnelStream>(ValueOrDie(tunnel->OpenCommand(self, Soon()))); };
      const auto client = server::MakeGrpcAgentClient(stream());
      ValueOrDie(client->StatInputs({}, Soon()));
      up.push_back(mib / SecondsOf([&] {
        int64_t left = kBytes;
        OkOrDie(client->PutInput(std::string(64, '0'), kBytes, 0,
                                 [&]() -> absl::StatusOr<std::string> {
                                   if (left <= 0) return std::string();
                                   left -= kChunk;
                                   return std::string(kChunk, '\0');
                                 },
                                 absl::Minutes(1)));
      }));
      down.push_back(mib / SecondsOf([&] {
        OkOrDie(client->ReadFile("0-1", "outputs", "x", 0, [](absl::string_view) { return absl::OkStatus(); }, absl::Minutes(1)));
      }));
      client->Close();
    } else {
      auto sink = ValueOrDie(tunnel->OpenCommand("cat >/dev/null", Soon()));
      const FileDescriptor up_socket = sink->TakeSocket();
      up.push_back(mib / SecondsOf([&] {
        SendZeros(up_socket.get(), kBytes);
        shutdown(up_socket.get(), SHUT_WR);
        ITWIN_CHECK(sink->WaitForEnd(Soon()));
      }));
      auto source = ValueOrDie(tunnel->OpenCommand(absl::StrCat("head -c ", kBytes, " /dev/zero"), Soon()));
      const FileDescriptor down_socket = source->TakeSocket();
      down.push_back(mib / SecondsOf([&] { ITWIN_CHECK(ReadToEnd(down_socket.get()) == kBytes); }));
    }
    const double start = SshStartSeconds(sshd);
    sftp_up.push_back(mib / Sftp(sshd, true, start));
    sftp_down.push_back(mib / Sftp(sshd, false, start));
    up_ratio.push_back(up.back() / sftp_up.back());
    down_ratio.push_back(down.back() / sftp_down.back());
  }
  const std::string what = messages ? "messages" : "bytes";
  PrintFigure(absl::StrCat("tunnel_", what, "_up"), Median(up), "MiB/s", Median(sftp_up), kRuns, Median(up_ratio));
  PrintFigure(absl::StrCat("tunnel_", what, "_down"), Median(down), "MiB/s", Median(sftp_down), kRuns, Median(down_ratio));
}

void Latency(const Sshd& sshd) {
  const auto tunnel = ValueOrDie(SshTunnel::Create(sshd.Options("exec cat")));
  auto stream = ValueOrDie(tunnel->Open(Soon()));
  const FileDescriptor socket = stream->TakeSocket();
  std::vector<double> raw, calls;
  for (int i = 0; i < kPings; ++i) {
    raw.push_back(1e6 * SecondsOf([&] {
      char byte = 'x';
      ITWIN_CHECK(send(socket.get(), &byte, 1, MSG_NOSIGNAL) == 1);
      pollfd entry{socket.get(), POLLIN, 0};
      ITWIN_CHECK(poll(&entry, 1, 60'000) == 1 && recv(socket.get(), &byte, 1, 0) == 1);
    }));
  }
  const auto self = ValueOrDie(server::CommandLine({std::filesystem::read_symlink("/proc/self/exe").string(), "--serve"}));
  const auto client = server::MakeGrpcAgentClient(std::unique_ptr<server::TunnelStream>(ValueOrDie(tunnel->OpenCommand(self, Soon()))));
  for (int i = 0; i < kPings; ++i) calls.push_back(1e6 * SecondsOf([&] { ValueOrDie(client->StatInputs({}, Soon())); }));
  client->Close();
  PrintFigure("tunnel_round_trip_p50", Quantile(raw, 0.5), "us", 0, kPings);
  PrintFigure("tunnel_round_trip_p99", Quantile(raw, 0.99), "us", 0, kPings);
  PrintFigure("tunnel_call_p50", Quantile(calls, 0.5), "us", Quantile(raw, 0.5), kPings);
  PrintFigure("tunnel_call_p99", Quantile(calls, 0.99), "us", Quantile(raw, 0.99), kPings);
}

void Connect(const Sshd& sshd) {
  const auto tunnel = ValueOrDie(SshTunnel::Create(sshd.Options("exec cat")));
  std::vector<double> ours, theirs, ratio;
  for (int i = 0; i < 20; ++i) {
    ours.push_back(1e3 * SecondsOf([&] {
      auto stream = ValueOrDie(tunnel->Open(Soon()));
      const FileDescriptor socket = stream->TakeSocket();
      char byte = 'x';
      ITWIN_CHECK(send(socket.get(), &byte, 1, MSG_NOSIGNAL) == 1);
      pollfd entry{socket.get(), POLLIN, 0};
      ITWIN_CHECK(poll(&entry, 1, 60'000) == 1 && recv(socket.get(), &byte, 1, 0) == 1);
      stream->Close();
    }));
    theirs.push_back(1e3 * SshStartSeconds(sshd));
    ratio.push_back(ours.back() / theirs.back());
  }
  PrintFigure("tunnel_connect", Median(ours), "ms", Median(theirs), 20, Median(ratio));
}

// From the harm to the end of the stream, with the default keep-alive (5 s, 3 times).
void LinkLoss(const Sshd& sshd) {
  std::vector<double> cut, silent, back;
  for (int run = 0; run < kRuns; ++run) {
    for (const bool half_open : {false, true}) {
      if (half_open && run >= 2) continue;  // each takes the whole 15 s
      testing::TcpProxy proxy(sshd.port());
      SshTunnelOptions options = sshd.Options("exec cat");
      options.hosts = {{.host = "127.0.0.1", .port = proxy.port()}};
      options.fingerprints = {testing::FingerprintOfFile(sshd.host_key() + ".pub")};
      const auto tunnel = ValueOrDie(SshTunnel::Create(options));
      auto stream = ValueOrDie(tunnel->OpenCommand("exec cat", Soon()));
      const double seconds = SecondsOf([&] {
        half_open ? proxy.Silence() : proxy.Cut();
        ITWIN_CHECK(stream->WaitForEnd(Soon()));
      });
      if (half_open) {
        silent.push_back(seconds);
        continue;
      }
      cut.push_back(1e3 * seconds);
      proxy.Pass();
      back.push_back(1e3 * SecondsOf([&] { ValueOrDie(tunnel->Open(Soon())); }));
    }
  }
  PrintFigure("tunnel_cut_noticed", Median(cut), "ms", 0, kRuns);
  PrintFigure("tunnel_reconnect", Median(back), "ms", 0, kRuns);
  PrintFigure("tunnel_half_open_noticed", Median(silent), "s", 15, static_cast<int>(silent.size()));
}

int Run(int argc, char** argv) {
  const std::set<std::string> wanted(argv + 1, argv + argc);
  if (wanted.contains("--serve")) return Serve();
  const Sshd sshd({"Subsystem sftp internal-sftp"});
  const std::vector<std::pair<std::string, std::function<void()>>> parts = {
      {"bytes", [&] { Bytes(sshd, false); }},
      {"messages", [&] { Bytes(sshd, true); }},
      {"latency", [&] { Latency(sshd); }},
      {"connect", [&] { Connect(sshd); }},
      {"link", [&] { LinkLoss(sshd); }},
  };
  for (const auto& [name, part] : parts) {
    if (wanted.empty() || wanted.contains(name)) part();
  }
  return 0;
}

}  // namespace
}  // namespace itwin::benchmark

int main(int argc, char** argv) { return itwin::benchmark::Run(argc, argv); }
