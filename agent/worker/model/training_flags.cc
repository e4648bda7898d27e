#include "agent/worker/model/training_flags.h"

#include <string>

namespace itwin::worker {
namespace {

// client/python/itwin/handover.py has the same table; tests/python/test_handover.py compares them.
constexpr TrainingArgument kArguments[] = {
    {"aten::_batch_norm_impl_index", "training"},
    {"aten::_flash_scaled_dot_product_attention", "dropout_p"},
    {"aten::_fused_dropout", "p", 1},  // what is kept
    {"aten::_scaled_dot_product_attention", "dropout_p"},
    {"aten::_scaled_dot_product_attention_forward", "dropout_p"},
    {"aten::_scaled_dot_product_attention_math", "dropout_p"},
    {"aten::_scaled_dot_product_flash_attention_for_cpu", "dropout_p"},
    {"aten::_triton_scaled_dot_attention", "dropout_p"},
    {"aten::alpha_dropout", "train"},
    {"aten::alpha_dropout_", "train"},
    {"aten::batch_norm", "training"},
    {"aten::dropout", "train"},
    {"aten::dropout_", "train"},
    {"aten::feature_alpha_dropout", "train"},
    {"aten::feature_alpha_dropout_", "train"},
    {"aten::feature_dropout", "train"},
    {"aten::feature_dropout_", "train"},
    {"aten::gru", "train"},
    {"aten::instance_norm", "use_input_stats"},
    {"aten::lstm", "train"},
    {"aten::native_batch_norm", "training"},
    {"aten::native_dropout", "train"},
    {"aten::rnn_relu", "train"},
    {"aten::rnn_tanh", "train"},
    {"aten::rrelu", "training"},
    {"aten::rrelu_", "training"},
    {"aten::rrelu_with_noise", "training"},
    {"aten::rrelu_with_noise_", "training"},
    {"aten::scaled_dot_product_attention", "dropout_p"},
};

std::optional<size_t> IndexOf(const c10::FunctionSchema& schema, const std::string& name) {
  const auto index = schema.argumentIndexWithName(name);
  if (!index) return std::nullopt;
  return static_cast<size_t>(*index);
}

}  // namespace

std::span<const TrainingArgument> TrainingArguments() { return kArguments; }

std::optional<TrainingFlag> FindTrainingFlag(const c10::FunctionSchema& schema) {
  const auto make = [&](const char* name, double off) -> std::optional<TrainingFlag> {
    const auto argument = IndexOf(schema, name);
    if (!argument) return std::nullopt;
    const bool probability =
        schema.arguments()[*argument].type()->kind() == c10::TypeKind::FloatType;
    auto share = IndexOf(schema, "dropout");  // of lstm and its like
    if (!share) share = IndexOf(schema, "p");
    if (share == argument) share.reset();
    return TrainingFlag{.argument = *argument,
                        .off = probability ? c10::IValue(off) : c10::IValue(off != 0),
                        .statistic = IndexOf(schema, "running_mean"),
                        .share = share};
  };
  for (const TrainingArgument& entry : kArguments) {
    if (schema.name() == entry.op) return make(entry.argument, entry.off);
  }
  if (schema.name().starts_with("aten::")) return std::nullopt;
  for (const char* name : {"train", "training"}) {
    const auto index = IndexOf(schema, name);
    if (index && schema.arguments()[*index].type()->kind() == c10::TypeKind::BoolType) {
      return make(name, 0);
    }
  }
  return std::nullopt;
}

}  // namespace itwin::worker
