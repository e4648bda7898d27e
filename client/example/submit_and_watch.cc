// Runs a program on the cluster, shows its metrics as they come, and fetches what it left in $ITWIN_OUTPUTS.
#include <iostream>

#include "itwin/client.h"

int main() {
  absl::StatusOr<itwin::client::Client> gateway = itwin::client::Connect();  // ITWIN_CONFIG says where
  if (!gateway.ok()) return std::cerr << gateway.status() << "\n", 2;

  itwin::v1::JobSpec spec;
  spec.set_name("example");
  for (const char* word : {"/bin/sh", "-c",
                           "echo '{\"step\":1,\"metrics\":{\"answer\":42}}' >> $ITWIN_METRICS; date > $ITWIN_OUTPUTS/now.txt"}) {
    spec.mutable_command()->add_argv(word);
  }
  auto submitted = gateway->Submit(spec);
  if (!submitted.ok()) return std::cerr << submitted.status() << "\n", 2;

  auto job = gateway->Watch(submitted->job().id(), {}, [](const itwin::v1::JobUpdate& update) {
    for (const auto& event : update.events()) std::cout << event.kind() << ": " << event.message() << "\n";
    for (const auto& block : update.blocks()) std::cout << block.series() << " = " << block.values(0) << "\n";
    return true;
  });
  if (!job.ok()) return std::cerr << job.status() << "\n", 2;
  auto outputs = gateway->Outputs(job->id());
  if (!outputs.ok()) return std::cerr << outputs.status() << "\n", 2;
  for (const auto& file : *outputs) {
    std::cout << gateway->DownloadInto(file, job->id()).value_or("cannot fetch " + file.path()) << "\n";
  }
  return job->state() == itwin::v1::JOB_STATE_SUCCEEDED ? 0 : 1;
}
