#include "agent/worker/model/network.h"

#include <torch/nn.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

#include "agent/worker/data/array.h"
#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"
#include "agent/worker/model/options.h"

namespace itwin::worker {
namespace {

namespace nn = torch::nn;

constexpr int64_t kMaxWidth = 16384;  // channels or features of a layer
constexpr int64_t kMaxClasses = 1000000;
constexpr int64_t kSmallImage =
    64;  // up to this many rows, resnet18 keeps the resolution in its first layer

// A piece of a network that runs after the one before: what a pipeline can cut between.
struct Unit {
  std::vector<std::string> prefixes;  // of its parameters' names
  std::function<at::Tensor(const at::Tensor&)> forward;
};

class Net : public nn::Module {
 public:
  virtual at::Tensor Forward(const at::Tensor& input) = 0;
  // Networks that can be cut say where.
  virtual std::vector<Unit> Units() { return {}; }

  // This rank's part of a parameter that is whole so far; the others' parts are given up.
  void KeepPart(const std::string& name, at::Tensor parameter, int64_t dim,
                const MeshPlace& place) {
    const int64_t size = parameter.size(dim) / place.parts;
    parts_[name] = {parameter.sizes().vec(), dim, place.part * size};
    const torch::NoGradGuard no_grad;
    parameter.set_data(parameter.narrow(dim, place.part * size, size).clone());
  }
  const std::map<std::string, ParameterPart>& parts() const { return parts_; }

