#include "agent/worker/checkpoint/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <vector>

#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/sha256.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr int kFormat = 1;
constexpr char kManifest[] = "manifest.json";
constexpr char kWeights[] = "weights.safetensors";
constexpr char kOptimizer[] = "optimizer.safetensors";

std::string RankFile(int rank) { return "rank-" + std::to_string(rank) + ".safetensors"; }

// As text: JSON has no NaN, and a mean may be one.
std::string ExactText(double value) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.17g", value);
  return text;
}

// n of "step-<n>", or nothing.
std::optional<int64_t> StepOf(const fs::path& directory) {
  const std::string name = directory.filename().string();
  constexpr std::string_view kPrefix = "step-";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  int64_t step = 0;
  const char* end = name.data() + name.size();
  const auto [at, error] = std::from_chars(name.data() + kPrefix.size(), end, step);
  if (error != std::errc() || at != end) return std::nullopt;
  return step;
}

// Step directories, newest first.
std::vector<fs::path> ListSteps(const fs::path& directory) {
  std::vector<std::pair<int64_t, fs::path>> found;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (const auto step = StepOf(it->path())) found.emplace_back(*step, it->path());
  }
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<fs::path> paths;
  for (auto& [step, path] : found) paths.push_back(std::move(path));
  return paths;
}

Json ReadManifest(const fs::path& step_directory) {
  Json manifest =
      Json::parse(ReadWholeFile(step_directory / kManifest), nullptr, /*allow_exceptions=*/false);
  if (!manifest.is_object() || !manifest.contains("format")) {
    throw AppError((step_directory / kManifest).string() + " is not a manifest");
  }
  if (manifest["format"] != kFormat) {
    throw AppError((step_directory / kManifest).string() + " has format " +
                   manifest["format"].dump() + "; this worker reads format " +
                   std::to_string(kFormat));
  }
  const Json checksum = manifest.value("manifest_sha256", Json());
  manifest.erase("manifest_sha256");
  if (checksum != Sha256Hex(manifest.dump())) {
    throw AppError((step_directory / kManifest).string() + " does not have its own checksum");
  }
  return manifest;
}

// Throws AppError that says what is wrong.
void Verify(const fs::path& step_directory) {
  const Json manifest = ReadManifest(step_directory);
  try {
    for (const auto& file : manifest.at("files")) {
      const fs::path path = step_directory / file.at("path").get<std::string>();
      const FileDigest digest = DigestFile(path);
      if (digest.size != file.at("size").get<int64_t>()) {
        throw AppError(path.string() + " has " + std::to_string(digest.size) +
                       " bytes instead of " + file.at("size").dump());
      }
      if (digest.sha256 != file.at("sha256").get<std::string>()) {
        throw AppError(path.string() + " does not have the checksum of the manifest");
      }
    }
  } catch (const nlohmann::json::exception&) {
    throw AppError((step_directory / kManifest).string() + " is malformed");
  }
}

// Path of the newest sound checkpoint, or "" with the reasons in `problems`.
fs::path FindNewest(const fs::path& directory, std::vector<std::string>& problems) {
  std::error_code error;
  std::vector<fs::path> candidates;
  if (fs::exists(directory / kManifest, error)) {
    candidates = {directory};
  } else {
    candidates = ListSteps(directory);
  }
  for (const fs::path& candidate : candidates) {
    try {
      Verify(candidate);
      return candidate;
    } catch (const WorkerError& e) {
      problems.push_back(e.what());
    }
  }
  return {};
}

CheckpointContents Read(const fs::path& directory, int rank, int world_size) {
  const Json manifest = ReadManifest(directory);
  CheckpointContents c;
  try {
    c.position.step = manifest.at("step").get<int64_t>();
    c.position.epoch = manifest.at("epoch").get<int64_t>();
    c.position.next_batch = manifest.at("next_batch").get<int64_t>();
    c.position.epoch_loss_sum =
        std::strtod(manifest.at("epoch_loss_sum").get_ref<const std::string&>().c_str(), nullptr);
    c.position.epoch_samples = manifest.at("epoch_samples").get<int64_t>();
    c.world_size = manifest.at("world_size").get<int>();
    c.seed = manifest.at("seed").get<uint64_t>();
    c.spec_sha256 = manifest.at("spec_sha256").get<std::string>();
    c.weights_sha256 = manifest.at("weights_sha256").get<std::string>();
  } catch (const nlohmann::json::exception&) {
    throw AppError((directory / kManifest).string() + " is malformed");
  }
  c.weights = ReadSafetensors(directory / kWeights);
  c.optimizer = ReadSafetensors(directory / kOptimizer);
  if (c.world_size == world_size) c.of_rank = ReadSafetensors(directory / RankFile(rank));
  return c;
}

}  // namespace

