// NumPy's .npy, format versions 1 to 3: magic, header (a Python dictionary), raw elements.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>

#include "agent/worker/data/array.h"
#include "agent/worker/error.h"

namespace itwin::worker {

// A whole array of a kind that is not read here.
class UnsupportedArray : public WorkerError {
 public:
  explicit UnsupportedArray(const std::string& message) : WorkerError(UserError(message)) {}
};

// Maps the file; elements stay in it when they are in native byte order. Element types: f2 f4 f8 i1
// i2 i4 i8 u1 bool, and u2 and u4, which become int32 and int64. Throws UnsupportedArray for
// anything else and for Fortran order, UserError for a file that is shorter than its header says.
Array ReadNpy(const std::filesystem::path& path);

// The same from memory that `owner` keeps alive; `what` names the array in errors.
Array ParseNpy(const std::byte* data, size_t size, std::shared_ptr<const void> owner,
               const std::string& what);

}  // namespace itwin::worker
