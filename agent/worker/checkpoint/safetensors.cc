#include "agent/worker/checkpoint/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // what the reference reader accepts

struct TypeName {
  at::ScalarType type;
  const char* name;
};
constexpr TypeName kTypes[] = {
    {at::kFloat, "F32"}, {at::kDouble, "F64"}, {at::kHalf, "F16"},  {at::kBFloat16, "BF16"},
    {at::kLong, "I64"},  {at::kInt, "I32"},    {at::kShort, "I16"}, {at::kChar, "I8"},
    {at::kByte, "U8"},   {at::kBool, "BOOL"},
};

[[noreturn]] void Refuse(const std::filesystem::path& path, const std::string& problem) {
  throw AppError(path.string() + " is not a sound safetensors file: " + problem);
}

class InputFile {
 public:
  explicit InputFile(const std::filesystem::path& path) : path_(path) {
    fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd_ < 0) ThrowIoError("cannot read", path, errno);
    struct stat status {};
    fstat(fd_, &status);
    size_ = status.st_size;
  }
  ~InputFile() { close(fd_); }
  int64_t size() const { return size_; }
  int descriptor() const { return fd_; }
  void ReadAt(int64_t offset, void* to, int64_t size) {
    char* at = static_cast<char*>(to);
    while (size > 0) {
      const ssize_t got = pread(fd_, at, static_cast<size_t>(size), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) ThrowIoError("cannot read", path_, errno);
      if (got == 0) Refuse(path_, "it ends too early");
      at += got;
      offset += got;
      size -= got;
    }
  }

 private:
  const std::filesystem::path path_;
  int fd_;
  int64_t size_ = 0;
};

}  // namespace

std::string SafetensorsHeader(std::vector<SafetensorsEntry>& entries,
                              const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (SafetensorsEntry& entry : entries) {
    const auto type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                   [&](const TypeName& t) { return t.type == entry.type; });
    if (type == std::end(kTypes)) {
      throw AppError("tensor " + entry.name +
                     " has an element type that safetensors does not have");
    }
    int64_t bytes = static_cast<int64_t>(c10::elementSize(entry.type));
    for (const int64_t size : entry.shape) bytes *= size;
    entry.begin = offset;
    entry.end = offset += bytes;
    header[entry.name] = {{"dtype", type->name},
                          {"shape", entry.shape},
                          {"data_offsets", {entry.begin, entry.end}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // tensors start on an 8-byte boundary
  std::string prefix(8, '\0');
  for (int i = 0; i < 8; ++i) prefix[i] = static_cast<char>(uint64_t{text.size()} >> (8 * i));
  return prefix + text;
}

void WriteSafetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                      const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsEntry> entries;
  for (const auto& [name, tensor] : tensors) {
    entries.push_back({.name = name, .type = tensor.scalar_type(), .shape = tensor.sizes().vec()});
  }
  OutputFile file(path);
  file.Write(SafetensorsHeader(entries, metadata));
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor bytes = tensor.detach().cpu().contiguous();
    file.Write(bytes.data_ptr(), static_cast<size_t>(bytes.numel()) * bytes.element_size());
  }
  file.SyncAndClose();
}

namespace {

// The entries in file order, every length checked; `*data_start` is where their offsets count from.
std::vector<SafetensorsEntry> ParseHeader(InputFile& file, const std::filesystem::path& path,
                                          int64_t* data_start) {
  unsigned char prefix[8];
  if (file.size() < 8) Refuse(path, "it ends too early");
  file.ReadAt(0, prefix, 8);
  uint64_t header_size = 0;
  for (int i = 7; i >= 0; --i) header_size = header_size << 8 | prefix[i];
  if (header_size > static_cast<uint64_t>(std::min(kMaxHeaderBytes, file.size() - 8))) {
    Refuse(path, "its header length is impossible");
  }
  std::string text(header_size, '\0');
  file.ReadAt(8, text.data(), static_cast<int64_t>(header_size));
  const auto header = nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) Refuse(path, "its header is not a JSON object");

  *data_start = 8 + static_cast<int64_t>(header_size);
  const int64_t data_size = file.size() - *data_start;
  std::vector<SafetensorsEntry> entries;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    at::ScalarType type = at::ScalarType::Undefined;
    std::vector<int64_t> shape;
    std::vector<int64_t> range;
    try {
      const std::string wanted = entry.at("dtype").get<std::string>();
      for (const TypeName& t : kTypes) {
        if (wanted == t.name) type = t.type;
      }
      shape = entry.at("shape").get<std::vector<int64_t>>();
      range = entry.at("data_offsets").get<std::vector<int64_t>>();
    } catch (const nlohmann::json::exception&) {
      Refuse(path, "the entry of tensor " + name + " is malformed");
    }
    if (type == at::ScalarType::Undefined)
      Refuse(path, "tensor " + name + " has an unknown element type");
    int64_t count = 1;
    for (int64_t size : shape) {
      if (size < 0 || (size > 0 && count > data_size / size))
        Refuse(path, "tensor " + name + " is too large");
      count *= size;
    }
    const int64_t bytes = count * static_cast<int64_t>(c10::elementSize(type));
    if (range.size() != 2 || range[0] < 0 || range[1] > data_size || range[1] - range[0] != bytes) {
      Refuse(path, "tensor " + name + " lies outside the file");
    }
    entries.push_back({name, type, std::move(shape), range[0], range[1]});
  }
  return entries;
}

}  // namespace

NamedTensors ReadSafetensors(const std::filesystem::path& path) {
  InputFile file(path);
  int64_t data_start = 0;
  NamedTensors tensors;
  for (const SafetensorsEntry& entry : ParseHeader(file, path, &data_start)) {
    at::Tensor tensor = at::empty(entry.shape, at::TensorOptions().dtype(entry.type));
    file.ReadAt(data_start + entry.begin, tensor.data_ptr(), entry.end - entry.begin);
    tensors.emplace_back(entry.name, std::move(tensor));
  }
  return tensors;
}

NamedTensors MapSafetensors(const std::filesystem::path& path) {
  InputFile file(path);
  int64_t data_start = 0;
  const std::vector<SafetensorsEntry> entries = ParseHeader(file, path, &data_start);
  const auto size = static_cast<size_t>(file.size());
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.descriptor(), 0);
  if (address == MAP_FAILED) ThrowIoError("cannot map", path, errno);
  const std::shared_ptr<char> mapped(static_cast<char*>(address),
                                     [size](char* p) { munmap(p, size); });
  NamedTensors tensors;
  for (const SafetensorsEntry& entry : entries) {
    const at::TensorOptions options = at::TensorOptions().dtype(entry.type);
    char* data = mapped.get() + data_start + entry.begin;
    const auto bytes = static_cast<size_t>(entry.end - entry.begin);
    at::Tensor tensor;
    if (bytes > 0 && reinterpret_cast<uintptr_t>(data) % c10::elementSize(entry.type) == 0) {
      tensor = at::from_blob(data, entry.shape, [mapped](void*) {}, options);
    } else {
      tensor = at::empty(entry.shape, options);
      if (bytes > 0) std::memcpy(tensor.data_ptr(), data, bytes);
    }
    tensors.emplace_back(entry.name, std::move(tensor));
  }
  return tensors;
}

}  // namespace itwin::worker
