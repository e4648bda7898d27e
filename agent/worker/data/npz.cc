#include "agent/worker/data/npz.h"

#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agent/worker/data/mapped_file.h"
#include "agent/worker/data/npy.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr uint32_t kEndSignature = 0x06054b50;
constexpr uint32_t kEnd64Signature = 0x06064b50;
constexpr uint32_t kEnd64LocatorSignature = 0x07064b50;
constexpr uint32_t kCentralSignature = 0x02014b50;
constexpr uint32_t kLocalSignature = 0x04034b50;
constexpr size_t kEndBytes = 22;
constexpr size_t kMaxCommentBytes = 65535;
constexpr uint64_t kMaxMembers = 100000;
constexpr size_t kFirstBlockBytes = 1
                                    << 20;  // unpacked before the size an archive claims is trusted
// Deflate cannot do better than 1032:1; a directory that claims more lies.
constexpr uint64_t kMaxDeflateRatio = 1032;

struct Member {
  std::string name;
  int method = 0;
  int flags = 0;
  uint32_t crc = 0;
  uint64_t packed_bytes = 0;
  uint64_t bytes = 0;
  uint64_t local_offset = 0;
};

class Archive {
 public:
  explicit Archive(const std::filesystem::path& path)
      : file_(MappedFile::Open(path)), what_(path.string()) {}

  std::vector<Member> ReadDirectory() const {
    uint64_t entries = 0, offset = 0;
    FindDirectory(&entries, &offset);
    if (entries > kMaxMembers) throw Damaged("it claims " + std::to_string(entries) + " members");
    std::vector<Member> members;
    for (uint64_t i = 0; i < entries; ++i) {
      Need(offset, 46);
      if (U32(offset) != kCentralSignature) throw Damaged("its directory is broken");
      Member member;
      member.flags = U16(offset + 8);
      member.method = U16(offset + 10);
      member.crc = U32(offset + 16);
      member.packed_bytes = U32(offset + 20);
      member.bytes = U32(offset + 24);
      const uint64_t name_bytes = U16(offset + 28), extra_bytes = U16(offset + 30),
                     comment_bytes = U16(offset + 32);
      member.local_offset = U32(offset + 42);
      Need(offset + 46, name_bytes + extra_bytes + comment_bytes);
      member.name.assign(reinterpret_cast<const char*>(file_->data() + offset + 46), name_bytes);
      ReadZip64Extra(offset + 46 + name_bytes, extra_bytes, &member);
      offset += 46 + name_bytes + extra_bytes + comment_bytes;
      members.push_back(std::move(member));
    }
    return members;
  }

  Array ReadArray(const Member& member) const {
    const std::string what = what_ + ", array \"" + member.name + "\"";
    if (member.flags & 1) throw UserError(what + ": is encrypted");
    Need(member.local_offset, 30);
    if (U32(member.local_offset) != kLocalSignature) throw Damaged("a member's header is broken");
    const uint64_t start =
        member.local_offset + 30 + U16(member.local_offset + 26) + U16(member.local_offset + 28);
    Need(start, member.packed_bytes);
    const std::byte* packed = file_->data() + start;
    if (member.method == 0) {
      CheckSum(packed, member.packed_bytes, member, what);
      return ParseNpy(packed, member.packed_bytes, file_, what);
    }
    if (member.method != 8) {
      throw UserError(what + ": uses zip compression method " + std::to_string(member.method) +
                      "; save it with numpy.savez or numpy.savez_compressed");
    }
    auto block = std::make_shared<const std::vector<std::byte>>(Inflate(packed, member, what));
    return ParseNpy(block->data(), block->size(), block, what);
  }

