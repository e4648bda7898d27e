#include "agent/worker/data/raw.h"

#include "agent/worker/data/mapped_file.h"
#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"

namespace itwin::worker {

Array ReadRaw(const std::filesystem::path& path, const std::string& type,
              const std::vector<int64_t>& shape) {
  std::vector<std::string> known;
  Array array;
  bool found = false;
  for (const ElementType candidate :
       {ElementType::kBool, ElementType::kUint8, ElementType::kInt8, ElementType::kInt16,
        ElementType::kInt32, ElementType::kInt64, ElementType::kFloat16, ElementType::kFloat32,
        ElementType::kFloat64}) {
    known.emplace_back(ElementName(candidate));
    if (type != known.back()) continue;
    array.type = candidate;
    found = true;
  }
  if (!found) {
    throw UserError("train.data.raw: unknown type \"" + type + "\"" + NearestHint(type, known) +
                    " (known: " + JoinNames(known) + ")");
  }
  std::vector<int64_t> one = shape;
  one.insert(one.begin(), 1);
  const size_t sample = CheckedBytes(one, array.type, "train.data.raw: " + path.string());
  const auto file = MappedFile::Open(path);
  if (sample == 0 || file->size() == 0 || file->size() % sample != 0) {
    throw UserError("train.data.raw: " + path.string() + " has " + std::to_string(file->size()) +
                    " bytes, which is no whole number of samples of " + std::to_string(sample) +
                    " bytes (" + type + " " + ShapeText(shape) + ")");
  }
  array.shape = shape;
  array.shape.insert(array.shape.begin(), static_cast<int64_t>(file->size() / sample));
  array.data = file->data();
  array.size_bytes = file->size();
  array.owner = file;
  return array;
}

}  // namespace itwin::worker
