#include "agent/worker/checkpoint/checkpoint.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <utility>

#include <ATen/ops/from_blob.h>

#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/sha256.h"
#include "agent/worker/dist/gather_texts.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr int kFormat = 2;  // 1 had one checksum per file; it is read, too
constexpr char kManifest[] = "manifest.json";
constexpr char kWeights[] = "weights.safetensors";
constexpr char kOptimizer[] = "optimizer.safetensors";

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string RankFile(int rank) { return "rank-" + std::to_string(rank) + ".safetensors"; }

// As text: JSON has no NaN, and a mean may be one.
std::string ExactText(double value) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.17g", value);
  return text;
}

std::string StepName(int64_t step) { return "step-" + std::to_string(step); }

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
  if (manifest["format"] != kFormat && manifest["format"] != 1) {
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

// Throws AppError that says what is wrong with those pieces of the files that this rank looks at.
void Verify(const fs::path& step_directory, int rank, int ranks) {
  const Json manifest = ReadManifest(step_directory);
  try {
    size_t piece_number = 0;
    for (const auto& file : manifest.at("files")) {
      const fs::path path = step_directory / file.at("path").get<std::string>();
      const auto size = file.at("size").get<int64_t>();
      std::error_code error;
      const auto found = static_cast<int64_t>(fs::file_size(path, error));
      if (error) ThrowIoError("cannot read", path, error.value());
      if (found != size) {
        throw AppError(path.string() + " has " + std::to_string(found) + " bytes instead of " +
                       std::to_string(size));
      }
      const Json whole = Json::array({{{"offset", 0}, {"size", size}}});
      int64_t next = 0;
      for (const auto& piece : file.contains("pieces") ? file.at("pieces") : whole) {
        const auto offset = piece.at("offset").get<int64_t>();
        const auto bytes = piece.at("size").get<int64_t>();
        if (offset != next) throw AppError(path.string() + " has bytes without a checksum");
        next = offset + bytes;
        if (piece_number++ % static_cast<size_t>(ranks) != static_cast<size_t>(rank)) continue;
        const auto& wanted = (piece.contains("sha256") ? piece : file).at("sha256");
        if (DigestPiece(path, offset, bytes) != wanted.get<std::string>()) {
          throw AppError(path.string() + " does not have the checksum of the manifest");
        }
      }
      if (next != size) throw AppError(path.string() + " has bytes without a checksum");
    }
  } catch (const nlohmann::json::exception&) {
    throw AppError((step_directory / kManifest).string() + " is malformed");
  }
}

std::vector<fs::path> Candidates(const fs::path& directory) {
  std::error_code error;
  if (fs::exists(directory / kManifest, error)) return {directory};
  return ListSteps(directory);
}

CheckpointContents Read(const fs::path& directory, int rank, int world_size) {
  const Json manifest = ReadManifest(directory);
  CheckpointContents c;
  c.directory = directory;
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
    if (manifest.contains("spec")) c.spec_document = manifest["spec"].dump();
    if (manifest.contains("data")) c.data_document = manifest["data"].dump();
  } catch (const nlohmann::json::exception&) {
    throw AppError((directory / kManifest).string() + " is malformed");
  }
  c.weights = MapSafetensors(directory / kWeights);
  c.optimizer = MapSafetensors(directory / kOptimizer);
  if (c.world_size == world_size) c.of_rank = ReadSafetensors(directory / RankFile(rank));
  return c;
}

}  // namespace

// A file that ranks write together, or one rank's own: this rank's pieces of it.
struct CheckpointStore::File {
  std::string name;
  int64_t size = 0;  // of the whole
  struct Piece {
    int64_t offset = 0;  // in the file
    size_t begin = 0, size = 0;  // in `bytes`
  };
  std::vector<Piece> pieces;
  std::unique_ptr<std::byte[]> bytes;  // kept from save to save
  size_t used = 0, capacity = 0;