 private:
  std::map<std::string, ParameterPart> parts_;
};

// A linear layer whose outputs are shared out over the ranks, and one whose inputs are.
void ShareOutputs(Net* net, const std::string& name, nn::Linear& layer, const MeshPlace& place) {
  net->KeepPart(name + ".weight", layer->weight, 0, place);
  net->KeepPart(name + ".bias", layer->bias, 0, place);
}
void ShareInputs(Net* net, const std::string& name, nn::Linear& layer, const MeshPlace& place) {
  net->KeepPart(name + ".weight", layer->weight, 1, place);
}
at::Tensor ForwardOfSharedInputs(nn::Linear& layer, const at::Tensor& x, Communicator& ranks) {
  return SumOfParts(at::linear(x, layer->weight), ranks) + layer->bias;
}

void CheckShares(const std::string& option, int64_t size, const MeshPlace& place) {
  if (size % place.parts == 0) return;
  throw UserError(OptionReader::Path(option) + ": " + std::to_string(size) +
                  " cannot be shared by " + std::to_string(place.parts) +
                  " ranks (train.mesh.tensor); make it a multiple");
}
void RefuseSharedDropout(double dropout, const MeshPlace& place) {
  if (place.tensor == nullptr || dropout == 0) return;
  throw UserError(OptionReader::Path("dropout") +
                  ": ranks that share layers (train.mesh.tensor) would drop different things; set "
                  "it to 0");
}

WorkerError DoesNotFit(const std::string& model, const SampleForm& form, const std::string& needs) {
  return UserError("train.model.builtin: " + model +
                   " does not fit the data, whose samples have input " + ShapeText(form.input) +
                   " and target " + ShapeText(form.target) +
                   (form.classes > 0 ? " (class numbers)" : "") + "; it needs " + needs);
}

int64_t Elements(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// What a network with one vector of outputs per sample puts out.
struct VectorOutput {
  int64_t size = 0;
  std::vector<int64_t> shape;  // per sample; empty: [size]

  at::Tensor Shaped(const at::Tensor& output) const {
    if (shape.size() < 2) return output;
    std::vector<int64_t> full = shape;
    full.insert(full.begin(), -1);
    return output.view(full);
  }
};

VectorOutput OutputFor(const std::string& model, const SampleForm& form, OptionReader* options) {
  const int64_t given = options->Int("classes", form.classes, 0, kMaxClasses);
  if (form.classes == 0) {
    if (given != 0) {
      throw UserError(OptionReader::Path("classes") +
                      ": the target holds floats, not class numbers, so there are none");
    }
    return {Elements(form.target), form.target};
  }
  if (given < form.classes) {
    throw UserError(OptionReader::Path("classes") + ": " + std::to_string(given) +
                    " is too few; the data have " + std::to_string(form.classes) + " classes");
  }
  if (Elements(form.target) != 1) throw DoesNotFit(model, form, "one class number per sample");
  return {given, {}};
}

void CheckChannels(const std::string& model, const SampleForm& form, OptionReader* options) {
  const int64_t channels = options->Int("channels", form.input[0], 1, kMaxWidth);
  if (channels != form.input[0]) {
    throw DoesNotFit(model, form,
                     std::to_string(channels) + " input channels, as " +
                         OptionReader::Path("channels") + " says");
  }
}

// ---- mlp

class Mlp : public Net {
 public:
  Mlp(const SampleForm& form, OptionReader* options, const MeshPlace& place)
      : output_(OutputFor("mlp", form, options)), tensor_(place.tensor) {
    const auto hidden = options->Ints("hidden", {128}, 0, 32, 1, kMaxWidth);
    dropout_ = options->Number("dropout", 0, 0, 0.95);
    RefuseSharedDropout(dropout_, place);
    int64_t features = Elements(form.input);
    for (const int64_t width : hidden) {
      linears_.push_back(layers_->size());
      layers_->push_back(nn::Linear(features, width));
      layers_->push_back(nn::ReLU(nn::ReLUOptions(true)));
      if (dropout_ > 0) layers_->push_back(nn::Dropout(dropout_));
      features = width;
    }
    linears_.push_back(layers_->size());
    layers_->push_back(nn::Linear(features, output_.size));
    register_module("layers", layers_);
    if (tensor_ == nullptr) return;
    // In pairs: the outputs of one are shared, so are the inputs of the next, and nothing is
    // exchanged between the two. The last of an odd number stays whole.
    for (size_t i = 0; i + 1 < linears_.size(); i += 2) {
      CheckShares("hidden", hidden[i], place);
      nn::Linear first = Linear(i), second = Linear(i + 1);
      ShareOutputs(this, Name(i), first, place);
      ShareInputs(this, Name(i + 1), second, place);
    }
  }
  at::Tensor Forward(const at::Tensor& input) override {
    return output_.Shaped(layers_->forward(input.flatten(1)));
  }
  std::vector<Unit> Units() override {
    std::vector<Unit> units;
    for (size_t i = 0; i < linears_.size(); ++i) {
      units.push_back({{Name(i) + "."}, [this, i](const at::Tensor& x) { return Run(i, x); }});
    }
    return units;
  }

 private:
  std::string Name(size_t i) const { return "layers." + std::to_string(linears_[i]); }
  nn::Linear Linear(size_t i) {
    return std::dynamic_pointer_cast<nn::LinearImpl>(layers_->ptr(linears_[i]));
  }
  at::Tensor Run(size_t i, const at::Tensor& input) {
    const bool last = i + 1 == linears_.size();
    at::Tensor x = i == 0 ? input.flatten(1) : input;
    nn::Linear layer = Linear(i);
    if (tensor_ == nullptr || (last && i % 2 == 0)) {
      x = layer(x);
    } else if (i % 2 == 0) {
      x = layer(IntoParts(x, *tensor_));
    } else {
      x = ForwardOfSharedInputs(layer, x, *tensor_);
    }
    if (last) return output_.Shaped(x);
    x = x.relu();
    return dropout_ > 0 ? at::dropout(x, dropout_, is_training()) : x;
  }

  const VectorOutput output_;
  Communicator* const tensor_;
  double dropout_ = 0;
  std::vector<size_t> linears_;  // where they stand among the layers
  nn::Sequential layers_;
};

// ---- cnn

class Cnn : public Net {
 public:
  Cnn(const SampleForm& form, OptionReader* options) {
    if (form.input.size() != 3) throw DoesNotFit("cnn", form, "input [channels, rows, columns]");
    output_ = OutputFor("cnn", form, options);
    const auto widths = options->Ints("channels", {16, 32}, 1, 8, 1, kMaxWidth);
    const int64_t hidden = options->Int("hidden", 128, 1, kMaxWidth);
    const double dropout = options->Number("dropout", 0.25, 0, 0.95);
    int64_t channels = form.input[0], rows = form.input[1], columns = form.input[2];
    for (const int64_t width : widths) {
      features_->push_back(nn::Conv2d(nn::Conv2dOptions(channels, width, 3).padding(1)));
      features_->push_back(
          nn::MaxPool2d(2));  // before the ReLU: the same result on a quarter of the cells
      features_->push_back(nn::ReLU(nn::ReLUOptions(true)));
      channels = width;
      rows /= 2;
      columns /= 2;
    }
    if (rows < 1 || columns < 1) {
      throw DoesNotFit("cnn", form,
                       "at least " + std::to_string(int64_t{1} << widths.size()) +
                           " rows and columns for its " + std::to_string(widths.size()) +
                           " layers; name fewer in " + OptionReader::Path("channels"));
    }
    classifier_->push_back(nn::Linear(channels * rows * columns, hidden));
    classifier_->push_back(nn::ReLU(nn::ReLUOptions(true)));
    if (dropout > 0) classifier_->push_back(nn::Dropout(dropout));
    classifier_->push_back(nn::Linear(hidden, output_.size));
    register_module("features", features_);
    register_module("classifier", classifier_);
  }
  at::Tensor Forward(const at::Tensor& input) override {
    return output_.Shaped(classifier_->forward(features_->forward(input).flatten(1)));
  }

 private:
  VectorOutput output_;
  nn::Sequential features_, classifier_;
};

// ---- resnet18: the names of torchvision's, so that weights can go either way

nn::Conv2d BareConv(int64_t in, int64_t out, int64_t kernel, int64_t stride) {
  return nn::Conv2d(
      nn::Conv2dOptions(in, out, kernel).stride(stride).padding(kernel / 2).bias(false));
}

class ResidualBlockImpl : public nn::Module {
 public:
  ResidualBlockImpl(int64_t in, int64_t out, int64_t stride)
      : conv1_(register_module("conv1", BareConv(in, out, 3, stride))),
        bn1_(register_module("bn1", nn::BatchNorm2d(out))),
        conv2_(register_module("conv2", BareConv(out, out, 3, 1))),
        bn2_(register_module("bn2", nn::BatchNorm2d(out))) {
    if (stride != 1 || in != out) {
      downsample_ = register_module(
          "downsample", nn::Sequential(BareConv(in, out, 1, stride), nn::BatchNorm2d(out)));
    }
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor y = bn2_(conv2_(bn1_(conv1_(x)).relu_()));
    return (y + (downsample_.is_empty() ? x : downsample_->forward(x))).relu_();
  }

 private:
  nn::Conv2d conv1_;
  nn::BatchNorm2d bn1_;
  nn::Conv2d conv2_;
  nn::BatchNorm2d bn2_;
  nn::Sequential downsample_{nullptr};
};
TORCH_MODULE(ResidualBlock);

class ResNet18 : public Net {
 public:
  ResNet18(const SampleForm& form, OptionReader* options) {
    if (form.input.size() != 3)
      throw DoesNotFit("resnet18", form, "input [channels, rows, columns]");
    CheckChannels("resnet18", form, options);
    output_ = OutputFor("resnet18", form, options);
    small_ = options->Bool("small_images", std::max(form.input[1], form.input[2]) <= kSmallImage);
    const int64_t width = options->Int("width", 64, 1, kMaxWidth / 8);
    conv1_ = register_module("conv1", small_ ? BareConv(form.input[0], width, 3, 1)
                                             : BareConv(form.input[0], width, 7, 2));
    bn1_ = register_module("bn1", nn::BatchNorm2d(width));
    int64_t in = width;
    for (int stage = 0; stage < 4; ++stage) {
      const int64_t out = width << stage;
      nn::Sequential blocks(ResidualBlock(in, out, stage == 0 ? 1 : 2), ResidualBlock(out, out, 1));
      stages_.push_back(register_module("layer" + std::to_string(stage + 1), blocks));
      in = out;
    }
    fc_ = register_module("fc", nn::Linear(in, output_.size));
    for (const auto& module : modules(/*include_self=*/false)) {
      if (auto* conv = module->as<nn::Conv2d>()) {
        nn::init::kaiming_normal_(conv->weight, 0, torch::kFanOut, torch::kReLU);
      }
    }
  }
  at::Tensor Forward(const at::Tensor& input) override {
    at::Tensor x = bn1_(conv1_(input)).relu_();
    if (!small_) x = at::max_pool2d(x, 3, 2, 1);
    for (auto& stage : stages_) x = stage->forward(x);
    return output_.Shaped(fc_(at::adaptive_avg_pool2d(x, {1, 1}).flatten(1)));
  }

 private:
  VectorOutput output_;
  bool small_ = false;
  nn::Conv2d conv1_{nullptr};
  nn::BatchNorm2d bn1_{nullptr};
  std::vector<nn::Sequential> stages_;
  nn::Linear fc_{nullptr};
};

// ---- unet

// Two convolutions with group norm, which unlike batch norm does not depend on how samples are
// shared among ranks.
nn::Sequential DoubleConv(int64_t in, int64_t out) {
  const auto norm = [out] {
    return nn::GroupNorm(nn::GroupNormOptions(std::gcd(int64_t{8}, out), out));
  };
  return nn::Sequential(BareConv(in, out, 3, 1), norm(), nn::ReLU(nn::ReLUOptions(true)),
                        BareConv(out, out, 3, 1), norm(), nn::ReLU(nn::ReLUOptions(true)));
}

class UNet : public Net {
 public:
  UNet(const SampleForm& form, OptionReader* options) {
    const bool labels = form.classes > 0;
    const size_t target_rank = labels ? 2 : 3;
    if (form.input.size() != 3 || form.target.size() != target_rank ||
        !std::equal(form.input.begin() + 1, form.input.end(), form.target.end() - 2)) {
      throw DoesNotFit("unet", form,
                       "input [channels, rows, columns] and a target of the same rows and columns");
    }
    CheckChannels("unet", form, options);
    int64_t outputs = form.target[0];
    const int64_t classes = options->Int("classes", form.classes, 0, kMaxClasses);
    if (classes < form.classes || (classes > 0 && !labels)) {
      throw UserError(OptionReader::Path("classes") + ": " + std::to_string(classes) +
                      " does not fit; the data have " + std::to_string(form.classes) + " classes");
    }
    if (labels) outputs = classes;
    const int64_t base = options->Int("base", 16, 1, 1024);
    const int64_t depth = options->Int("depth", 3, 1, 8);
    const int64_t multiple = int64_t{1} << depth;
    if (form.input[1] % multiple != 0 || form.input[2] % multiple != 0) {
      throw DoesNotFit("unet", form,
                       "rows and columns that are multiples of " + std::to_string(multiple) +
                           "; crop them or set " + OptionReader::Path("depth") + " lower than " +
                           std::to_string(depth));
    }
    int64_t in = form.input[0];
    for (int64_t level = 0; level <= depth; ++level) {
      const int64_t out = base << level;
      down_.push_back(register_module("down" + std::to_string(level), DoubleConv(in, out)));
      in = out;
    }
    for (int64_t level = depth; level-- > 0;) {
      const int64_t out = base << level;
      grow_.push_back(register_module(
          "grow" + std::to_string(level),
          nn::ConvTranspose2d(nn::ConvTranspose2dOptions(2 * out, out, 2).stride(2))));
      up_.push_back(register_module("up" + std::to_string(level), DoubleConv(2 * out, out)));
    }
    head_ = register_module("head", nn::Conv2d(base, outputs, 1));
  }
  at::Tensor Forward(const at::Tensor& input) override {
    std::vector<at::Tensor> levels;
    at::Tensor x = input;
    for (size_t level = 0; level < down_.size(); ++level) {
      if (level > 0) x = at::max_pool2d(x, 2);
      x = down_[level]->forward(x);
      levels.push_back(x);
    }
    levels.pop_back();
    for (size_t i = 0; i < up_.size(); ++i) {
      x = up_[i]->forward(at::cat({levels.back(), grow_[i](x)}, 1));
      levels.pop_back();
    }
    return head_(x);
  }

 private:
  std::vector<nn::Sequential> down_, up_;
  std::vector<nn::ConvTranspose2d> grow_;
  nn::Conv2d head_{nullptr};
};

// ---- lstm

class Lstm : public Net {
 public:
  Lstm(const SampleForm& form, OptionReader* options) {
    if (form.input.empty()) {
      throw DoesNotFit("lstm", form,
                       "input [steps] or [steps, features…], as the transform window makes it");
    }
    output_ = OutputFor("lstm", form, options);
    const int64_t features = Elements({form.input.begin() + 1, form.input.end()});
    const int64_t hidden = options->Int("hidden", 64, 1, kMaxWidth);
    const int64_t layers = options->Int("layers", 1, 1, 16);
    const double dropout = options->Number("dropout", 0, 0, 0.95);
    if (dropout > 0 && layers == 1) {
      throw UserError(OptionReader::Path("dropout") + ": works between layers; set " +
                      OptionReader::Path("layers") + " to 2 or more, or leave dropout out");
    }
    lstm_ = register_module("lstm", nn::LSTM(nn::LSTMOptions(features, hidden)
                                                 .num_layers(layers)
                                                 .dropout(dropout)
                                                 .batch_first(true)));
    head_ = register_module("head", nn::Linear(hidden, output_.size));
  }
  at::Tensor Forward(const at::Tensor& input) override {
    const at::Tensor series = input.dim() == 2 ? input.unsqueeze(2) : input.flatten(2);
    // Of zeros, made from the input: as a tensor of so many samples they would be a constant of a
    // recorded model.
    const at::Tensor state = at::zeros_like(series.select(1, 0).select(1, 0))
                                 .view({1, -1, 1})
                                 .expand({lstm_->options.num_layers(), -1, lstm_->options.hidden_size()})
                                 .contiguous();
    const at::Tensor outputs = std::get<0>(lstm_->forward(series, std::make_tuple(state, state)));
    return output_.Shaped(head_(outputs.select(1, -1)));
  }

 private:
  VectorOutput output_;
  nn::LSTM lstm_{nullptr};
  nn::Linear head_{nullptr};
};

// ---- downscale

// Super-resolution of a field: convolutions see the bilinear interpolation beside learned position
// channels (relief, coasts, storm tracks) and correct it. With `conserve`, the correction leaves
// each coarse cell's mean as it was.
class Downscale : public Net {
 public:
  Downscale(const SampleForm& form, OptionReader* options) {
    if (form.input.size() != 3 || form.target.size() != 3 || form.input[0] != form.target[0] ||
        form.target[1] % form.input[1] != 0 || form.target[2] % form.input[2] != 0 ||
        form.target[1] / form.input[1] != form.target[2] / form.input[2]) {
      throw DoesNotFit("downscale", form,
                       "input [channels, rows, columns] and a target of the same channels with a "
                       "whole multiple of rows and columns, as the transform coarsen makes them");
    }
    factor_ = form.target[1] / form.input[1];
    if (const int64_t given = options->Int("factor", factor_, 1, 1024); given != factor_) {
      throw DoesNotFit("downscale", form,
                       "a factor of " + std::to_string(given) + ", as " +
                           OptionReader::Path("factor") + " says, where the data have " +
                           std::to_string(factor_));
    }
    channels_ = form.input[0];
    rows_ = form.target[1];
    columns_ = form.target[2];
    const auto hidden = options->Ints("hidden", {16, 16}, 1, 16, 1, 1024);
    std::vector<int64_t> default_kernels(hidden.size() + 1, 5);
    default_kernels.back() = 3;
    const auto kernels =
        options->Ints("kernels", default_kernels, hidden.size() + 1, hidden.size() + 1, 1, 31);
    position_channels_ = options->Int("position_channels", 8, 0, 256);
    conserve_ = options->Bool("conserve", true);
    for (const int64_t kernel : kernels) {
      if (kernel % 2 == 0) {
        throw UserError(OptionReader::Path("kernels") + ": " + std::to_string(kernel) +
                        " is even; sizes must be odd");
      }
    }
    if (position_channels_ > 0) {
      position_ = register_parameter(
          "position", at::randn({1, position_channels_, rows_, columns_}, at::kFloat).mul_(0.1));
    }
    int64_t in = channels_ + position_channels_;
    for (size_t i = 0; i < kernels.size(); ++i) {
      const int64_t out = i < hidden.size() ? hidden[i] : channels_;
      convolutions_.push_back(register_module(
          "conv" + std::to_string(i + 1),
          nn::Conv2d(nn::Conv2dOptions(in, out, kernels[i]).padding(kernels[i] / 2))));
      in = out;
    }
  }
  at::Tensor Forward(const at::Tensor& input) override {
    const at::Tensor smooth =
        at::upsample_bilinear2d(input, {rows_, columns_}, /*align_corners=*/false);
    at::Tensor x = FirstLayer(smooth);
    for (size_t i = 1; i < convolutions_.size(); ++i) x = convolutions_[i](x.relu_());
    x = x + smooth;
    if (!conserve_) return x;
    return x +
           at::upsample_nearest2d(input - at::avg_pool2d(x, {factor_, factor_}), {rows_, columns_});
  }

 private:
  // The convolution of [smooth, position]. It is linear, and the position is the same for every
  // sample: its part is computed once per batch.
  at::Tensor FirstLayer(const at::Tensor& smooth) {
    auto& conv = convolutions_.front();
    if (position_channels_ == 0) return conv(smooth);
    const int64_t padding = conv->weight.size(2) / 2;
    const at::Tensor of_field =
        at::conv2d(smooth, conv->weight.narrow(1, 0, channels_), {}, 1, padding);
    const at::Tensor of_position = at::conv2d(
        position_, conv->weight.narrow(1, channels_, position_channels_), conv->bias, 1, padding);
    return of_field + of_position;
  }

  int64_t factor_ = 1, channels_ = 0, rows_ = 0, columns_ = 0, position_channels_ = 0;
  bool conserve_ = true;
  at::Tensor position_;
  std::vector<nn::Conv2d> convolutions_;
};

// ---- transformer: predicts the next token at every position (GPT-like: normalised before each part,
// causal attention)

class TransformerBlockImpl : public nn::Module {
 public:
  TransformerBlockImpl(int64_t width, int64_t heads, double dropout, int64_t layers,
                       const MeshPlace& place)
      : tensor_(place.tensor),
        heads_(heads / place.parts),
        dropout_(dropout),
        norm1_(register_module("norm1", nn::LayerNorm(nn::LayerNormOptions({width})))),
        query_(register_module("query", nn::Linear(width, width))),
        key_(register_module("key", nn::Linear(width, width))),
        value_(register_module("value", nn::Linear(width, width))),
        out_(register_module("out", nn::Linear(width, width))),
        norm2_(register_module("norm2", nn::LayerNorm(nn::LayerNormOptions({width})))),
        up_(register_module("up", nn::Linear(width, 4 * width))),
        down_(register_module("down", nn::Linear(4 * width, width))) {
    const torch::NoGradGuard no_grad;
    for (nn::Linear layer : {query_, key_, value_, out_, up_, down_}) {
      layer->weight.normal_(0, 0.02);
      layer->bias.zero_();
    }
    // What is added to the residual stream, by all layers together, keeps its size.
    for (nn::Linear layer : {out_, down_})
      layer->weight.div_(std::sqrt(2.0 * static_cast<double>(layers)));
  }

  // Each rank keeps some heads, and some of the inner features of the feed-forward part.
  void Share(Net* net, const std::string& name, const MeshPlace& place) {
    for (auto& [part, layer] :
         {std::pair{"query", &query_}, {"key", &key_}, {"value", &value_}, {"up", &up_}}) {
      ShareOutputs(net, name + part, *layer, place);
    }
    ShareInputs(net, name + "out", out_, place);
    ShareInputs(net, name + "down", down_, place);
  }

  at::Tensor forward(at::Tensor x, const at::Tensor& mask) {
    x = x + Drop(Join(out_, Attend(Into(norm1_(x)), mask)));
    return x + Drop(Join(down_, at::gelu(up_(Into(norm2_(x))))));
  }

 private:
  at::Tensor Into(const at::Tensor& x) { return tensor_ == nullptr ? x : IntoParts(x, *tensor_); }
  at::Tensor Join(nn::Linear& layer, const at::Tensor& x) {
    return tensor_ == nullptr ? layer(x) : ForwardOfSharedInputs(layer, x, *tensor_);
  }
  at::Tensor Drop(const at::Tensor& x) const {
    return dropout_ > 0 ? at::dropout(x, dropout_, is_training()) : x;
  }
  at::Tensor Attend(const at::Tensor& x, const at::Tensor& mask) {
    const int64_t steps = x.size(1), width = query_->weight.size(0);
    const auto split = [&](const at::Tensor& y) {
      return y.view({-1, steps, heads_, width / heads_}).transpose(1, 2);
    };
    const at::Tensor scores = at::matmul(split(query_(x)), split(key_(x)).transpose(2, 3))
                                  .mul(1 / std::sqrt(static_cast<double>(width / heads_)));
    const at::Tensor shares = Drop(at::softmax(scores + mask, -1));
    return at::matmul(shares, split(value_(x))).transpose(1, 2).reshape({-1, steps, width});
  }

  Communicator* const tensor_;
  const int64_t heads_;  // of this rank
  const double dropout_;
  nn::LayerNorm norm1_;
  nn::Linear query_, key_, value_, out_;
  nn::LayerNorm norm2_;
  nn::Linear up_, down_;
};
TORCH_MODULE(TransformerBlock);

class Transformer : public Net {
 public:
  Transformer(const SampleForm& form, OptionReader* options, const MeshPlace& place)
      : tensor_(place.tensor), part_(place.part) {
    if (form.input.size() != 1 || form.classes == 0 ||
        (form.target != form.input && Elements(form.target) != 1)) {
      throw DoesNotFit("transformer", form,
                       "input [tokens] of token numbers and as target the token that follows each "
                       "of them [tokens], or the one that follows them all");
    }
    context_ = form.input[0];
    next_only_ = form.target != form.input;
    if (const int64_t given = options->Int("context", context_, 1, 1 << 20); given != context_) {
      throw DoesNotFit("transformer", form,
                       std::to_string(given) + " tokens, as " + OptionReader::Path("context") +
                           " says");
    }
    const int64_t vocabulary = options->Int("vocabulary", form.classes, 2, kMaxClasses);
    if (vocabulary < form.classes) {
      throw UserError(OptionReader::Path("vocabulary") + ": " + std::to_string(vocabulary) +
                      " is too few; the data have " + std::to_string(form.classes) + " tokens");
    }
    const int64_t layers = options->Int("layers", 2, 1, 1000);
    const int64_t width = options->Int("width", 64, 1, kMaxWidth);
    const int64_t heads = options->Int("heads", 4, 1, kMaxWidth);
    if (width % heads != 0) {
      throw UserError(OptionReader::Path("heads") + ": " + std::to_string(heads) +
                      " does not divide the width " + std::to_string(width));
    }
    const double dropout = options->Number("dropout", 0, 0, 0.95);
    RefuseSharedDropout(dropout, place);
    tied_ = options->Bool("tied", true);
    if (tied_ && place.stages > 1) {
      throw UserError(OptionReader::Path("tied") +
                      ": the first and the last stage of a pipeline are different ranks and cannot "
                      "share the embedding; set it to false");
    }
    tokens_ = register_parameter("tokens", at::randn({vocabulary, width}).mul_(0.02));
    positions_ = register_parameter("positions", at::randn({context_, width}).mul_(0.02));
    for (int64_t i = 0; i < layers; ++i)
      blocks_->push_back(TransformerBlock(width, heads, dropout, layers, place));
    register_module("blocks", blocks_);
    norm_ = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({width})));
    if (!tied_) head_ = register_parameter("head", at::randn({vocabulary, width}).mul_(0.02));
    mask_ = at::full({context_, context_}, -std::numeric_limits<float>::infinity()).triu_(1);
    if (tensor_ == nullptr) return;
    CheckShares("heads", heads, place);
    CheckShares("vocabulary", vocabulary, place);
    KeepPart("tokens", tokens_, 0, place);
    if (!tied_) KeepPart("head", head_, 0, place);
    for (int64_t i = 0; i < layers; ++i)
      Block(i).Share(this, "blocks." + std::to_string(i) + ".", place);
  }
  at::Tensor Forward(const at::Tensor& input) override {
    at::Tensor x = Embed(input);
    for (size_t i = 0; i < blocks_->size(); ++i)
      x = Block(static_cast<int64_t>(i)).forward(x, MaskFor(x));
    return Scores(x);
  }
  std::vector<Unit> Units() override {
    std::vector<Unit> units;
    units.push_back({{"tokens", "positions"}, [this](const at::Tensor& x) { return Embed(x); }});
    for (size_t i = 0; i < blocks_->size(); ++i) {
      units.push_back({{"blocks." + std::to_string(i) + "."}, [this, i](const at::Tensor& x) {
                         return Block(static_cast<int64_t>(i)).forward(x, MaskFor(x));
                       }});
    }
    units.push_back({{"norm.", "head"}, [this](const at::Tensor& x) { return Scores(x); }});
    return units;
  }

