#include "agent/worker/checkpoint/tensor_parts.h"

#include <algorithm>
#include <set>

#include <nlohmann/json.hpp>

#include "agent/worker/dist/gather_texts.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

using Json = nlohmann::json;

int64_t Elements(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

Json EntryOf(const TensorPart& part) {
  return {part.name, static_cast<int>(part.values.scalar_type()), part.shape};
}

}  // namespace

std::vector<TensorPart> EvenParts(const NamedTensors& replicated, int rank, int ranks) {
  int64_t total = 0;
  for (const auto& [name, tensor] : replicated) total += static_cast<int64_t>(tensor.nbytes());
  const int64_t begin = total / ranks * rank + total % ranks * rank / ranks;
  const int64_t end = total / ranks * (rank + 1) + total % ranks * (rank + 1) / ranks;
  std::vector<TensorPart> parts;
  int64_t start = 0;  // of the tensor, in bytes
  for (const auto& [name, tensor] : replicated) {
    const auto element = static_cast<int64_t>(tensor.element_size());
    const auto cut = [&](int64_t at) {  // the first element that begins at or after this byte
      const int64_t inside = std::max<int64_t>(at - start, 0);
      return std::min((inside + element - 1) / element, tensor.numel());
    };
    const int64_t first = cut(begin), last = cut(end);
    parts.push_back({name, tensor.sizes().vec(), first,
                     tensor.detach().reshape({-1}).narrow(0, first, last - first)});
    start += static_cast<int64_t>(tensor.nbytes());
  }
  return parts;
}

std::vector<TensorPart> WholeParts(const NamedTensors& tensors) { return EvenParts(tensors, 0, 1); }

std::string DescribeParts(const std::vector<TensorPart>& parts) {
  Json text = Json::array();
  for (const TensorPart& part : parts) {
    text.push_back({EntryOf(part), part.first, part.values.numel()});
  }
  return text.dump();
}

FileLayout::FileLayout(const std::vector<TensorPart>& mine, Communicator& communicator,
                       const std::string& file) {
  // Rank 0's list first, so that the others need to tell only what it does not have.
  Json list = Json::array();
  if (communicator.rank() == 0) {
    std::set<std::string> listed;
    for (const TensorPart& part : mine) {
      if (listed.insert(part.name).second) list.push_back(EntryOf(part));
    }
  }
  list = Json::parse(BroadcastText(communicator, list.dump(), 0));
  std::map<std::string, size_t> index;
  for (size_t i = 0; i < list.size(); ++i) index.emplace(list[i][0], i);

  Json extra = Json::array(), ranges = Json::array();
  for (const TensorPart& part : mine) {
    const Json entry = EntryOf(part);
    const auto known = index.find(part.name);
    if (known == index.end() || list[known->second] != entry) extra.push_back(entry);
    if (part.values.numel() > 0) ranges.push_back({part.name, part.first, part.values.numel()});
  }
  std::map<std::string, std::vector<std::pair<int64_t, int64_t>>> held;
  for (const std::string& text :
       GatherTexts(communicator, Json{{"extra", extra}, {"ranges", ranges}}.dump())) {
    const Json of_rank = Json::parse(text);
    for (const Json& entry : of_rank.at("extra")) {
      const auto [known, fresh] = index.emplace(entry[0], list.size());
      if (fresh) {
        list.push_back(entry);
      } else if (list[known->second] != entry) {
        throw AppError(file + ": the ranks disagree about type or shape of " +
                       entry[0].get<std::string>());
      }
    }
    for (const Json& range : of_rank.at("ranges")) {
      held[range[0]].emplace_back(range[1].get<int64_t>(), range[2].get<int64_t>());
    }
  }

  std::vector<SafetensorsEntry> entries;
  for (const Json& entry : list) {
    entries.push_back({.name = entry[0],
                       .type = static_cast<at::ScalarType>(entry[1].get<int>()),
                       .shape = entry[2].get<std::vector<int64_t>>()});
  }
  header_ = SafetensorsHeader(entries);
  size_ = static_cast<int64_t>(header_.size());
  for (const SafetensorsEntry& entry : entries) {
    auto& ranges_of = held[entry.name];
    std::sort(ranges_of.begin(), ranges_of.end());
    int64_t next = 0;
    for (const auto& [first, count] : ranges_of) {
      if (first != next) {
        throw AppError(file + ": element " + std::to_string(std::min(first, next)) + " of " +
                       entry.name + (first > next ? " is held by no rank" : " is held twice"));
      }
      next = first + count;
    }
    if (next != Elements(entry.shape)) {
      throw AppError(file + ": element " + std::to_string(next) + " of " + entry.name +
                     " is held by no rank");
    }
    places_[entry.name] = {.offset = static_cast<int64_t>(header_.size()) + entry.begin,
                           .element_size = static_cast<int64_t>(c10::elementSize(entry.type))};
    size_ = static_cast<int64_t>(header_.size()) + entry.end;
  }
}

int64_t FileLayout::OffsetOf(const TensorPart& part) const {
  const Place& place = places_.at(part.name);
  return place.offset + part.first * place.element_size;
}

}  // namespace itwin::worker
