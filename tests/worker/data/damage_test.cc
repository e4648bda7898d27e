// Files of every format with bytes changed, removed and added at random: a reader may read them or
// refuse them as the user's matter, and nothing else; above all it must not crash, hang, or ask for
// memory that a lying header names.
#include <sys/resource.h>

#include <new>
#include <random>

#include <gtest/gtest.h>

#include "agent/worker/data/cf_time.h"
#include "agent/worker/data/csv.h"
#include "agent/worker/data/idx.h"
#include "agent/worker/data/netcdf.h"
#include "agent/worker/data/npy.h"
#include "agent/worker/data/npz.h"
#include "agent/worker/data/raw.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using testing::Scratch;

constexpr int kRounds = 1000;
constexpr uint64_t kSeed = 20260101;

uint64_t PeakMemoryBytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

// Touches every element, so that an array that reaches outside its file is noticed.
uint64_t Sum(const Array& array) {
  uint64_t sum = 0;
  for (size_t i = 0; i < array.size_bytes; ++i) sum += std::to_integer<uint64_t>(array.data[i]);
  return sum;
}

void Damage(const Scratch& scratch, const std::string& name,
            const std::function<void(const std::filesystem::path&)>& read) {
  const std::string whole = scratch.Read(name);
  ASSERT_GT(whole.size(), 10u);
  std::mt19937_64 random(kSeed);
  const uint64_t before = PeakMemoryBytes();
  int refused = 0;
  for (int round = 0; round < kRounds; ++round) {
    std::string bytes = whole;
    const auto changes = 1 + random() % 4;
    for (uint64_t change = 0; change < changes; ++change) {
      // Most formats keep what matters in their first and last bytes.
      const size_t reach = random() % 2 == 0 ? std::min<size_t>(bytes.size(), 160) : bytes.size();
      const size_t at = random() % 4 == 0 ? bytes.size() - 1 - random() % reach : random() % reach;
      switch (random() % 5) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
          break;
        case 2:
          bytes[at] = static_cast<char>(0xff);
          break;
        case 3:
          bytes.resize(std::max<size_t>(1, at));
          break;
        default:
          bytes.insert(at, 1 + random() % 8, static_cast<char>(random()));
          break;
      }
    }
    scratch.Write("damaged", bytes);
    try {
      read(scratch / "damaged");
    } catch (const WorkerError&) {
      ++refused;
    } catch (const std::exception& error) {
      FAIL() << "round " << round << " of seed " << kSeed << ": " << error.what();
    }
  }
  EXPECT_GT(refused, kRounds / 20) << "the damage is not noticed, or the test does none";
  EXPECT_LT(PeakMemoryBytes() - before, 256u << 20) << "a header was believed";
}

TEST(Damage, Npy) {
  const Scratch scratch;
  scratch.Python("import numpy as np; np.save('a.npy', np.arange(60, dtype='f4').reshape(3, 20))");
  Damage(scratch, "a.npy", [](const auto& path) { Sum(ReadNpy(path)); });
}

TEST(Damage, Npz) {
  const Scratch scratch;
  scratch.Python(
      "import numpy as np; np.savez_compressed('a.npz', x=np.arange(600), y=np.ones((5, 4), "
      "'f4'))\n"
      "np.savez('b.npz', x=np.arange(20), y=np.ones((5, 4), 'f4'))");
  for (const char* name : {"a.npz", "b.npz"}) {
    Damage(scratch, name, [](const auto& path) {
      for (const auto& [array_name, array] : ReadNpz(path)) Sum(array);
    });
  }
}

TEST(Damage, Idx) {
  const Scratch scratch;
  scratch.Write("a.idx", std::string({0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 6}) +
                             std::string(120, 'x'));
  Damage(scratch, "a.idx", [](const auto& path) { Sum(ReadIdx(path)); });
}

TEST(Damage, Csv) {
  const Scratch scratch;
  scratch.Write("a.csv", "a,b,\"c, d\"\n1,2,3\n\"4\",5,6\n7.5,1e3,\"8\"\n");
  Damage(scratch, "a.csv",
         [](const auto& path) { Sum(ReadCsv(path, {"b"}, {"a"}, false).inputs); });
}

TEST(Damage, NetcdfClassic) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np
from scipy.io import netcdf_file
with netcdf_file('a.nc', 'w') as f:
    f.createDimension('time', 5)
    f.createDimension('lat', 4)
    for name in 'UV':
        f.createVariable(name, 'f4', ('time', 'lat'))[:] = np.ones((5, 4))
        f.variables[name].missing_value = np.float32(-99.9)
)");
  Damage(scratch, "a.nc", [](const auto& path) { Sum(ReadNetcdf(path, {"U", "V"}).field); });
}

TEST(Damage, Raw) {
  const Scratch scratch;
  scratch.Write("a.raw", std::string(160, 'x'));
  Damage(scratch, "a.raw", [](const auto& path) { Sum(ReadRaw(path, "float32", {4})); });
}

TEST(Damage, TimeUnits) {
  const Scratch scratch;
  scratch.Write("a.txt", "hours since 1901-01-15 00:00:00");
  Damage(scratch, "a.txt", [&](const auto&) {
    const std::string text = scratch.Read("damaged");
    const double seconds = CfSeconds(3, text, "", "time");
    StepsWithin({{seconds}, ""}, text, "field");
  });
}

}  // namespace
}  // namespace itwin::worker
