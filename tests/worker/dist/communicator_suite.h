// What every communicator must do. With `on_device` the buffers are called memory of a device, for
// communicators that take it; a device that is the CPU will do.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "agent/worker/dist/communicator.h"
#include "agent/worker/dist/half.h"

namespace itwin::worker::testing {

inline Buffer Flagged(Buffer buffer, bool on_device) {
  buffer.on_device = on_device;
  return buffer;
}

inline void CheckHalves(Communicator& c, bool on_device = false) {
  const int n = c.size();
  for (const ElementType type : {ElementType::kFloat16, ElementType::kBfloat16}) {
    const bool brain = type == ElementType::kBfloat16;
    const auto to = [&](float x) { return brain ? ToBfloat16(x) : ToFloat16(x); };
    const auto from = [&](uint16_t x) { return brain ? FromBfloat16(x) : FromFloat16(x); };
    std::vector<uint16_t> halves = {to(0.5f), to(static_cast<float>(c.rank()) - 1)};
    c.AllReduce({halves.data(), 2, type, on_device}, Reduction::kSum)->Wait();
    EXPECT_EQ(from(halves[0]), 0.5f * static_cast<float>(n));
    EXPECT_EQ(from(halves[1]), static_cast<float>(n * (n - 1)) / 2 - static_cast<float>(n));
    halves = {to(static_cast<float>(-c.rank())), to(static_cast<float>(c.rank()))};
    c.AllReduce({halves.data(), 2, type, on_device}, Reduction::kMax)->Wait();
    EXPECT_EQ(from(halves[0]), 0.0f);
    EXPECT_EQ(from(halves[1]), static_cast<float>(n - 1));
  }
}

// Round a ring, two messages each, which must arrive in order.
inline void CheckMessages(Communicator& c, bool on_device = false) {
  const auto of = [&](auto values) { return Flagged(BufferOf(values), on_device); };
  const int next = (c.rank() + 1) % c.size(), before = (c.rank() + c.size() - 1) % c.size();
  std::vector<int64_t> first(1000, c.rank()), second(3, 10 + c.rank()), got(1000), more(3);
  std::vector<std::unique_ptr<Work>> work;
  if (c.size() > 1) {
    work.push_back(c.Recv(of(std::span(got)), before));
    work.push_back(c.Recv(of(std::span(more)), before));
  }
  work.push_back(c.Send(of(std::span(first)), next));
  work.push_back(c.Send(of(std::span(second)), next));
  if (c.size() == 1) {
    work.push_back(c.Recv(of(std::span(got)), before));
    work.push_back(c.Recv(of(std::span(more)), before));
  }
  for (auto& w : work) w->Wait();
  EXPECT_EQ(got, std::vector<int64_t>(1000, before));
  EXPECT_EQ(more, std::vector<int64_t>(3, 10 + before));
}

// Odd and even ranks, in reverse order.
inline void CheckSplit(Communicator& c, bool on_device = false) {
  const auto of = [&](auto values) { return Flagged(BufferOf(values), on_device); };
  const std::unique_ptr<Communicator> part = c.Split(c.rank() % 2, -c.rank());
  const int size = (c.size() + 1 - c.rank() % 2) / 2;
  EXPECT_EQ(part->size(), size);
  EXPECT_EQ(part->rank(), size - 1 - c.rank() / 2);
  int64_t sum = c.rank();
  part->AllReduce(of(std::span(&sum, 1)), Reduction::kSum)->Wait();
  int64_t expected = 0;
  for (int r = c.rank() % 2; r < c.size(); r += 2) expected += r;
  EXPECT_EQ(sum, expected);
  CheckMessages(*part, on_device);
}

// What every communicator must do; the program tests run it over MPI as --self-test.
inline void CheckCollectives(Communicator& c, bool on_device = false) {
  const auto of = [&](auto values) { return Flagged(BufferOf(values), on_device); };
  std::vector<float> floats = {1.0f + static_cast<float>(c.rank()), 2.0f};
  c.AllReduce(of(std::span(floats)), Reduction::kSum)->Wait();
  const int n = c.size();
  EXPECT_EQ(floats, (std::vector<float>{static_cast<float>(n * (n + 1) / 2),
                                        2.0f * static_cast<float>(n)}));
  std::vector<int64_t> most = {c.rank(), -c.rank()};
  c.AllReduce(of(std::span(most)), Reduction::kMax)->Wait();
  EXPECT_EQ(most, (std::vector<int64_t>{n - 1, 0}));
  double from_last = c.rank();
  c.Broadcast(of(std::span(&from_last, 1)), n - 1)->Wait();
  EXPECT_EQ(from_last, n - 1);
  int64_t mine = 10 * c.rank();
  std::vector<int64_t> all(n);
  c.AllGather(of(std::span(&mine, 1)), of(std::span(all)))->Wait();
  for (int r = 0; r < n; ++r) EXPECT_EQ(all[r], 10 * r);
  std::vector<int64_t> in_place(static_cast<size_t>(n), -1);
  in_place[c.rank()] = 7 * c.rank();
  c.AllGather(of(std::span(in_place).subspan(c.rank(), 1)), of(std::span(in_place)))
      ->Wait();
  for (int r = 0; r < n; ++r) EXPECT_EQ(in_place[r], 7 * r);
  std::vector<double> parts(2 * static_cast<size_t>(n)), part(2);
  for (int r = 0; r < n; ++r) parts[2 * r] = parts[2 * r + 1] = 100.0 * r + c.rank();
  c.ReduceScatter(of(std::span(parts)), of(std::span(part)), Reduction::kSum)->Wait();
  const double sum = 100.0 * c.rank() * n + n * (n - 1) / 2.0;
  EXPECT_EQ(part, (std::vector<double>{sum, sum}));
  c.Barrier()->Wait();
  CheckHalves(c, on_device);
  CheckMessages(c, on_device);
  EXPECT_EQ(BroadcastText(c, c.rank() == 0 ? "hello" : "", 0), "hello");
  EXPECT_EQ(BroadcastText(c, "", 0), "");
}

}  // namespace itwin::worker::testing