  void Clear(std::string file_name, int64_t file_size, size_t room) {
    name = std::move(file_name);
    size = file_size;
    pieces.clear();
    used = 0;
    if (room > capacity) {
      bytes.reset();
      bytes = std::make_unique_for_overwrite<std::byte[]>(room);
      capacity = room;
    }
  }
  // Room for `size` bytes at `offset`, which goes on where the piece before ended or begins a new
  // one.
  std::byte* Add(int64_t offset, size_t count) {
    if (pieces.empty() || pieces.back().offset + static_cast<int64_t>(pieces.back().size) != offset)
      pieces.push_back({offset, used, 0});
    pieces.back().size += count;
    used += count;
    return bytes.get() + used - count;
  }
};

struct CheckpointStore::Writing {
  CheckpointHead head;
  fs::path partial, final_path;
  double start = 0;
  File rank_file, weights, optimizer;
};

namespace {

// Writes the pieces of a file that others may write to at the same time.
void WritePieces(const fs::path& path, const auto& file) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) ThrowIoError("cannot open", path, errno);
  int problem = 0;
  for (const auto& piece : file.pieces) {
    size_t done = 0;
    while (problem == 0 && done < piece.size) {
      const ssize_t written = pwrite(fd, file.bytes.get() + piece.begin + done, piece.size - done,
                                     piece.offset + static_cast<int64_t>(done));
      if (written < 0 && errno != EINTR) problem = errno;
      if (written > 0) done += static_cast<size_t>(written);
    }
  }
  if (problem == 0 && fsync(fd) != 0) problem = errno;
  if (close(fd) != 0 && problem == 0) problem = errno;
  if (problem != 0) ThrowIoError("cannot write", path, problem);
}

void CopyTo(std::byte* to, const at::Tensor& values) {
  if (values.numel() == 0) return;
  at::from_blob(to, values.sizes(), values.options().device(at::kCPU).requires_grad(false))
      .copy_(values.detach());
}

// Copies the parts, sorted by where they lie, as pieces.
void CopyParts(const char* name, const std::vector<TensorPart>& parts, const FileLayout& layout,
               bool with_header, auto* file) {
  size_t room = layout.header().size();
  std::vector<const TensorPart*> sorted;
  for (const TensorPart& part : parts) {
    if (part.values.numel() == 0) continue;
    sorted.push_back(&part);
    room += part.values.nbytes();
  }
  std::sort(sorted.begin(), sorted.end(), [&](const TensorPart* a, const TensorPart* b) {
    return layout.OffsetOf(*a) < layout.OffsetOf(*b);
  });
  file->Clear(name, layout.size(), room);
  if (with_header) {
    const std::string& header = layout.header();
    std::memcpy(file->Add(0, header.size()), header.data(), header.size());
  }
  for (const TensorPart* part : sorted) {
    CopyTo(file->Add(layout.OffsetOf(*part), part->values.nbytes()), part->values);
  }
}

}  // namespace

CheckpointStore::CheckpointStore(fs::path directory, int keep, Communicator& communicator,
                                 Communicator* background)
    : directory_(std::move(directory)),
      keep_(keep),
      communicator_(communicator),
      background_(background) {
  if (communicator_.rank() == 0) RemovePartial();
}

CheckpointStore::~CheckpointStore() {
  if (thread_.joinable()) thread_.join();
}

void CheckpointStore::Save(const CheckpointContents& contents) {
  CheckpointParts parts;
  static_cast<CheckpointHead&>(parts) = contents;
  if (communicator_.rank() == 0) {
    parts.weights = WholeParts(contents.weights);
    parts.optimizer = WholeParts(contents.optimizer);
  }
  parts.of_rank = contents.of_rank;
  Save(parts);
}