 private:
  WorkerError Damaged(const std::string& why) const {
    return UserError(what_ + ": is not a whole .npz archive (" + why +
                     "); save it again with numpy.savez");
  }
  void Need(uint64_t offset, uint64_t bytes) const {
    if (offset > file_->size() || bytes > file_->size() - offset) {
      throw Damaged("it refers to bytes beyond its end");
    }
  }
  uint64_t Number(uint64_t offset, size_t bytes) const {  // the caller has checked the range
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; ++i) {
      value |= std::to_integer<uint64_t>(file_->data()[offset + i]) << (8 * i);
    }
    return value;
  }
  uint16_t U16(uint64_t offset) const { return static_cast<uint16_t>(Number(offset, 2)); }
  uint32_t U32(uint64_t offset) const { return static_cast<uint32_t>(Number(offset, 4)); }
  uint64_t U64(uint64_t offset) const { return Number(offset, 8); }

  void FindDirectory(uint64_t* entries, uint64_t* offset) const {
    const size_t size = file_->size();
    if (size < kEndBytes) throw Damaged("it is too short");
    const size_t lowest = size - std::min(size, kEndBytes + kMaxCommentBytes);
    size_t end = size - kEndBytes;
    while (U32(end) != kEndSignature) {
      if (end == lowest) throw Damaged("its directory is absent; it may be cut off");
      --end;
    }
    *entries = U16(end + 10);
    *offset = U32(end + 16);
    const bool zip64 = *entries == 0xffff || *offset == 0xffffffff;
    if (zip64 && end >= 20 && U32(end - 20) == kEnd64LocatorSignature) {
      const uint64_t end64 = U64(end - 20 + 8);
      Need(end64, 56);
      if (U32(end64) != kEnd64Signature) throw Damaged("its zip64 directory is broken");
      *entries = U64(end64 + 32);
      *offset = U64(end64 + 48);
    }
  }

  // Replaces the fields that did not fit 32 bits, in their fixed order.
  void ReadZip64Extra(uint64_t offset, uint64_t extra_bytes, Member* member) const {
    const uint64_t end = offset + extra_bytes;
    while (end - offset >= 4) {
      const uint16_t id = U16(offset);
      const uint64_t bytes = U16(offset + 2);
      offset += 4;
      if (bytes > end - offset) return;  // padding that is no field; harmless
      if (id == 1) {
        uint64_t at = offset;
        for (uint64_t* field : {&member->bytes, &member->packed_bytes, &member->local_offset}) {
          if (*field != 0xffffffff) continue;
          if (offset + bytes - at < 8) throw Damaged("a zip64 field is cut off");
          *field = U64(at);
          at += 8;
        }
      }
      offset += bytes;
    }
  }

  static void CheckSum(const std::byte* bytes, uint64_t count, const Member& member,
                       const std::string& what) {
    if (crc32_z(0, reinterpret_cast<const Bytef*>(bytes), count) != member.crc)
      throw UserError(what + ": its checksum does not match; the file is damaged");
  }

  std::vector<std::byte> Inflate(const std::byte* packed, const Member& member,
                                 const std::string& what) const {
    if (member.bytes > (member.packed_bytes + 1) * kMaxDeflateRatio) {
      throw Damaged("array \"" + member.name + "\" claims " + std::to_string(member.bytes) +
                    " bytes out of " + std::to_string(member.packed_bytes));
    }
    std::vector<std::byte> out(std::min<uint64_t>(member.bytes, kFirstBlockBytes));
    z_stream stream{};
    if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) throw ResourceError("zlib: out of memory");
    const auto end = [&stream] { inflateEnd(&stream); };
    uint64_t read = 0, written = 0;
    int result = Z_OK;
    constexpr uint64_t kStep = std::numeric_limits<int>::max();
    while (result == Z_OK) {
      if (written == out.size() && out.size() < member.bytes) {
        out.resize(std::min<uint64_t>(member.bytes, out.size() * 4));
      }
      const uint64_t in_now = std::min(member.packed_bytes - read, kStep);
      const uint64_t out_now = std::min<uint64_t>(out.size() - written, kStep);
      stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(packed + read));
      stream.avail_in = static_cast<uInt>(in_now);
      stream.next_out = reinterpret_cast<Bytef*>(out.data() + written);
      stream.avail_out = static_cast<uInt>(out_now);
      result = inflate(&stream, Z_NO_FLUSH);
      const uint64_t consumed = in_now - stream.avail_in, produced = out_now - stream.avail_out;
      read += consumed;
      written += produced;
      if (result == Z_OK && consumed == 0 && produced == 0) break;
    }
    end();
    if (result != Z_STREAM_END || written != member.bytes) {
      throw UserError(what + ": its compressed bytes are damaged or cut off");
    }
    CheckSum(out.data(), written, member, what);
    return out;
  }

  std::shared_ptr<const MappedFile> file_;
  std::string what_;
};

}  // namespace

NamedArrays ReadNpz(const std::filesystem::path& path, const std::set<std::string>& needed) {
  const Archive archive(path);
  NamedArrays arrays;
  std::optional<UnsupportedArray> unsupported;  // the first
  for (const Member& member : archive.ReadDirectory()) {
    constexpr std::string_view kSuffix = ".npy";
    std::string name = member.name;
    if (name.size() <= kSuffix.size() || !name.ends_with(kSuffix)) continue;  // not an array
    name.resize(name.size() - kSuffix.size());
    try {
      arrays.insert_or_assign(name, archive.ReadArray(member));
    } catch (const UnsupportedArray& error) {
      if (needed.count(name) > 0) throw;
      if (!unsupported) unsupported = error;
    }
  }
  if (arrays.empty() && unsupported) throw *unsupported;
  if (arrays.empty())
    throw UserError(path.string() + ": has no arrays; save some with numpy.savez");
  return arrays;
}

}  // namespace itwin::worker
