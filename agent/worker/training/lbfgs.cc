#include "agent/worker/training/lbfgs.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>

#include "agent/worker/error.h"
#include "agent/worker/training/optimizer_kernels.h"

namespace itwin::worker {
namespace {

using Flat = LbfgsMinimizer::Flat;

// PyTorch's constants.
constexpr double kLeastCurvature = 1e-10;  // of a pair that is remembered
constexpr double kDecrease = 1e-4, kFlatness = 0.9;  // Wolfe's conditions
constexpr double kSmallestBracket = 1e-9;  // in what a parameter moves
constexpr int kMostTrials = 25;            // of one line search
constexpr int64_t kChunk = 1 << 16;  // elements; sums are made of sums of chunks, whatever the threads
constexpr int64_t kFigures = 5;      // beside one for each pair

// The sum of f(first element, elements) over the chunks of a tensor.
template <typename F>
double SumOfChunks(int64_t n, F f) {
  std::vector<double> sums(static_cast<size_t>((n + kChunk - 1) / kChunk));
  at::parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      sums[static_cast<size_t>(c)] = f(c * kChunk, std::min(kChunk, n - c * kChunk));
  });
  double sum = 0;
  for (const double s : sums) sum += s;
  return sum;
}

template <typename F>
void ForType(const at::Tensor& tensor, F f) {
  if (tensor.scalar_type() == at::kFloat) {
    f(static_cast<float*>(nullptr));
  } else {
    f(static_cast<double*>(nullptr));
  }
}

double Dot(const Flat& a, const Flat& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!a[i].is_cpu()) {
      sum += a[i].to(at::kDouble).dot(b[i].to(at::kDouble)).item<double>();
      continue;
    }
    ForType(a[i], [&]<typename T>(T*) {
      const T *x = a[i].data_ptr<T>(), *y = b[i].data_ptr<T>();
      sum += SumOfChunks(a[i].numel(), [&](int64_t first, int64_t n) { return kernels::Dot(x + first, y + first, n); });
    });
  }
  return sum;
}

double SumOfAbsolutes(const Flat& a) {
  double sum = 0;
  for (const at::Tensor& t : a) {
    if (!t.is_cpu()) {
      sum += t.abs().sum(at::kDouble).item<double>();
      continue;
    }
    ForType(t, [&]<typename T>(T*) {
      const T* x = t.data_ptr<T>();
      sum += SumOfChunks(t.numel(), [&](int64_t first, int64_t n) { return kernels::SumOfAbsolutes(x + first, n); });
    });
  }
  return sum;
}

double Largest(const Flat& a) {  // absolute
  double largest = 0;
  for (const at::Tensor& t : a) {
    const double of_range = t.abs().max().item<double>();
    if (!(of_range <= largest)) largest = of_range;  // a NaN, too
  }
  return largest;
}

void AddScaled(const Flat& to, const Flat& from, double factor) {
  for (size_t i = 0; i < to.size(); ++i) {
    if (!to[i].is_cpu()) {
      to[i].add_(from[i], factor);
      continue;
    }
    ForType(to[i], [&]<typename T>(T*) {
      T* x = to[i].data_ptr<T>();
      const T* y = from[i].data_ptr<T>();
      at::parallel_for(0, to[i].numel(), kChunk, [&](int64_t first, int64_t last) {
        kernels::AddScaled(x + first, y + first, last - first, factor);
      });
    });
  }
}

void Copy(const Flat& from, const Flat& to) {
  for (size_t i = 0; i < to.size(); ++i) to[i].copy_(from[i]);
}
Flat Clone(const Flat& flat) {
  Flat copy;
  for (const at::Tensor& t : flat) copy.push_back(t.clone());
  return copy;
}

}  // namespace

struct LbfgsMinimizer::Point {
  double length = 0;  // in directions, from the start
  double loss = 0, slope = 0;
  Flat gradient{};
};

// Looks along a line for a point that satisfies the strong Wolfe conditions: first for two points with
// one between them, then between these. A loss that is not finite is too high.
class LbfgsMinimizer::WolfeSearch {
 public:
  using Try = std::function<Point(double length)>;
  // `largest` is the direction's largest element.
  WolfeSearch(const Point& origin, double largest, Try try_at)
      : origin_(origin), largest_(largest), try_(std::move(try_at)) {}

  Point Run(double length) {
    Point low = origin_, high = try_(length);
    for (; trials_ < kMostTrials; ++trials_) {
      if (TooHigh(high) || (trials_ > 1 && high.loss >= low.loss)) break;
      if (FlatEnough(high)) return high;
      if (high.slope >= 0) break;
      const double next = Interpolate(low, high, high.length + 0.01 * (high.length - low.length), 10 * high.length);
      low = std::move(high);
      high = try_(next);
    }
    if (trials_ == kMostTrials) low = origin_;
    return Zoom({std::move(low), std::move(high)});
  }