void CheckpointStore::Save(const CheckpointParts& parts) {
  const double start = Seconds();
  Wait();
  Layout weights{.parts = DescribeParts(parts.weights)};
  Layout optimizer{.parts = DescribeParts(parts.optimizer)};
  int64_t changed = weights.parts != weights_layout_.parts ||
                    optimizer.parts != optimizer_layout_.parts || weights_layout_.file.size() == 0;
  communicator_.AllReduce(BufferOf(std::span(&changed, 1)), Reduction::kMax)->Wait();
  if (changed != 0) {
    weights.file = FileLayout(parts.weights, communicator_, kWeights);
    optimizer.file = FileLayout(parts.optimizer, communicator_, kOptimizer);
    weights_layout_ = std::move(weights);
    optimizer_layout_ = std::move(optimizer);
  }

  if (!writing_) writing_ = std::make_unique<Writing>();
  Writing& writing = *writing_;
  writing.head = parts;
  writing.start = start;
  writing.final_path = directory_ / StepName(parts.position.step);
  writing.partial = writing.final_path;
  writing.partial += ".partial";
  const bool first = communicator_.rank() == 0;
  CopyParts(kWeights, parts.weights, weights_layout_.file, first, &writing.weights);
  CopyParts(kOptimizer, parts.optimizer, optimizer_layout_.file, first, &writing.optimizer);
  std::vector<SafetensorsEntry> entries;
  for (const auto& [tensor_name, tensor] : parts.of_rank) {
    entries.push_back(
        {.name = tensor_name, .type = tensor.scalar_type(), .shape = tensor.sizes().vec()});
  }
  const std::string header = SafetensorsHeader(entries);
  const size_t size = header.size() + static_cast<size_t>(entries.empty() ? 0 : entries.back().end);
  writing.rank_file.Clear(RankFile(communicator_.rank()), static_cast<int64_t>(size), size);
  std::memcpy(writing.rank_file.Add(0, header.size()), header.data(), header.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    CopyTo(writing.rank_file.Add(static_cast<int64_t>(header.size()) + entries[i].begin,
                                 parts.of_rank[i].second.nbytes()),
           parts.of_rank[i].second);
  }
  for (const File* file : {&writing.rank_file, &writing.weights, &writing.optimizer}) {
    bytes_written_ += static_cast<int64_t>(file->used);
  }

  done_ = false;
  if (background_ != nullptr) {
    thread_ = std::thread([this] {
      try {
        Write(*writing_, *background_);
      } catch (...) {
        error_ = std::current_exception();
      }
      save_seconds_ = Seconds() - writing_->start;
      done_ = true;
    });
  } else {
    Write(writing, communicator_);
    longest_save_seconds_ = std::max(longest_save_seconds_, Seconds() - start);
  }
  last_stall_seconds_ = Seconds() - start;
  stall_seconds_ += last_stall_seconds_;
}

void CheckpointStore::Wait() {
  if (!thread_.joinable()) return;
  thread_.join();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  longest_save_seconds_ = std::max(longest_save_seconds_, save_seconds_);
}

void CheckpointStore::Finish() {
  const double start = Seconds();
  Wait();
  last_stall_seconds_ = Seconds() - start;
  stall_seconds_ += last_stall_seconds_;
}

void CheckpointStore::Poll() {
  if (done_.load(std::memory_order_relaxed) && thread_.joinable()) Wait();
}

void CheckpointStore::Write(const Writing& writing, Communicator& communicator) {
  try {
    WriteAll(writing, communicator);
  } catch (...) {
    // All ranks have met it, so none writes any more. The next attempt may need the room.
    if (communicator.rank() == 0) RemovePartial();
    throw;
  }
}

