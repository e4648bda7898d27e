#include "agent/worker/predict/predict.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <vector>

#include <ATen/core/Dict.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/data/mapped_file.h"
#include "agent/worker/data/netcdf_writer.h"
#include "agent/worker/error.h"
#include "agent/worker/training/sampler.h"
#include "agent/worker/training/weights.h"

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxDimensions = 16;
constexpr int64_t kRowsAtOnce = 256;  // when the file is copied to NetCDF

std::string NpyHeader(const std::vector<int64_t>& shape) {
  std::string text = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (const int64_t size : shape) text += std::to_string(size) + ", ";
  text += "), }";
  constexpr size_t kPrefix = 10, kAlignment = 64;
  const size_t total = (kPrefix + text.size() + 1 + kAlignment - 1) / kAlignment * kAlignment;
  text.resize(total - kPrefix - 1, ' ');
  text += '\n';
  std::string header("\x93NUMPY\x01\x00", 8);
  header += static_cast<char>(text.size() & 0xff);
  header += static_cast<char>(text.size() >> 8);
  return header + text;
}

// A file to which every rank writes its rows.
class RowFile {
 public:
  explicit RowFile(const fs::path& path) : path_(path) {
    fd_ = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd_ < 0) ThrowIoError("cannot open", path, errno);
  }
  ~RowFile() {
    if (fd_ >= 0) close(fd_);
  }
  RowFile(const RowFile&) = delete;
  void WriteAt(int64_t offset, const void* data, size_t size) {
    const char* at = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t written = pwrite(fd_, at, size, offset);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) ThrowIoError("cannot write", path_, errno);
      at += written;
      offset += written;
      size -= static_cast<size_t>(written);
    }
  }
  void Sync() {
    if (fsync(fd_) != 0) ThrowIoError("cannot write", path_, errno);
  }

 private:
  const fs::path path_;
  int fd_ = -1;
};

// The shape of one sample's prediction, of rank 0, which has samples in any case.
std::vector<int64_t> AgreeOnShape(const at::Tensor& predicted, Communicator& control) {
  std::vector<int64_t> message(kMaxDimensions + 1, 0);
  if (control.rank() == 0) {
    if (predicted.dim() > kMaxDimensions) throw UserError("the predictions have too many dimensions");
    message[0] = predicted.dim() - 1;
    for (int64_t d = 1; d < predicted.dim(); ++d) message[static_cast<size_t>(d)] = predicted.size(d);
  }
  control.Broadcast(BufferOf(std::span(message)), 0)->Wait();
  return {message.begin() + 1, message.begin() + 1 + message[0]};
}

void CopyToNetcdf(const fs::path& npy, size_t header, const fs::path& netcdf,
                  const std::vector<int64_t>& shape) {
  const auto file = MappedFile::Open(npy);
  int64_t row = 1;
  for (size_t d = 1; d < shape.size(); ++d) row *= shape[d];
  NetcdfWriter writer(netcdf, shape);
  std::vector<float> rows;
  for (int64_t first = 0; first < shape[0]; first += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, shape[0] - first);
    rows.resize(static_cast<size_t>(count * row));
    std::memcpy(rows.data(), file->data() + header + static_cast<size_t>(first * row) * sizeof(float),
                rows.size() * sizeof(float));
    writer.Write(first, count, rows.data());
  }
  writer.Close();
}

}  // namespace

