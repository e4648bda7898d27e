#include "server/rpc/artifacts_rpc.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "server/rpc/limits.h"

namespace itwin::server {
namespace {

constexpr int kMaxStats = 10'000;  // hashes in one StatArtifacts

// One of kMaxTransfers places.
class TransferPlace {
 public:
  explicit TransferPlace(std::atomic<int>* count) : count_(*count) { taken_ = count_.fetch_add(1) < kMaxTransfers; }
  ~TransferPlace() { count_.fetch_sub(1); }
  absl::Status status() const {
    if (taken_) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat(kMaxTransfers, " uploads and downloads are under way, the most that are allowed; try again in a moment"));
  }

 private:
  std::atomic<int>& count_;
  bool taken_;
};

// One upload: a read is under way, or a file task; Finish is called by the task only.
class UploadReactor : public grpc::ServerReadReactor<v1::UploadArtifactRequest> {
 public:
  UploadReactor(const ArtifactsRpc::Parts& parts, std::atomic<int>* transfers, grpc::CallbackServerContext* context,
                v1::UploadArtifactResponse* response)
      : parts_(parts), place_(transfers), context_(*context), response_(*response) {
    parts_.files->Post([this] {
      absl::Status status = place_.status();
      if (status.ok()) status = parts_.authenticator->Authenticate(context_).status();
      if (!status.ok()) return Finish(ToGrpc(status));
      StartRead(&request_);
    });
  }

  void OnReadDone(bool ok) override {
    parts_.files->Post([this, ok] {
      absl::Status status = ok ? Store() : Commit();
      if (status.ok() && ok) return StartRead(&request_);
      writer_.reset();  // before the caller hears: it may go on at once
      Finish(ToGrpc(status));
    });
  }

  void OnDone() override { delete this; }

 private:
  absl::Status Store() {
    if (writer_ == nullptr) {
      ITWIN_ASSIGN_OR_RETURN(writer_, parts_.blobs->OpenWriter(request_.sha256(), request_.size_bytes(), request_.offset()));
      response_.set_sha256(request_.sha256());
      response_.set_size_bytes(request_.size_bytes());
    } else if (!request_.sha256().empty() || request_.size_bytes() != 0 || request_.offset() != 0) {
      return absl::InvalidArgumentError("sha256, size_bytes and offset belong into the first message only");
    }
    if (request_.data().size() > static_cast<size_t>(kTransferChunkBytes)) {
      return absl::InvalidArgumentError(
          absl::StrCat("data: ", request_.data().size(), " bytes; send at most ", kTransferChunkBytes, " in one message"));
    }
    return writer_->Append(request_.data());
  }

  // The caller has closed its side, or has gone: then bytes are missing and the part stays for a resume.
  absl::Status Commit() {
    if (context_.IsCancelled()) return absl::CancelledError("the upload was broken off");
    if (writer_ == nullptr) return absl::InvalidArgumentError("an upload begins with sha256, size_bytes and offset");
    return writer_->Commit();
  }

  const ArtifactsRpc::Parts& parts_;
  const TransferPlace place_;
  grpc::CallbackServerContext& context_;
  v1::UploadArtifactResponse& response_;
  v1::UploadArtifactRequest request_;
  std::unique_ptr<BlobStore::Writer> writer_;
};

class DownloadReactor : public grpc::ServerWriteReactor<v1::DownloadArtifactResponse> {
 public:
  DownloadReactor(const ArtifactsRpc::Parts& parts, std::atomic<int>* transfers, grpc::CallbackServerContext* context,
                  const v1::DownloadArtifactRequest& request)
      : parts_(parts), place_(transfers), context_(*context), request_(request), offset_(request.offset()) {
    parts_.files->Post([this] {
      if (absl::Status status = Open(); !status.ok()) return Finish(ToGrpc(status));
      Send();
    });
  }

  void OnWriteDone(bool ok) override {
    parts_.files->Post([this, ok] {
      if (!ok) return Finish(grpc::Status::CANCELLED);
      Send();
    });
  }

  void OnDone() override { delete this; }

 private:
  absl::Status Open() {
    ITWIN_RETURN_IF_ERROR(place_.status());
    ITWIN_RETURN_IF_ERROR(parts_.authenticator->Authenticate(context_).status());
    ITWIN_ASSIGN_OR_RETURN(reader_, parts_.blobs->OpenReader(request_.sha256()));
    if (offset_ < 0 || offset_ > reader_->size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("offset: ", offset_, " is outside the artifact's ", reader_->size(), " bytes"));
    }
    return absl::OkStatus();
  }

  void Send() {
    const bool first = !sent_;
    if (!first && offset_ >= reader_->size()) return Finish(grpc::Status::OK);
    absl::StatusOr<std::string> bytes = reader_->Read(offset_, kTransferChunkBytes);
    if (!bytes.ok()) return Finish(ToGrpc(bytes.status()));
    offset_ += static_cast<int64_t>(bytes->size());
    response_.set_size_bytes(first ? reader_->size() : 0);
    response_.set_data(*std::move(bytes));
    sent_ = true;
    StartWrite(&response_);
  }

  const ArtifactsRpc::Parts& parts_;
  const TransferPlace place_;
  grpc::CallbackServerContext& context_;
  const v1::DownloadArtifactRequest request_;
  std::optional<BlobStore::Reader> reader_;
  v1::DownloadArtifactResponse response_;
  int64_t offset_;
  bool sent_ = false;
};

}  // namespace

grpc::Status ArtifactsRpc::StatArtifacts(grpc::ServerContext* context, const v1::StatArtifactsRequest* request,
                                         v1::StatArtifactsResponse* response) {
  absl::StatusOr<Caller> caller = parts_.authenticator->Authenticate(*context);
  if (!caller.ok()) return ToGrpc(caller.status());
  if (request->sha256_size() > kMaxStats) {
    return ToGrpc(absl::InvalidArgumentError(absl::StrCat("sha256: at most ", kMaxStats, " in one call")));
  }
  for (const std::string& sha256 : request->sha256()) {
    absl::StatusOr<BlobStore::Stat> stat = parts_.blobs->StatBlob(sha256);
    if (!stat.ok()) return ToGrpc(stat.status());
    v1::ArtifactStatus& status = *response->add_artifacts();
    status.set_sha256(sha256);
    status.set_complete(stat->complete);
    status.set_size_bytes(stat->size_bytes);
    status.set_received_bytes(stat->received_bytes);
  }
  return grpc::Status::OK;
}

grpc::ServerReadReactor<v1::UploadArtifactRequest>* ArtifactsRpc::UploadArtifact(grpc::CallbackServerContext* context,
                                                                                 v1::UploadArtifactResponse* response) {
  return new UploadReactor(parts_, &transfers_, context, response);
}

grpc::ServerWriteReactor<v1::DownloadArtifactResponse>* ArtifactsRpc::DownloadArtifact(
    grpc::CallbackServerContext* context, const v1::DownloadArtifactRequest* request) {
  return new DownloadReactor(parts_, &transfers_, context, *request);
}

}  // namespace itwin::server
