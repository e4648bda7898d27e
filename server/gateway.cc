#include "server/gateway.h"

#include <errno.h>
#include <limits.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "common/clock.h"
#include "common/files.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "common/version.h"
#include "server/artifacts/blob_store.h"
#include "server/dispatch/site_board.h"
#include "server/init.h"
#include "server/jobs/event_hub.h"
#include "server/jobs/housekeeper.h"
#include "server/jobs/job_service.h"
#include "server/rpc/artifacts_rpc.h"
#include "server/rpc/authenticator.h"
#include "server/rpc/jobs_rpc.h"
#include "server/rpc/limits.h"
#include "server/rpc/sites_rpc.h"
#include "server/rpc/task_pool.h"
#include "server/sites/site_registry.h"
#include "server/store/sqlite_job_store.h"

namespace itwin::server {
namespace {

constexpr absl::Duration kShutdownLimit = absl::Seconds(5);  // for calls under way
constexpr int kCompletionQueues = 2;
constexpr int kFeederThreads = 4;
constexpr int kFileThreads = 4;
constexpr int kSiteThreads = 4;  // sites that are being added or examined at once
constexpr int kKeepaliveMs = 60'000;
constexpr int kMinPingIntervalMs = 5'000;

// One gateway per data directory. The file holds the process id, for people and for `stop`.
absl::StatusOr<FileDescriptor> LockDirectory(const DataDirectory& data) {
  const std::string path = data.run("lock");
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor lock, OpenFile(path, O_RDWR | O_CREAT, 0600));
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return ErrnoStatus(errno, path);
    const auto pid = ReadFile(data.run("pid"), 64);
    const std::string who = pid.ok() ? absl::StrCat(" (process ", absl::StripAsciiWhitespace(*pid), ")") : "";
    return absl::FailedPreconditionError(absl::StrCat("another itwin-gateway", who, " serves ", data.root,
                                                      "; stop it with: itwin-gateway stop --data ", data.root));
  }
  return lock;
}

std::string OwnHost() {
  char name[HOST_NAME_MAX + 1] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

absl::Status CheckInitialised(const DataDirectory& data) {
  for (const std::string& path : {data.database(), data.tls("server.key"), data.tls("server.pem")}) {
    if (access(path.c_str(), F_OK) != 0) {
      return absl::FailedPreconditionError(absl::StrCat(path, " is missing; run first: itwin-gateway init --data ", data.root));
    }
  }
  return absl::OkStatus();
}

// Fixed for a data directory, another one for a copy of it: its database is another file, or on another machine.
std::string PlaceOf(const DataDirectory& data) {
  struct stat info {};
  ::stat(data.database().c_str(), &info);
  const absl::StatusOr<std::string> machine = ReadFile("/etc/machine-id", 256);
  return absl::StrCat(machine.ok() ? std::string(absl::StripAsciiWhitespace(*machine)) : OwnHost(), "-", info.st_dev, "-",
                      info.st_ino);
}

std::string LabelOf(const DataDirectory& data) {
  std::error_code error;
  const std::filesystem::path path = std::filesystem::absolute(data.root, error);
  return absl::StrCat(OwnHost(), ":", error ? data.root : path.lexically_normal().string());
}

}  // namespace

struct Gateway::Parts {
  DataDirectory data;
  FileDescriptor lock;
  SystemClock clock;
  std::unique_ptr<SqliteJobStore> store;
  std::unique_ptr<BlobStore> blobs;
  std::unique_ptr<EventHub> hub;
  std::unique_ptr<SiteBoard> board;
  std::unique_ptr<GatewayPrograms> programs;
  std::unique_ptr<SiteRegistry> sites;
  std::unique_ptr<JobService> jobs;
  std::unique_ptr<Housekeeper> housekeeper;
  std::unique_ptr<TokenAuthenticator> authenticator;
  std::unique_ptr<TaskPool> feeders;
  std::unique_ptr<TaskPool> files;
  std::unique_ptr<TaskPool> surveys;
  std::unique_ptr<JobsRpc> jobs_rpc;
  std::unique_ptr<ArtifactsRpc> artifacts_rpc;
  std::unique_ptr<SitesRpc> sites_rpc;
  std::unique_ptr<grpc::Server> server;
  int port = 0;
  std::string endpoint;
  bool stopped = false;

