// How the chunks of a store were packed. zlib is linked; the libraries of blosc and zstd are loaded where
// a store needs them, so that a site without them runs everything else.
#pragma once

#include <cstddef>
#include <string>

namespace itwin::worker {

// Unpacks to exactly `to_size` bytes; false for damage. Any thread.
using Unpack = bool (*)(const std::byte* from, size_t from_size, std::byte* to, size_t to_size);

// By numcodecs' name: null (as it is), zlib, gzip, blosc or zstd. Nothing where it is unknown or its
// library is not on this machine; `why` is then the rest of a sentence ("has the compressor …").
Unpack FindUnpack(const std::string& name, std::string* why);

}  // namespace itwin::worker