void CheckpointStore::WriteAll(const Writing& writing, Communicator& communicator) {
  const bool first = communicator.rank() == 0;
  std::error_code ignored;
  std::exception_ptr error;
  // What is thrown here is thrown on every rank, so that none waits for another that has given up.
  const auto agree = [&](const Json& mine) {
    Json message = mine;
    try {
      if (error) std::rethrow_exception(error);
    } catch (const WorkerError& e) {
      message = {{"error", e.what()}, {"class", static_cast<int>(e.failure)}};
    } catch (const std::exception& e) {
      message = {{"error", e.what()}, {"class", static_cast<int>(FailureClass::kApp)}};
    }
    const std::vector<std::string> texts = GatherTexts(communicator, message.dump());
    if (error) std::rethrow_exception(error);
    for (size_t r = 0; r < texts.size(); ++r) {
      const Json text = Json::parse(texts[r]);
      if (!text.contains("error")) continue;
      WorkerError failed(static_cast<FailureClass>(text["class"].get<int>()),
                         text["error"].get<std::string>());
      failed.rank = static_cast<int>(r);
      throw failed;
    }
    return texts;
  };
  const auto attempt = [&](auto action) {
    try {
      action();
    } catch (...) {
      error = std::current_exception();
    }
  };

  if (first) {
    attempt([&] {
      Step("directory");
      fs::remove_all(writing.partial, ignored);
      MakeDirectories(writing.partial);
    });
  }
  agree(Json::object());
  Json written = Json::array();
  attempt([&] {
    for (const File* file : {&writing.rank_file, &writing.weights, &writing.optimizer}) {
      if (file->pieces.empty()) continue;
      Step(file->name.c_str());
      WritePieces(writing.partial / file->name, *file);
      for (const File::Piece& piece : file->pieces) {
        written.push_back(
            {{"path", file->name},
             {"file_size", file->size},
             {"offset", piece.offset},
             {"size", piece.size},
             {"sha256", Sha256Hex({reinterpret_cast<const char*>(file->bytes.get()) + piece.begin,
                                   piece.size})}});
      }
    }
  });
  const std::vector<std::string> of_ranks = agree({{"written", written}});
  if (first) {
    attempt([&] {
      WriteManifest(writing, of_ranks);
      Step("rename");
      if (renameat2(AT_FDCWD, writing.partial.c_str(), AT_FDCWD, writing.final_path.c_str(),
                    RENAME_EXCHANGE) == 0) {
        fs::remove_all(writing.partial, ignored);  // what an earlier attempt had saved at this step
      } else {
        fs::remove_all(writing.final_path, ignored);
        fs::rename(writing.partial, writing.final_path, ignored);
        if (ignored) ThrowIoError("cannot create", writing.final_path, ignored.value());
      }
      SyncDirectory(directory_);
      Step("retention");
      DeleteOld(writing.head.position.step);
    });
  }
  agree(Json::object());
}

void CheckpointStore::WriteManifest(const Writing& writing,
                                    const std::vector<std::string>& written) {
  std::map<std::string, std::map<int64_t, Json>> pieces;
  std::map<std::string, int64_t> sizes;
  for (const std::string& text : written) {
    const Json of_rank = Json::parse(text);
    for (const Json& piece : of_rank.at("written")) {
      const auto path = piece.at("path").get<std::string>();
      const auto offset = piece.at("offset").get<int64_t>();
      sizes[path] = piece.at("file_size").get<int64_t>();
      pieces[path][offset] = {
          {"offset", offset}, {"size", piece.at("size")}, {"sha256", piece.at("sha256")}};
    }
  }
  Json files = Json::array();
  for (const auto& [path, of_file] : pieces) {
    Json list = Json::array();
    for (const auto& [offset, piece] : of_file) list.push_back(piece);
    files.push_back({{"path", path}, {"size", sizes[path]}, {"pieces", list}});
  }
  const CheckpointHead& head = writing.head;
  const Position& at = head.position;
  Json manifest = {{"format", kFormat},
                   {"step", at.step},
                   {"epoch", at.epoch},
                   {"next_batch", at.next_batch},
                   {"epoch_loss_sum", ExactText(at.epoch_loss_sum)},
                   {"epoch_samples", at.epoch_samples},
                   {"world_size", head.world_size},
                   {"seed", head.seed},
                   {"spec_sha256", head.spec_sha256},
                   {"weights_sha256", head.weights_sha256},
                   {"files", files}};
  // A worker of the version before passes over these.
  if (!head.spec_document.empty()) manifest["spec"] = Json::parse(head.spec_document);
  if (!head.data_document.empty()) manifest["data"] = Json::parse(head.data_document);
  manifest["manifest_sha256"] = Sha256Hex(manifest.dump());
  Step("manifest");
  WriteFileDurably(writing.partial / kManifest, manifest.dump(1) + "\n");
}