 private:
  TransformerBlockImpl& Block(int64_t i) {
    return *blocks_->ptr(static_cast<size_t>(i))->as<TransformerBlockImpl>();
  }
  at::Tensor Embed(const at::Tensor& input) {
    const at::Tensor numbers = input.to(at::kLong);
    if (tensor_ == nullptr) return at::embedding(tokens_, numbers) + positions_;
    // Each rank knows some tokens; the others' are zero here.
    const int64_t mine = tokens_.size(0), first = part_ * mine;
    const at::Tensor elsewhere = numbers.lt(first).logical_or(numbers.ge(first + mine));
    const at::Tensor found =
        at::embedding(tokens_, (numbers - first).masked_fill(elsewhere, 0))
            .masked_fill(elsewhere.unsqueeze(-1), 0);
    return SumOfParts(found, *tensor_) + positions_;
  }
  at::Tensor Scores(at::Tensor x) {
    if (next_only_) x = x.select(1, -1);
    x = norm_(x);
    const at::Tensor& weight = tied_ ? tokens_ : head_;
    const at::Tensor scores =
        tensor_ == nullptr ? at::linear(x, weight)
                           : JoinParts(at::linear(IntoParts(x, *tensor_), weight), *tensor_);
    return next_only_ ? scores : scores.transpose(1, 2);  // [samples, vocabulary, tokens]
  }

