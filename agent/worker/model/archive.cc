#include "agent/worker/model/archive.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <mutex>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr int kFormat = 1;
constexpr char kField[] = "train.model.archive";
constexpr char kScript[] = "script", kSample[] = "sample/", kWeights[] = "weights/";

WorkerError NoArchive(const std::string& file, const std::string& why) {
  return UserError(std::string(kField) + ": " + file + " is no model archive (" + why +
                   "); write one with itwin.export(model, …)");
}

// The texts in the header of a safetensors file.
Json ReadMetadata(const std::filesystem::path& path) {
  const std::string file = path.filename().string();
  std::ifstream in(path, std::ios::binary);
  unsigned char prefix[8] = {};
  if (!in.read(reinterpret_cast<char*>(prefix), sizeof(prefix))) throw NoArchive(file, "it is too short");
  uint64_t size = 0;
  for (int i = 7; i >= 0; --i) size = size << 8 | prefix[i];
  if (size > kMaxHeaderBytes || size > std::filesystem::file_size(path)) throw NoArchive(file, "its header is impossible");
  std::string text(size, '\0');
  if (!in.read(text.data(), static_cast<std::streamsize>(size))) throw NoArchive(file, "it is cut off");
  const Json header = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object() || !header.contains("__metadata__")) throw NoArchive(file, "it has no manifest");
  return header["__metadata__"];
}

Json ReadText(const Json& metadata, const char* key, const std::string& file) {
  if (!metadata.contains(key) || !metadata[key].is_string()) return nullptr;
  Json json = Json::parse(metadata[key].get<std::string>(), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) throw NoArchive(file, std::string(key) + " is not JSON");
  return json;
}

Json ReadManifest(const Json& metadata, const std::string& file) {
  Json manifest = ReadText(metadata, "itwin.manifest", file);
  if (!manifest.is_object()) throw NoArchive(file, "it has no manifest");
  const Json format = manifest.value("format", Json(0));
  if (format != kFormat) {
    throw UserError(std::string(kField) + ": " + file + " is of format " + format.dump() +
                    ", this worker reads format " + std::to_string(kFormat) +
                    "; export it with a matching itwin package");
  }
  return manifest;
}

std::string Number(double value) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return text;
}

}  // namespace

ModelArchive ReadModelArchive(const std::filesystem::path& path) {
  ModelArchive archive{.file = path.filename().string()};
  const Json metadata = ReadMetadata(path);
  archive.manifest = ReadManifest(metadata, archive.file);
  archive.graph = ReadText(metadata, "itwin.graph", archive.file);
  NamedTensors tensors;
  try {
    tensors = ReadSafetensors(path);
  } catch (const WorkerError& error) {
    if (error.failure != FailureClass::kApp) throw;
    throw NoArchive(archive.file, error.what());
  }
  for (auto& [name, tensor] : tensors) {
    if (name == kScript) {
      const at::Tensor bytes = tensor.contiguous();
      archive.script.assign(static_cast<const char*>(bytes.data_ptr()), bytes.nbytes());
    } else if (name.starts_with(kSample)) {
      archive.sample[name.substr(sizeof(kSample) - 1)] = tensor;
    } else if (name.starts_with(kWeights)) {
      archive.weights.emplace_back(name.substr(sizeof(kWeights) - 1), tensor);
    }
  }
  if (archive.graph.is_null() == archive.script.empty()) {
    throw NoArchive(archive.file, "it must hold either a graph or a scripted module");
  }
  return archive;
}

nlohmann::json WithArchive(nlohmann::json job, const std::filesystem::path& work_dir) {
  if (!job.is_object() || !job.contains("train") || !job["train"].is_object()) return job;
  Json& train = job["train"];
  if (!train.contains("model") || !train["model"].is_object()) return job;
  const Json name = train["model"].value("archive", Json());
  if (!name.is_string() || name.get<std::string>().empty()) return job;
  const std::filesystem::path path = ResolveFile(name.get<std::string>(), work_dir, kField);
  const Json manifest = ReadManifest(ReadMetadata(path), path.filename().string());
  const auto given = manifest.find("train");
  if (given == manifest.end() || !given->is_object()) return job;
  for (const auto& [key, value] : given->items()) {
    if (!train.contains(key)) train[key] = value;
  }
  return job;
}

void ShakeHands(Model& model, const ModelArchive& archive) {
  const Json expected = archive.manifest.value("handshake", Json::object());
  if (archive.sample.empty() || !expected.is_object()) return;
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const at::Tensor random = generator.get_state();
  std::vector<std::pair<at::Tensor, at::Tensor>> buffers;  // and what they held
  for (const auto& [name, buffer] : model.buffers()) buffers.emplace_back(buffer, buffer.detach().clone());
  const auto restore = [&] {
    const at::NoGradGuard no_grad;
    for (auto& [buffer, before] : buffers) buffer.copy_(before);
    generator.set_state(random);
    model.Train(true);
  };
  const auto compare = [&](const char* key, const char* mode, bool training) {
    const Json recorded = expected.value(key, Json());
    if (!recorded.is_number()) return;
    model.Train(training);
    double here = 0;
    {
      const at::NoGradGuard no_grad;
      here = (training ? model.TrainingStep(archive.sample) : model.EvaluationStep(archive.sample)).loss.item<double>();
    }
    const double there = recorded.get<double>();
    if (std::abs(here - there) <= kHandshakeAbsolute + kHandshakeRelative * std::abs(there)) return;
    throw UserError(std::string(kField) + ": the model of " + archive.file +
                    " does not compute here what it computed when it was exported: on the sample batch the loss in " +
                    mode + " mode is " + Number(here) + ", and was " + Number(there) + " (torch " +
                    archive.manifest.value("torch", std::string("of unknown version")) +
                    "); the tolerance is 1e-5 + 1e-4 of it. Check that the job's loss and its options are those of the export");
  };
  try {
    compare("loss", "evaluation", false);
    compare("training_loss", "training", true);
  } catch (...) {
    restore();
    throw;
  }
  restore();
}

}  // namespace itwin::worker
