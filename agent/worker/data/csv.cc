#include "agent/worker/data/csv.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <string_view>
#include <utility>

#include "agent/worker/data/mapped_file.h"
#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr size_t kMaxColumns = 100000;
constexpr size_t kShownCharacters = 40;  // of a bad field, in an error

// Walks over the fields of a mapped file. After Next, field() and line() are the newest field and
// its line.
class Scanner {
 public:
  Scanner(std::string_view text, std::string what) : rest_(text), what_(std::move(what)) {
    if (rest_.starts_with("\xef\xbb\xbf")) rest_.remove_prefix(3);  // byte order mark
  }

  bool done() const { return rest_.empty(); }
  int64_t line() const { return line_; }
  std::string_view field() const { return field_; }

  // Reads one field; true when it ended its line.
  bool Next() {
    if (!rest_.empty() && rest_.front() == '"') return NextQuoted();
    const size_t end = rest_.find_first_of(",\n");
    field_ = rest_.substr(0, end);
    if (end == std::string_view::npos) {
      rest_ = {};
      TrimReturn();
      return true;
    }
    const bool ended = rest_[end] == '\n';
    rest_.remove_prefix(end + 1);
    if (ended) {
      TrimReturn();
      ++next_line_;
    }
    return ended;
  }

  // True (and skipped) when the rest of the file begins with an empty line.
  bool SkipEmptyLine() {
    line_ = next_line_;
    const size_t bytes = rest_.starts_with("\r\n") ? 2 : rest_.starts_with("\n") ? 1 : 0;
    rest_.remove_prefix(bytes);
    next_line_ += bytes > 0;
    return bytes > 0;
  }

 private:
  void TrimReturn() {
    if (field_.ends_with('\r')) field_.remove_suffix(1);
  }

  bool NextQuoted() {
    unquoted_.clear();
    size_t at = 1;
    while (true) {
      const size_t quote = rest_.find('"', at);
      if (quote == std::string_view::npos) {
        throw UserError(what_ + ", line " + std::to_string(line_) +
                        ": a quoted field does not end");
      }
      unquoted_.append(rest_.substr(at, quote - at));
      if (quote + 1 < rest_.size() && rest_[quote + 1] == '"') {
        unquoted_ += '"';
        at = quote + 2;
        continue;
      }
      next_line_ += std::count(unquoted_.begin(), unquoted_.end(), '\n');
      rest_.remove_prefix(quote + 1);
      break;
    }
    field_ = unquoted_;
    if (rest_.empty()) return true;
    if (rest_.starts_with("\r\n")) rest_.remove_prefix(1);
    const char separator = rest_.front();
    if (separator != ',' && separator != '\n') {
      throw UserError(what_ + ", line " + std::to_string(line_) +
                      ": text follows a closing quote; double the quotes inside a quoted field");
    }
    rest_.remove_prefix(1);
    next_line_ += separator == '\n';
    return separator == '\n';
  }

  std::string_view rest_;
  const std::string what_;
  std::string unquoted_;
  std::string_view field_;
  int64_t line_ = 1;  // where the present record begins
  int64_t next_line_ = 1;
};

std::string_view Trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

bool ParseNumber(std::string_view text, double* value) {
  text = Trim(text);
  if (text.starts_with('+')) text.remove_prefix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size() && !text.empty();
}

template <typename T>
void Append(std::vector<std::byte>* bytes, T value) {
  const size_t at = bytes->size();
  bytes->resize(at + sizeof(T));
  std::memcpy(bytes->data() + at, &value, sizeof(T));
}

}  // namespace