void CheckpointStore::RemovePartial() {
  std::error_code error, not_removed;
  for (fs::directory_iterator it(directory_, error), end; !error && it != end;
       it.increment(error)) {
    if (it->path().extension() == ".partial" && StepOf(it->path().stem())) {
      fs::remove_all(it->path(), not_removed);
    }
  }
}

// The one just saved stays in any case: who goes on from an older checkpoint than the newest has a
// reason not to want that.
void CheckpointStore::DeleteOld(int64_t saved) {
  std::error_code ignored;
  const int64_t sound = std::min(saved, std::exchange(went_on_from_, std::nullopt).value_or(saved));
  int kept = 0;
  for (const fs::path& path : ListSteps(directory_)) {
    const int64_t step = *StepOf(path);
    if ((step == saved || step <= sound) && ++kept <= keep_) continue;
    // The manifest goes first: a half-deleted checkpoint must not look like one.
    fs::remove(path / kManifest, ignored);
    fs::remove_all(path, ignored);
  }
}

CheckpointContents LoadNewestCheckpoint(const std::vector<fs::path>& directories,
                                        Communicator& communicator,
                                        const std::function<void(const std::string&)>& warn) {
  const bool first = communicator.rank() == 0;
  std::string names;
  std::vector<fs::path> candidates;
  for (const fs::path& directory : directories) {
    names += (names.empty() ? "" : ", ") + directory.string();
    if (!first) continue;
    const std::vector<fs::path> here = Candidates(directory);
    if (here.empty() && directories.size() > 1)
      warn("there is no checkpoint in " + directory.string());
    candidates.insert(candidates.end(), here.begin(), here.end());
  }
  std::string newest_problem;
  for (size_t i = 0;; ++i) {
    const fs::path candidate = BroadcastText(
        communicator, first && i < candidates.size() ? candidates[i].string() : "", 0);
    if (candidate.empty()) {
      if (i == 0) throw UserError("there is no checkpoint in " + names + " to go on from");
      throw AppError("none of the " + std::to_string(i) + " checkpoints in " + names +
                     " is sound; the newest: " + newest_problem);
    }
    std::string problem;
    try {
      Verify(candidate, communicator.rank(), communicator.size());
    } catch (const WorkerError& e) {
      problem = e.what();
    }
    for (const std::string& of_rank : GatherTexts(communicator, problem)) {
      if (problem.empty()) problem = of_rank;
    }
    if (problem.empty()) return Read(candidate, communicator.rank(), communicator.size());
    if (first) warn(problem);
    if (newest_problem.empty()) newest_problem = problem;
  }
}

void ExportOptimizer(const std::vector<fs::path>& directories, int64_t step,
                     const fs::path& to) {
  for (const fs::path& directory : directories) {
    const fs::path from = directory / StepName(step) / kOptimizer;
    if (directory.empty() || !fs::exists(from)) continue;
    std::error_code error;
    fs::remove(to, error);
    fs::create_hard_link(from, to, error);
    if (error) {
      fs::copy_file(from, to, error);
      if (error) ThrowIoError("cannot write", to, error.value());
      OutputFile(to, /*append=*/true).SyncAndClose();
    }
    return SyncDirectory(to.parent_path());
  }
  throw AppError("there is no " + StepName(step) + " to take the optimiser's state from");
}

}  // namespace itwin::worker