CheckpointStore::CheckpointStore(fs::path directory, int keep, Communicator& communicator)
    : directory_(std::move(directory)), keep_(keep), communicator_(communicator) {}

fs::path CheckpointStore::Save(const CheckpointContents& contents) {
  const bool first = communicator_.rank() == 0;
  const fs::path final_path = directory_ / ("step-" + std::to_string(contents.position.step));
  fs::path partial = final_path;
  partial += ".partial";
  std::error_code ignored;
  if (first) {
    fs::remove_all(partial, ignored);
    MakeDirectories(partial);
  }
  communicator_.Barrier()->Wait();

  struct Digest {
    int64_t size = 0;
    char sha256[64] = {};
  };
  const auto describe = [&](const std::string& name) {
    const FileDigest digest = DigestFile(partial / name);
    return Json{{"path", name}, {"size", digest.size}, {"sha256", digest.sha256}};
  };
  WriteSafetensors(partial / RankFile(communicator_.rank()), contents.of_rank);
  const FileDigest file = DigestFile(partial / RankFile(communicator_.rank()));
  Digest mine{.size = file.size};
  std::memcpy(mine.sha256, file.sha256.data(), sizeof(mine.sha256));
  Json files = Json::array();
  if (first) {
    WriteSafetensors(partial / kWeights, contents.weights);
    WriteSafetensors(partial / kOptimizer, contents.optimizer);
    files.push_back(describe(kWeights));
    files.push_back(describe(kOptimizer));
  }
  std::vector<Digest> all(communicator_.size());
  communicator_
      .AllGather(
          BufferOf(std::span(reinterpret_cast<char*>(&mine), sizeof(mine))),
          BufferOf(std::span(reinterpret_cast<char*>(all.data()), all.size() * sizeof(Digest))))
      ->Wait();
  if (first) {
    for (size_t r = 0; r < all.size(); ++r) {
      files.push_back({{"path", RankFile(static_cast<int>(r))},
                       {"size", all[r].size},
                       {"sha256", std::string(all[r].sha256, sizeof(all[r].sha256))}});
    }
    const Position& at = contents.position;
    Json manifest = {{"format", kFormat},
                     {"step", at.step},
                     {"epoch", at.epoch},
                     {"next_batch", at.next_batch},
                     {"epoch_loss_sum", ExactText(at.epoch_loss_sum)},
                     {"epoch_samples", at.epoch_samples},
                     {"world_size", contents.world_size},
                     {"seed", contents.seed},
                     {"spec_sha256", contents.spec_sha256},
                     {"weights_sha256", contents.weights_sha256},
                     {"files", files}};
    manifest["manifest_sha256"] = Sha256Hex(manifest.dump());
    WriteFileDurably(partial / kManifest, manifest.dump(2) + "\n");
    fs::remove_all(final_path, ignored);  // of an earlier attempt in the same place
    fs::rename(partial, final_path, ignored);
    if (ignored) ThrowIoError("cannot create", final_path, ignored.value());
    SyncDirectory(directory_);
    DeleteOld();
  }
  communicator_.Barrier()->Wait();
  return final_path;
}

void CheckpointStore::DeleteOld() {
  std::vector<fs::path> steps = ListSteps(directory_);
  std::error_code ignored;
  for (size_t i = static_cast<size_t>(keep_); i < steps.size(); ++i) {
    // The manifest goes first: a half-deleted checkpoint must not look like one.
    fs::remove(steps[i] / kManifest, ignored);
    fs::remove_all(steps[i], ignored);
  }
}

CheckpointContents LoadNewestCheckpoint(const fs::path& directory, Communicator& communicator,
                                        const std::function<void(const std::string&)>& warn) {
  std::vector<std::string> problems;
  std::string found;
  if (communicator.rank() == 0) {
    found = FindNewest(directory, problems).string();
    for (const std::string& problem : problems) warn(problem);
  }
  found = BroadcastText(communicator, found, 0);
  if (found.empty()) {
    int64_t any = static_cast<int64_t>(problems.size());
    communicator.Broadcast(BufferOf(std::span(&any, 1)), 0)->Wait();
    if (any == 0)
      throw UserError("there is no checkpoint in " + directory.string() + " to go on from");
    throw AppError("none of the " + std::to_string(any) + " checkpoints in " + directory.string() +
                   " is sound" + (problems.empty() ? "" : "; the newest: " + problems.front()));
  }
  return Read(found, communicator.rank(), communicator.size());
}

}  // namespace itwin::worker