CsvTable ReadCsv(const std::filesystem::path& path, const std::vector<std::string>& inputs,
                 const std::vector<std::string>& targets, bool target_is_class) {
  const auto file = MappedFile::Open(path);
  const std::string what = path.string();
  Scanner scanner({reinterpret_cast<const char*>(file->data()), file->size()}, what);
  if (inputs.empty()) throw UserError("train.data.csv.inputs: name at least one column");
  if (targets.empty()) throw UserError("train.data.csv.targets: name at least one column");
  if (target_is_class && targets.size() != 1) {
    throw UserError("train.data.csv.targets: with target_is_class there must be one column, not " +
                    std::to_string(targets.size()));
  }
  if (scanner.done()) throw UserError(what + ": is empty; its first line must name the columns");

  std::vector<std::string> header;
  bool ended = false;
  while (!ended) {
    ended = scanner.Next();
    header.emplace_back(Trim(scanner.field()));
    if (header.size() > kMaxColumns) throw UserError(what + ": has more than 100000 columns");
  }
  // Column -> where its number goes: 1 + position among the inputs, or -1 - position among the
  // targets.
  struct Use {
    size_t column;
    size_t position;
    bool is_target;
  };
  std::vector<Use> uses;
  for (const bool is_target : {false, true}) {
    const auto& names = is_target ? targets : inputs;
    for (size_t i = 0; i < names.size(); ++i) {
      const auto found = std::find(header.begin(), header.end(), names[i]);
      if (found == header.end()) {
        throw UserError(std::string("train.data.csv.") + (is_target ? "targets" : "inputs") +
                        ": no column \"" + names[i] + "\" in " + what +
                        NearestHint(names[i], header));
      }
      const auto times = std::count(header.begin(), header.end(), names[i]);
      if (times > 1) {
        throw UserError(std::string("train.data.csv.") + (is_target ? "targets" : "inputs") +
                        ": column \"" + names[i] + "\" does not tell which is meant: " + what +
                        " has it " + std::to_string(times) + " times");
      }
      if (is_target && std::find(inputs.begin(), inputs.end(), names[i]) != inputs.end()) {
        throw UserError("train.data.csv.targets: column \"" + names[i] +
                        "\" is among train.data.csv.inputs, too; a model that is given the target "
                        "learns nothing");
      }
      uses.push_back({static_cast<size_t>(found - header.begin()), i, is_target});
    }
  }
  std::sort(uses.begin(), uses.end(),
            [](const Use& a, const Use& b) { return a.column < b.column; });

  std::vector<std::byte> input_bytes, target_bytes;
  std::vector<float> input_row(inputs.size()), target_row(targets.size());
  int64_t rows = 0;
  while (!scanner.done()) {
    if (scanner.SkipEmptyLine()) continue;
    size_t column = 0;
    size_t next_use = 0;
    ended = false;
    while (!ended) {
      ended = scanner.Next();
      for (; next_use < uses.size() && uses[next_use].column == column; ++next_use) {
        const Use& use = uses[next_use];
        double value = 0;
        if (!ParseNumber(scanner.field(), &value)) {
          const std::string_view shown = scanner.field().substr(0, kShownCharacters);
          throw UserError(
              what + ", line " + std::to_string(scanner.line()) + ", column \"" + header[column] +
              "\": " +
              (shown.empty() ? "is empty" : "\"" + std::string(shown) + "\" is not a number"));
        }
        if (!use.is_target) {
          input_row[use.position] = static_cast<float>(value);
        } else if (!target_is_class) {
          target_row[use.position] = static_cast<float>(value);
        } else if (value < 0 || value != std::floor(value) || value > 1e9) {
          throw UserError(what + ", line " + std::to_string(scanner.line()) + ", column \"" +
                          header[column] +
                          "\": " + std::string(scanner.field().substr(0, kShownCharacters)) +
                          " is not a class number 0, 1, 2, …");
        } else {
          Append<int64_t>(&target_bytes, static_cast<int64_t>(value));
        }
      }
      ++column;
    }
    if (column != header.size()) {
      throw UserError(what + ", line " + std::to_string(scanner.line()) + ": has " +
                      std::to_string(column) + " fields, the header has " +
                      std::to_string(header.size()));
    }
    for (const float value : input_row) Append(&input_bytes, value);
    if (!target_is_class) {
      for (const float value : target_row) Append(&target_bytes, value);
    }
    ++rows;
  }
  if (rows == 0) throw UserError(what + ": has no rows below its header");

  CsvTable table;
  table.inputs = OwnedArray(ElementType::kFloat32, {rows, static_cast<int64_t>(inputs.size())},
                            std::move(input_bytes));
  table.targets = target_is_class ? OwnedArray(ElementType::kInt64, {rows}, std::move(target_bytes))
                                  : OwnedArray(ElementType::kFloat32,
                                               {rows, static_cast<int64_t>(targets.size())},
                                               std::move(target_bytes));
  return table;
}

}  // namespace itwin::worker