  Communicator* const tensor_;
  const int part_;
  int64_t context_ = 0;
  bool next_only_ = false, tied_ = true;
  // Where the model is.
  const at::Tensor& MaskFor(const at::Tensor& x) {
    if (mask_.device() != x.device()) mask_ = mask_.to(x.device());
    return mask_;
  }

  at::Tensor tokens_, positions_, head_, mask_;
  nn::ModuleList blocks_;
  nn::LayerNorm norm_{nullptr};
};

// ---- the wrapper and the table of all networks

// The units of a stage: contiguous, so that the largest stage has as few parameters as possible.
std::pair<size_t, size_t> UnitsOfStage(const std::vector<int64_t>& sizes, int stage, int stages) {
  const size_t n = sizes.size();
  const auto k = static_cast<size_t>(stages);
  // best[s][i]: the largest stage when the first i units make s stages; cut[s][i]: where the last
  // of them begins.
  constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  std::vector<std::vector<int64_t>> best(k + 1, std::vector<int64_t>(n + 1, kNever));
  std::vector<std::vector<size_t>> cut(k + 1, std::vector<size_t>(n + 1, 0));
  best[0][0] = 0;
  for (size_t s = 1; s <= k; ++s) {
    for (size_t i = s; i <= n; ++i) {
      int64_t last = 0;
      for (size_t j = i; j-- > s - 1;) {
        last += sizes[j];
        if (best[s - 1][j] == kNever) continue;
        const int64_t largest = std::max(best[s - 1][j], last);
        if (largest < best[s][i]) {
          best[s][i] = largest;
          cut[s][i] = j;
        }
      }
    }
  }
  size_t last = n;
  for (size_t s = k; s > static_cast<size_t>(stage) + 1; --s) last = cut[s][last];
  return {cut[static_cast<size_t>(stage) + 1][last], last};
}

class TorchNetwork : public Network {
 public:
  TorchNetwork(const std::string& name, std::shared_ptr<Net> net, nlohmann::json options,
               const MeshPlace& place)
      : net_(std::move(net)), options_(std::move(options)) {
    if (place.tensor == nullptr && place.stages == 1) return;
    units_ = net_->Units();
    if (units_.empty()) {
      throw UserError("train.strategy: the model " + name +
                      " cannot be split between ranks (mlp and transformer can); use ddp or zero1, "
                      "zero2, zero3");
    }
    if (static_cast<int>(units_.size()) < place.stages) {
      throw UserError("train.mesh.pipeline: the model " + name + " has " +
                      std::to_string(units_.size()) + " layers, which cannot be cut into " +
                      std::to_string(place.stages) + " stages");
    }
    std::vector<int64_t> sizes;
    for (const Unit& unit : units_) {
      sizes.push_back(1);
      for (const auto& parameter : net_->named_parameters())
        if (Belongs(parameter.key(), unit)) sizes.back() += parameter.value().numel();
    }
    const auto [first, last] = UnitsOfStage(sizes, place.stage, place.stages);
    units_ = {units_.begin() + static_cast<int64_t>(first),
              units_.begin() + static_cast<int64_t>(last)};
    first_ = first == 0;
  }