std::optional<Prediction> PredictSplit(Model& model, const Dataset& dataset, Split split,
                                       int64_t batch, const std::string& format,
                                       const fs::path& outputs, Communicator& control,
                                       const std::function<bool()>& go_on) {
  const int64_t samples = dataset.size(split);
  if (samples == 0) throw UserError("train.predict.split: there are no samples in it");
  const int64_t batches = (samples + batch - 1) / batch;
  const Slice mine = SliceOf(batches, control.rank(), control.size());
  const int64_t rounds = (batches + control.size() - 1) / control.size();  // of the busiest rank
  // The ranks answer alike.
  const auto asked_to_stop = [&] {
    int64_t stop = go_on() ? 0 : 1;
    control.AllReduce(BufferOf(std::span(&stop, 1)), Reduction::kMax)->Wait();
    return stop != 0;
  };
  const auto predict = [&](int64_t b) {
    const int64_t first = b * batch;
    std::vector<int64_t> indices(static_cast<size_t>(std::min(batch, samples - first)));
    std::iota(indices.begin(), indices.end(), first);
    at::Tensor values = model.Predict(dataset.Gather(split, indices).at("input"));
    if (values.dim() == 0 || values.size(0) != static_cast<int64_t>(indices.size())) {
      throw UserError("the model does not give one prediction per sample");
    }
    return values.to(at::kCPU, at::kFloat).contiguous();
  };
  model.Train(false);
  if (asked_to_stop()) return std::nullopt;
  at::Tensor next;  // the first batch tells the shape
  if (mine.size() > 0) next = predict(mine.first);
  const std::vector<int64_t> of_sample = AgreeOnShape(next, control);
  Prediction prediction{.file = outputs / "predictions.npy", .shape = of_sample};
  prediction.shape.insert(prediction.shape.begin(), samples);
  const std::string header = NpyHeader(prediction.shape);
  int64_t row_bytes = sizeof(float);
  for (const int64_t size : of_sample) row_bytes *= size;

  const fs::path partial = prediction.file.string() + ".tmp";
  std::error_code error;
  if (control.rank() == 0) {
    fs::remove(partial, error);
    RowFile(partial).WriteAt(0, header.data(), header.size());
  }
  control.Barrier()->Wait();
  bool stopped = false;
  {
    RowFile file(partial);
    for (int64_t round = 0; round < rounds; ++round) {
      if (round > 0 && (stopped = asked_to_stop())) break;
      const int64_t b = mine.first + round;
      if (b >= mine.last) continue;
      if (round > 0) next = predict(b);
      if (!std::equal(of_sample.begin(), of_sample.end(), next.sizes().begin() + 1,
                      next.sizes().end())) {
        throw UserError("the model's predictions differ in shape from batch to batch");
      }
      file.WriteAt(static_cast<int64_t>(header.size()) + b * batch * row_bytes, next.data_ptr(),
                   next.nbytes());
    }
    if (!stopped) file.Sync();
  }
  control.Barrier()->Wait();
  if (stopped) {
    if (control.rank() == 0) fs::remove(partial, error);
    return std::nullopt;
  }
  if (format == "netcdf") {
    const fs::path netcdf = outputs / "predictions.nc";
    if (control.rank() == 0) {
      CopyToNetcdf(partial, header.size(), netcdf.string() + ".tmp", prediction.shape);
      fs::rename(netcdf.string() + ".tmp", netcdf, error);
      if (error) ThrowIoError("cannot create", netcdf, error.value());
      fs::remove(partial, error);
    }
    prediction.file = netcdf;
  } else if (control.rank() == 0) {
    fs::rename(partial, prediction.file, error);
    if (error) ThrowIoError("cannot create", prediction.file, error.value());
  }
  control.Barrier()->Wait();
  return prediction;
}

void LoadWeightsFile(Model& model, const fs::path& path) {
  const std::string field = "train.predict.weights: " + path.string();
  NamedTensors tensors;
  try {
    const auto file = MappedFile::Open(path);
    // Python's torch.save and ours write a zip archive.
    const bool zip = file->size() > 2 && std::memcmp(file->data(), "PK", 2) == 0;
    if (zip) {
      const auto* bytes = reinterpret_cast<const char*>(file->data());
      const c10::IValue value =
          torch::jit::pickle_load(std::vector<char>(bytes, bytes + file->size()));
      if (!value.isGenericDict()) throw UserError("it holds no dictionary of tensors");
      for (const auto& entry : value.toGenericDict()) {
        if (!entry.key().isString() || !entry.value().isTensor()) {
          throw UserError("it holds something else than tensors by name");
        }
        tensors.emplace_back(entry.key().toStringRef(), entry.value().toTensor());
      }
    } else {
      tensors = ReadSafetensors(path);
    }
    LoadWeights(model, tensors);
  } catch (const WorkerError& e) {
    throw UserError(field + ": " + e.what());
  } catch (const c10::Error& e) {
    throw UserError(field + ": cannot be read as weights (" + e.what_without_backtrace() +
                    "); give weights.safetensors, or a state_dict.pt saved as a plain dict");
  }
}

}  // namespace itwin::worker