  absl::Status Open(const Options& options);
  absl::Status OpenSites(const Options& options);
  absl::Status Serve(const GatewayConfig& config);
  void Stop();
};

absl::Status Gateway::Parts::Open(const Options& options) {
  const GatewayConfig& config = options.config;
  data.root = options.data;
  ITWIN_RETURN_IF_ERROR(CheckInitialised(data));
  ITWIN_ASSIGN_OR_RETURN(lock, LockDirectory(data));

  SqliteJobStore::Options store_options;
  store_options.path = data.database();
  store_options.log_mirror_bytes = int64_t{config.log_mirror_mib} << 20;
  store_options.max_live_jobs_per_owner = config.live_jobs_per_owner;
  ITWIN_ASSIGN_OR_RETURN(store, SqliteJobStore::Open(store_options));
  BlobStore::Options blob_options;
  blob_options.directory = data.root;
  ITWIN_ASSIGN_OR_RETURN(blobs, BlobStore::Open(blob_options));
  hub = std::make_unique<EventHub>(EventHub::Options{.max_watchers = kMaxWatchers}, &clock);
  store->AddListener(hub.get());

  ITWIN_RETURN_IF_ERROR(OpenSites(options));
  jobs = std::make_unique<JobService>(store.get(), blobs.get(), board.get());
  ITWIN_RETURN_IF_ERROR(Serve(config));
  sites->Start();
  housekeeper = std::make_unique<Housekeeper>(Housekeeper::Options{.job_retention = config.job_retention}, store.get(), &clock);
  housekeeper->Start();

  ITWIN_RETURN_IF_ERROR(UpdateClientEndpoint(data, endpoint));
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(data.run("pid"), absl::StrCat(getpid(), "\n")));
  // Last: whoever waits for this file finds a gateway that serves.
  return WriteFileAtomically(data.run("endpoint"), endpoint + "\n");
}

absl::Status Gateway::Parts::OpenSites(const Options& options) {
  const GatewayConfig& config = options.config;
  // Without an agent to give, sites that bring their own still work.
  std::string agent = options.agent_program;
  if (agent.empty()) {
    absl::StatusOr<std::string> found = FindAgentProgram();
    if (found.ok()) {
      agent = *std::move(found);
    } else if (config.local.enabled) {
      return found.status();
    }
  }
  const std::string worker = agent.empty() ? "" : (std::filesystem::path(agent).parent_path() / "itwin-worker").string();
  programs = std::make_unique<GatewayPrograms>(agent, access(worker.c_str(), X_OK) == 0 ? worker : "");
  std::vector<SiteFile> configured;
  ITWIN_RETURN_IF_ERROR(MakeDirectories(data.sites(), 0700));
  if (config.local.enabled) {
    SiteFile& local = configured.emplace_back();
    local.name = "local";
    local.settings.scheduler = "process";
    local.max_waiting = config.local.max_waiting;
    local.spool_retention = config.local.spool_retention;
    ITWIN_RETURN_IF_ERROR(MakeDirectories(data.site("local"), 0700));
    local.command = {agent, "connect", "--root", data.site("local"), "--log-level", config.log_level};
    if (config.local.slots > 0) {
      local.command.insert(local.command.end(), {"--slots", absl::StrCat(config.local.slots)});
    }
    if (!config.local.launcher.empty()) {
      local.command.insert(local.command.end(), {"--launcher", config.local.launcher});
    }
  }
  configured.insert(configured.end(), config.sites.begin(), config.sites.end());
  board = std::make_unique<SiteBoard>();
  sites = std::make_unique<SiteRegistry>(
      SiteRegistry::Options{.directory = data.sites(), .gateway_id = store->gateway_id(),
                            .gateway_place = PlaceOf(data),
                            .gateway_label = LabelOf(data)},
      SiteRegistry::Dependencies{store.get(), blobs.get(), board.get(), &clock, programs.get()});
  return sites->Open(std::move(configured));
}

