// Reading the elements of an Array in tests.
#pragma once

#include <cstring>
#include <vector>

#include "agent/worker/data/array.h"

namespace itwin::worker::testing {

template <typename T>
std::vector<T> Values(const Array& array) {
  std::vector<T> values(array.size_bytes / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), array.data, array.size_bytes);
  return values;
}

}  // namespace itwin::worker::testing
