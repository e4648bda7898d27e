#pragma once

#include <atomic>

#include "itwin/v1/artifacts.grpc.pb.h"
#include "server/artifacts/blob_store.h"
#include "server/rpc/authenticator.h"
#include "server/rpc/task_pool.h"

namespace itwin::server {

// itwin.v1.Artifacts. Both streams are callback reactors whose file operations run on `files`: an upload from a slow
// network then holds no thread, which a synchronous handler would do for as long as it takes. At most kMaxTransfers.
class ArtifactsRpc
    : public v1::Artifacts::WithCallbackMethod_UploadArtifact<
          v1::Artifacts::WithCallbackMethod_DownloadArtifact<v1::Artifacts::Service>> {
 public:
  struct Parts {  // all must outlive the server
    BlobStore* blobs;
    Authenticator* authenticator;
    TaskPool* files;
  };
  explicit ArtifactsRpc(const Parts& parts) : parts_(parts) {}

  grpc::Status StatArtifacts(grpc::ServerContext* context, const v1::StatArtifactsRequest* request,
                             v1::StatArtifactsResponse* response) override;
  grpc::ServerReadReactor<v1::UploadArtifactRequest>* UploadArtifact(grpc::CallbackServerContext* context,
                                                                     v1::UploadArtifactResponse* response) override;
  grpc::ServerWriteReactor<v1::DownloadArtifactResponse>* DownloadArtifact(
      grpc::CallbackServerContext* context, const v1::DownloadArtifactRequest* request) override;

 private:
  const Parts parts_;
  std::atomic<int> transfers_ = 0;
};

}  // namespace itwin::server