absl::Status Gateway::Parts::Serve(const GatewayConfig& config) {
  ITWIN_ASSIGN_OR_RETURN(const HostAndPort listen, ParseListen(config.listen));
  authenticator = std::make_unique<TokenAuthenticator>(store.get());
  feeders = std::make_unique<TaskPool>(kFeederThreads);
  files = std::make_unique<TaskPool>(kFileThreads);
  jobs_rpc = std::make_unique<JobsRpc>(
      JobsRpc::Parts{jobs.get(), store.get(), hub.get(), authenticator.get(), feeders.get()});
  artifacts_rpc = std::make_unique<ArtifactsRpc>(ArtifactsRpc::Parts{blobs.get(), authenticator.get(), files.get()});
  surveys = std::make_unique<TaskPool>(kSiteThreads);
  sites_rpc = std::make_unique<SitesRpc>(SitesRpc::Parts{board.get(), sites.get(), authenticator.get(), surveys.get()}, absl::Now());

  grpc::SslServerCredentialsOptions tls(GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
  ITWIN_ASSIGN_OR_RETURN(pair.private_key, ReadFile(data.tls("server.key")));
  ITWIN_ASSIGN_OR_RETURN(pair.cert_chain, ReadFile(data.tls("server.pem")));
  tls.pem_key_cert_pairs.push_back(std::move(pair));

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(config.listen, grpc::SslServerCredentials(tls), &port);
  builder.RegisterService(jobs_rpc.get());
  builder.RegisterService(artifacts_rpc.get());
  builder.RegisterService(sites_rpc.get());
  builder.SetMaxReceiveMessageSize(kMaxReceiveMessageBytes);
  builder.SetResourceQuota(grpc::ResourceQuota("gateway").SetMaxThreads(config.rpc_threads));
  // Threads that have answered wait for the next call. gRPC's default keeps two; with handlers that wait for the disk it
  // would make and end a thread for almost every call.
  builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, kCompletionQueues);
  builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, config.rpc_threads / 2 / kCompletionQueues);
  // Two gateways on one port would share its clients between them.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Watchers whose machine went away are noticed; clients may ask for the same.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kMinPingIntervalMs);
  server = builder.BuildAndStart();
  if (server == nullptr || port == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen at ", config.listen,
                                               "; is the port taken? Choose another with --listen, port 0 for any"));
  }
  endpoint = ClientEndpoint(listen.host, port);
  return absl::OkStatus();
}

void Gateway::Parts::Stop() {
  if (stopped) return;
  stopped = true;
  if (server) ::unlink(data.run("endpoint").c_str());
  if (hub) hub->Close();  // ends the watch streams
  if (sites) sites->EndSurveys();
  if (server) {
    server->Shutdown(absl::ToChronoTime(absl::Now() + kShutdownLimit));
    server->Wait();
  }
  housekeeper.reset();
  if (sites) sites->Stop();
  surveys.reset();
  feeders.reset();
  files.reset();
  server.reset();
  sites.reset();
  if (store && hub) store->RemoveListener(hub.get());
  if (lock.valid()) ::unlink(data.run("pid").c_str());
  store.reset();
  lock.Reset();
}

absl::StatusOr<std::unique_ptr<Gateway>> Gateway::Create(const Options& options) {
  auto parts = std::make_unique<Parts>();
  std::unique_ptr<Gateway> gateway(new Gateway(std::move(parts)));
  ITWIN_RETURN_IF_ERROR(gateway->parts_->Open(options));
  return gateway;
}

Gateway::Gateway(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Gateway::~Gateway() { Stop(); }
int Gateway::port() const { return parts_->port; }
const std::string& Gateway::endpoint() const { return parts_->endpoint; }
void Gateway::Stop() { parts_->Stop(); }

absl::StatusOr<std::string> FindAgentProgram() {
  std::error_code error;
  const std::filesystem::path own = std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
  const std::filesystem::path places[] = {own / "itwin-agent", own.parent_path() / "libexec" / "itwin" / "itwin-agent"};
  for (const std::filesystem::path& place : places) {
    if (access(place.c_str(), X_OK) == 0) return place.lexically_normal().string();
  }
  return absl::NotFoundError(absl::StrCat("itwin-agent is neither at ", places[0].string(), " nor at ", places[1].string(),
                                          "; install it there, or switch the embedded site off (local.enabled: false)"));
}

}  // namespace itwin::server