  at::Tensor Forward(const at::Tensor& input) override {
    at::Tensor x = input;
    if (first_ && !x.is_floating_point()) x = x.to(at::kFloat);
    if (units_.empty()) return net_->Forward(x);
    for (const Unit& unit : units_) x = unit.forward(x);
    return x;
  }
  std::vector<std::pair<std::string, at::Tensor>> parameters() override {
    auto pairs = Pairs(net_->named_parameters());
    if (units_.empty()) return pairs;
    std::erase_if(pairs, [&](const auto& pair) {
      return std::none_of(units_.begin(), units_.end(),
                          [&](const Unit& unit) { return Belongs(pair.first, unit); });
    });
    return pairs;
  }
  std::vector<std::pair<std::string, at::Tensor>> buffers() override {
    return Pairs(net_->named_buffers());
  }
  const std::map<std::string, ParameterPart>& parts() const override { return net_->parts(); }
  void Train(bool training) override { net_->train(training); }
  const nlohmann::json& options() const override { return options_; }

 private:
  static std::vector<std::pair<std::string, at::Tensor>> Pairs(
      const torch::OrderedDict<std::string, at::Tensor>& tensors) {
    std::vector<std::pair<std::string, at::Tensor>> pairs;
    for (const auto& tensor : tensors) pairs.emplace_back(tensor.key(), tensor.value());
    return pairs;
  }

