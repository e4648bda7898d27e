#include "agent/worker/dist/gather_texts.h"

#include <algorithm>
#include <cstring>

namespace itwin::worker {

std::vector<std::string> GatherTexts(Communicator& communicator, const std::string& mine) {
  if (communicator.size() == 1) return {mine};
  const auto ranks = static_cast<size_t>(communicator.size());
  int64_t size = static_cast<int64_t>(mine.size());
  std::vector<int64_t> sizes(ranks);
  communicator.AllGather(BufferOf(std::span(&size, 1)), BufferOf(std::span(sizes)))->Wait();
  const auto longest = static_cast<size_t>(*std::max_element(sizes.begin(), sizes.end()));
  std::vector<std::string> texts(ranks);
  if (longest == 0) return texts;
  std::vector<char> padded(longest), all(longest * ranks);
  std::memcpy(padded.data(), mine.data(), mine.size());
  communicator.AllGather(BufferOf(std::span(padded)), BufferOf(std::span(all)))->Wait();
  for (size_t r = 0; r < ranks; ++r) {
    texts[r].assign(all.data() + r * longest, static_cast<size_t>(sizes[r]));
  }
  return texts;
}

}  // namespace itwin::worker
