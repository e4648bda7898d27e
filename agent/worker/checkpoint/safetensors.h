// The safetensors file format: an 8-byte little-endian header length, a JSON header
// {name: {dtype, shape, data_offsets}}, then the raw bytes. Readable from Python with
// `safetensors`, holds no code.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace itwin::worker {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

// One tensor of a file's header. `begin` and `end` are bytes from the end of the header.
struct SafetensorsEntry {
  std::string name;
  at::ScalarType type = at::kFloat;
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;
};

// Places the tensors one after the other (sets begin and end) and returns the file's bytes before
// the first of them.
std::string SafetensorsHeader(std::vector<SafetensorsEntry>& entries,
                              const std::map<std::string, std::string>& metadata = {});

// Writes the tensors in the given order and fsyncs the file. Names are unique. Throws ResourceError
// when the disk is full, AppError for another I/O error or an element type the format does not
// have.
void WriteSafetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                      const std::map<std::string, std::string>& metadata = {});

// Reads all tensors, in file order. Every length is checked against the file before it is believed.
// Throws AppError that names the file and what is wrong with it.
NamedTensors ReadSafetensors(const std::filesystem::path& path);

// The same, but the tensors stay in the mapped file (copied on write): what is not touched is not
// read. The file must not change meanwhile.
NamedTensors MapSafetensors(const std::filesystem::path& path);

}  // namespace itwin::worker
