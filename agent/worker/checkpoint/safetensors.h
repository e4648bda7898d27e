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

// Writes the tensors in the given order and fsyncs the file. Names are unique. Throws ResourceError
// when the disk is full, AppError for another I/O error or an element type the format does not
// have.
void WriteSafetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                      const std::map<std::string, std::string>& metadata = {});

// Reads all tensors, in file order. Every length is checked against the file before it is believed.
// Throws AppError that names the file and what is wrong with it.
NamedTensors ReadSafetensors(const std::filesystem::path& path);

}  // namespace itwin::worker