  static bool Belongs(const std::string& name, const Unit& unit) {
    return std::any_of(unit.prefixes.begin(), unit.prefixes.end(),
                       [&](const std::string& prefix) { return name.starts_with(prefix); });
  }

  const std::shared_ptr<Net> net_;
  const nlohmann::json options_;
  std::vector<Unit> units_;  // of this stage; empty: the whole network
  bool first_ = true;
};

template <typename T>
std::shared_ptr<Net> Make(const SampleForm& form, OptionReader* options, const MeshPlace& place) {
  if constexpr (std::is_constructible_v<T, const SampleForm&, OptionReader*, const MeshPlace&>) {
    return std::make_shared<T>(form, options, place);
  } else {
    return std::make_shared<T>(form, options);
  }
}

using Maker = std::shared_ptr<Net> (*)(const SampleForm&, OptionReader*, const MeshPlace&);
constexpr std::pair<const char*, Maker> kNetworks[] = {
    {"mlp", Make<Mlp>},   {"cnn", Make<Cnn>},   {"resnet18", Make<ResNet18>},
    {"unet", Make<UNet>}, {"lstm", Make<Lstm>}, {"downscale", Make<Downscale>},
    {"transformer", Make<Transformer>},
};

}  // namespace

std::vector<std::string> NetworkNames() {
  std::vector<std::string> names;
  for (const auto& [name, maker] : kNetworks) names.emplace_back(name);
  return names;
}

std::unique_ptr<Network> MakeNetwork(const std::string& name, const nlohmann::json& options,
                                     const SampleForm& form, uint64_t seed,
                                     const MeshPlace& place) {
  for (const auto& [known, make] : kNetworks) {
    if (name != known) continue;
    OptionReader reader(name, options);
    torch::manual_seed(seed);
    auto net = make(form, &reader, place);
    reader.Finish();
    return std::make_unique<TorchNetwork>(name, std::move(net), reader.resolved(), place);
  }
  throw UserError("train.model.builtin: no built-in model \"" + name + "\"" +
                  NearestHint(name, NetworkNames()) + " (there are: " + JoinNames(NetworkNames()) +
                  ")");
}

}  // namespace itwin::worker