 private:
  // Where the cubic through both points has its minimum, kept within the bounds.
  static double Interpolate(const Point& a, const Point& b, double low, double high) {
    const double d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.length - b.length);
    const double d2 = std::sqrt(d1 * d1 - a.slope * b.slope);  // NaN where there is no minimum
    const auto from = [&](const Point& x, const Point& y) {  // x before y
      return y.length - (y.length - x.length) * ((y.slope + d2 - d1) / (y.slope - x.slope + 2 * d2));
    };
    const double at = a.length <= b.length ? from(a, b) : from(b, a);
    return std::isnan(at) ? (low + high) / 2 : std::min(std::max(at, low), high);
  }

  bool TooHigh(const Point& p) const { return !(p.loss <= origin_.loss + kDecrease * p.length * origin_.slope); }
  bool FlatEnough(const Point& p) const { return std::abs(p.slope) <= -kFlatness * origin_.slope; }

  Point Zoom(std::array<Point, 2> bracket) {
    const auto lower = [&] { return bracket[1].loss < bracket[0].loss ? 1 : 0; };
    size_t low = lower();
    for (; trials_ < kMostTrials; ++trials_) {
      if (std::abs(bracket[1].length - bracket[0].length) * largest_ < kSmallestBracket) break;
      Point point = try_(Between(bracket[0], bracket[1]));
      Point &lowest = bracket[low], &other = bracket[1 - low];
      if (TooHigh(point) || point.loss >= lowest.loss) {
        other = std::move(point);
        low = lower();
        continue;
      }
      const bool done = FlatEnough(point);
      if (!done && point.slope * (other.length - lowest.length) >= 0) other = std::move(lowest);
      lowest = std::move(point);
      if (done) break;
    }
    return bracket[low];
  }

  // The cubic's minimum; the second time in a row that it is next to an end, a tenth away from there.
  double Between(const Point& a, const Point& b) {
    const auto [low, high] = std::minmax(a.length, b.length);
    double length = Interpolate(a, b, low, high);
    const double margin = 0.1 * (high - low);
    if (std::min(high - length, length - low) >= margin) {
      close_ = false;
    } else if (!close_ && length < high && length > low) {
      close_ = true;
    } else {
      length = high - length < length - low ? high - margin : low + margin;
      close_ = false;
    }
    return length;
  }

  const Point& origin_;
  const double largest_;
  const Try try_;
  int trials_ = 0;
  bool close_ = false;
};

std::vector<std::string> LbfgsMinimizer::StateNames(const Lbfgs& options) {
  std::vector<std::string> names = {"direction", "gradient"};
  for (int i = 0; i < options.history; ++i) {
    names.push_back("y" + std::to_string(i));
    names.push_back("s" + std::to_string(i));
  }
  return names;
}

LbfgsMinimizer::LbfgsMinimizer(const Lbfgs& options, const std::vector<FlatRange>& ranges,
                               const std::vector<std::vector<at::Tensor>>& state)
    : options_(options),
      y_(static_cast<size_t>(options.history)),
      s_(y_.size()),
      rho_(y_.size()) {
  for (size_t r = 0; r < ranges.size(); ++r) {
    values_.push_back(ranges[r].values);
    gradients_.push_back(ranges[r].gradients);
    direction_.push_back(state[r][0]);
    previous_gradient_.push_back(state[r][1]);
    for (size_t i = 0; i < y_.size(); ++i) {
      y_[i].push_back(state[r][2 + 2 * i]);
      s_[i].push_back(state[r][3 + 2 * i]);
    }
  }
}

Flat LbfgsMinimizer::TakeGradients() {
  Flat taken = Clone(gradients_);
  for (at::Tensor& gradient : gradients_) gradient.zero_();
  return taken;
}

