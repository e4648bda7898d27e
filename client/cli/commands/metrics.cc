#include "client/cli/commands/commands.h"
#include "common/status_macros.h"

namespace itwin::cli {
namespace {

constexpr int kBucketsShown = 64;

}  // namespace

absl::StatusOr<int> Metrics(Session& session, const MetricsArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  const bool json = arguments.json || (session.json() && !arguments.csv);
  if (!json && !arguments.csv) {
    ITWIN_ASSIGN_OR_RETURN(std::vector<v1::SeriesBuckets> series,
                           gateway.QuerySeries(arguments.job, arguments.series, kBucketsShown));
    session.output().Series(series);
    return kOk;
  }
  // An error before the first line leaves standard output empty.
  std::unique_ptr<PointSink> sink;
  const auto open = [&] {
    if (!sink) sink = json ? MakeJsonPoints(session.terminal()) : MakeCsvPoints(session.terminal());
  };
  ITWIN_RETURN_IF_ERROR(gateway
                            .Points(arguments.job, arguments.series, 0,
                                    [&](const v1::PointBlock& block) {
                                      open();
                                      sink->OnBlock(block);
                                      return absl::OkStatus();
                                    })
                            .status());
  open();
  sink->OnEnd();
  return kOk;
}

}  // namespace itwin::cli
