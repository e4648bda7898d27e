#include "agent/worker/data/chunk_codec.h"

#include <dlfcn.h>
#include <zlib.h>

#include <cstring>
#include <limits>

namespace itwin::worker {
namespace {

bool Copy(const std::byte* from, size_t from_size, std::byte* to, size_t to_size) {
  if (from_size != to_size) return false;
  std::memcpy(to, from, to_size);
  return true;
}

bool UnpackZlib(const std::byte* from, size_t from_size, std::byte* to, size_t to_size) {
  constexpr size_t kMost = std::numeric_limits<uInt>::max();
  z_stream stream{};
  if (from_size > kMost || to_size > kMost || inflateInit2(&stream, 15 + 32) != Z_OK) return false;  // zlib's or gzip's header
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(from));
  stream.avail_in = static_cast<uInt>(from_size);
  stream.next_out = reinterpret_cast<Bytef*>(to);
  stream.avail_out = static_cast<uInt>(to_size);
  const bool whole = inflate(&stream, Z_FINISH) == Z_STREAM_END && stream.avail_out == 0;
  inflateEnd(&stream);
  return whole;
}

// A function of a library that is loaded at its first use and stays.
template <typename Function>
Function Load(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  return handle == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(handle, name));
}

// As blosc.h and zstd.h declare them; their sonames stand for these.
constexpr char kBlosc[] = "libblosc.so.1", kZstd[] = "libzstd.so.1";
struct Blosc {
  int (*validate)(const void* from, size_t from_size, size_t* to_size) = Load<decltype(validate)>(kBlosc, "blosc_cbuffer_validate");
  int (*decompress)(const void* from, void* to, size_t to_size, int threads) = Load<decltype(decompress)>(kBlosc, "blosc_decompress_ctx");
};
const Blosc& TheBlosc() {
  static const Blosc blosc;
  return blosc;
}
using ZstdDecompress = size_t (*)(void* to, size_t to_size, const void* from, size_t from_size);
ZstdDecompress TheZstd() {
  static const auto decompress = Load<ZstdDecompress>(kZstd, "ZSTD_decompress");
  return decompress;
}

bool UnpackBlosc(const std::byte* from, size_t from_size, std::byte* to, size_t to_size) {
  size_t unpacked = 0;
  if (TheBlosc().validate(from, from_size, &unpacked) != 0 || unpacked != to_size) return false;
  const int bytes = TheBlosc().decompress(from, to, to_size, /*threads=*/1);
  return bytes >= 0 && static_cast<size_t>(bytes) == to_size;
}

bool UnpackZstd(const std::byte* from, size_t from_size, std::byte* to, size_t to_size) {
  return TheZstd()(to, to_size, from, from_size) == to_size;
}

}  // namespace

Unpack FindUnpack(const std::string& name, std::string* why) {
  if (name == "null") return Copy;
  if (name == "zlib" || name == "gzip") return UnpackZlib;
  const char* library = nullptr;
  if (name == "blosc") {
    if (TheBlosc().validate != nullptr && TheBlosc().decompress != nullptr) return UnpackBlosc;
    library = kBlosc;
  } else if (name == "zstd") {
    if (TheZstd() != nullptr) return UnpackZstd;
    library = kZstd;
  }
  *why = "has the compressor \"" + name + "\"" +
         (library == nullptr ? "; known: null, zlib, gzip, blosc, zstd"
                             : ", but this site has no " + std::string(library) + "; write it with zlib, or have it installed");
  return nullptr;
}

}  // namespace itwin::worker