LbfgsMinimizer::Result LbfgsMinimizer::Step(double rate, const Evaluate& evaluate) {
  Result result{.first_loss = evaluate(), .evaluations = 1};
  result.last_loss = result.first_loss;
  double& loss = result.last_loss;
  Flat gradient = TakeGradients();
  if (!std::isfinite(loss) || Largest(gradient) <= options_.tolerance_grad) return result;
  for (int iteration = 1; iteration <= options_.max_iter; ++iteration) {
    ++iterations_;
    if (iterations_ > 1) Remember(gradient);
    FindDirection(gradient);
    Copy(gradient, previous_gradient_);
    const double loss_before = loss, slope = Dot(gradient, direction_);
    length_ = iterations_ == 1 ? std::min(1.0, 1 / SumOfAbsolutes(gradient)) * rate : rate;
    if (slope > -options_.tolerance_change) break;
    const double largest = Largest(direction_);
    if (options_.strong_wolfe) {
      Point found = SearchLine({.loss = loss, .slope = slope, .gradient = std::move(gradient)}, largest,
                               evaluate, &result.evaluations);
      length_ = found.length;
      loss = found.loss;
      gradient = std::move(found.gradient);
    } else {
      AddScaled(values_, direction_, length_);
      if (iteration == options_.max_iter) break;  // where it has come is not looked at
      loss = evaluate();
      ++result.evaluations;
      gradient = TakeGradients();
    }
    if (result.evaluations >= options_.max_eval || Largest(gradient) <= options_.tolerance_grad ||
        largest * length_ <= options_.tolerance_change ||
        !(std::abs(loss - loss_before) >= options_.tolerance_change)) {
      break;
    }
  }
  return result;
}

// Ends with the parameters at the point that it returns.
LbfgsMinimizer::Point LbfgsMinimizer::SearchLine(const Point& origin, double largest, const Evaluate& evaluate,
                                                 int* evaluations) {
  const Flat start = Clone(values_);
  const auto move = [&](double length) {
    Copy(start, values_);
    AddScaled(values_, direction_, length);
  };
  WolfeSearch search(origin, largest, [&](double length) {
    move(length);
    ++*evaluations;
    Point point{.length = length, .loss = evaluate()};
    point.gradient = TakeGradients();
    point.slope = Dot(point.gradient, direction_);
    return point;
  });
  Point found = search.Run(length_);
  move(found.length);
  return found;
}

// The pair of the step before, where the loss is convex along it.
void LbfgsMinimizer::Remember(const Flat& gradient) {
  Flat y, s;
  for (size_t r = 0; r < gradient.size(); ++r) {
    y.push_back(gradient[r].sub(previous_gradient_[r]));
    s.push_back(direction_[r].mul(length_));
  }
  const double ys = Dot(y, s);
  if (!(ys > kLeastCurvature)) return;
  const size_t slot = Slot(pairs_);
  if (pairs_ == rho_.size()) {
    oldest_ = Slot(1);
  } else {
    ++pairs_;
  }
  Copy(y, y_[slot]);
  Copy(s, s_[slot]);
  rho_[slot] = 1 / ys;
  scale_ = ys / Dot(y, y);
}

// Minus the inverse Hessian, as the pairs have it, times the gradient.
void LbfgsMinimizer::FindDirection(const Flat& gradient) {
  for (size_t r = 0; r < gradient.size(); ++r) direction_[r].copy_(gradient[r].neg());
  std::vector<double> alpha(pairs_);
  for (size_t i = pairs_; i-- > 0;) {
    const size_t slot = Slot(i);
    alpha[i] = Dot(s_[slot], direction_) * rho_[slot];
    AddScaled(direction_, y_[slot], -alpha[i]);
  }
  for (at::Tensor& d : direction_) d.mul_(scale_);
  for (size_t i = 0; i < pairs_; ++i) {
    const size_t slot = Slot(i);
    AddScaled(direction_, s_[slot], alpha[i] - Dot(y_[slot], direction_) * rho_[slot]);
  }
}

at::Tensor LbfgsMinimizer::figures() const {
  at::Tensor figures = at::full({kFigures + options_.history}, 0.0, at::TensorOptions().dtype(at::kDouble));
  double* at = figures.data_ptr<double>();
  *at++ = static_cast<double>(iterations_);
  *at++ = static_cast<double>(oldest_);
  *at++ = static_cast<double>(pairs_);
  *at++ = length_;
  *at++ = scale_;
  std::copy(rho_.begin(), rho_.end(), at);
  return figures;
}

void LbfgsMinimizer::SetFigures(const at::Tensor& figures) {
  const bool fits = figures.scalar_type() == at::kDouble && figures.numel() == kFigures + options_.history;
  const double* at = fits ? figures.data_ptr<double>() : nullptr;
  if (!fits || !(at[1] >= 0 && at[1] < options_.history && at[2] >= 0 && at[2] <= options_.history))
    throw AppError("the checkpoint's optimiser state does not fit: the figures of lbfgs are those of other options");
  iterations_ = static_cast<int64_t>(*at++);
  oldest_ = static_cast<size_t>(*at++);
  pairs_ = static_cast<size_t>(*at++);
  length_ = *at++;
  scale_ = *at++;
  std::copy_n(at, rho_.size(), rho_.begin());
}

}  // namespace itwin::worker
