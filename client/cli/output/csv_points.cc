#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "client/cli/output/output.h"

namespace itwin::cli {
namespace {

// RFC 4180, one header line. Values have all their digits.
class CsvPoints : public PointSink {
 public:
  explicit CsvPoints(const Terminal& terminal) : out_(*terminal.out) { out_ << "series,attempt,step,time_us,value\n"; }
  void OnBlock(const v1::PointBlock& block) override {
    const bool quoted = block.series().find_first_of(",\"\r\n") != std::string::npos;
    const std::string series =
        quoted ? absl::StrCat("\"", absl::StrReplaceAll(block.series(), {{"\"", "\"\""}}), "\"") : block.series();
    for (int i = 0; i < block.values_size(); ++i) {
      out_ << series << ',' << block.attempt() << ',' << block.steps(i) << ',' << block.times_us(i) << ','
           << absl::StrFormat("%.17g", block.values(i)) << '\n';
    }
  }
  void OnEnd() override { out_.flush(); }

 private:
  std::ostream& out_;
};

}  // namespace

std::unique_ptr<PointSink> MakeCsvPoints(const Terminal& terminal) { return std::make_unique<CsvPoints>(terminal); }

}  // namespace itwin::cli
