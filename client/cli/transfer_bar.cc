#include "client/cli/transfer_bar.h"

#include <algorithm>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cli/render.h"

namespace itwin::cli {
namespace {

constexpr absl::Duration kRedrawInterval = absl::Milliseconds(80);
constexpr int kBarWidth = 24;

const char* Verb(client::TransferProgress::Phase phase) {
  switch (phase) {
    case client::TransferProgress::Phase::kHashing: return "reading";
    case client::TransferProgress::Phase::kUploading: return "sending";
    case client::TransferProgress::Phase::kDownloading: return "fetching";
  }
  return "";
}

}  // namespace

void TransferBar::Show(const client::TransferProgress& progress) {
  if (!terminal_.err_is_terminal) return;
  const absl::Time now = absl::Now();
  if (now - drawn_at_ < kRedrawInterval) return;
  drawn_at_ = now;
  const Glyphs glyphs{terminal_.unicode};
  const double fraction =
      progress.total_bytes > 0 ? static_cast<double>(progress.done_bytes) / static_cast<double>(progress.total_bytes) : 1;
  const std::string line =
      absl::StrCat(Verb(progress.phase), " ", Bar(fraction, kBarWidth, glyphs), " ", BytesText(progress.done_bytes), " of ",
                   BytesText(progress.total_bytes), "  ", Printable(std::filesystem::path(progress.file).filename().string()));
  *terminal_.err << "\r\x1b[K" << Truncated(line, std::max(1, terminal_.width() - 1), glyphs) << std::flush;
  drawn_ = true;
}

void TransferBar::Clear() {
  if (drawn_) *terminal_.err << "\r\x1b[K" << std::flush;
  drawn_ = false;
}

}  // namespace itwin::cli
