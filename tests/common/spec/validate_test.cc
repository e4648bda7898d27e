#include "common/spec/validate.h"

#include <gmock/gmock.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/spec/spec_document.h"
#include "tests/testing/status_matchers.h"

namespace itwin {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kTrain[] = R"(
name: wind
resources: {nodes: 2, ranks_per_node: 4, time: 30m}
train:
  model: {torchscript: downscale.pt}
  data: {netcdf: winds.cdf, variables: [UWND, VWND], split: {train: 0..108, test: 108..132}}
  optimizer: {adam: {lr: 2e-3}}
  batch: 12
)";
constexpr char kCommand[] = "command: {argv: [./run, x], files: [run]}";

absl::Status Check(const std::string& text, const std::vector<std::string>& overrides = {}) {
  absl::StatusOr<v1::JobSpec> spec = ParseSpecDocument(text, overrides);
  EXPECT_OK(spec);
  return spec.ok() ? ValidateSpec(*spec) : spec.status();
}

TEST(ValidateSpec, AcceptsGoodSpecs) {
  EXPECT_OK(Check(kTrain));
  EXPECT_OK(Check(kCommand));
  EXPECT_OK(Check(kTrain, {"train.optimizer=sgd", "train.loss=mse", "train.metrics=[rmse, mae]", "train.strategy=ddp"}));
  EXPECT_OK(Check(kTrain, {"train.data={csv: {path: a.csv, inputs: [a], targets: [b]}}"}));
  EXPECT_OK(Check(kTrain, {"train.data={idx: {train_images: a, train_labels: b}}"}));
  EXPECT_OK(Check(kTrain, {"train.data={synthetic: {samples: 10, input_shape: [4], classes: 3}}"}));
  EXPECT_OK(Check(kTrain, {"train.data.netcdf='site:/data/w.cdf'", "site=vega"}));
  EXPECT_OK(Check(kTrain, {"resources.time=720h"}));
  EXPECT_OK(Check(kTrain, {"image='/p/images/torch-1.13_cu+x.sif'"}));
  EXPECT_OK(Check(kCommand, {"image='docker://nvcr.io/a/b:23.10@sha256=12'"}));
  EXPECT_OK(Check(kTrain, {"resources.partition=booster,devel", "resources.account=hpc-1", "resources.constraint='[a&b]'",
                           "resources.exclude_nodes=[\"n[1-3]\"]", "resources.scheduler_options=[\"--licenses=matlab:1\"]",
                           "resources.gpus_per_node=4", "resources.gpu_type=a100", "resources.exclusive=true"}));
  EXPECT_OK(Check(kTrain, {"train.model={archive: a.itw}", "train.strategy=pipeline", "resources.ranks_per_node=2"}));
  EXPECT_OK(Check(kTrain, {"train.optimizer={lbfgs: {strong_wolfe: true}}", "train.accumulate=4", "train.parameter_groups=[{match: [a], freeze: true}]"}));
  EXPECT_OK(Check(kTrain, {"train.data={zarr: {path: 'site:/d/a.zarr', input: t2m}, load: stream}"}));
  EXPECT_OK(Check(kTrain, {"train.data={hdf5: {path: a.h5}, more_files: [b.h5], load: stream, cache: node}"}));
  EXPECT_OK(Check(kTrain, {"train.data={raw: {input: {path: x, type: float32, shape: [3]}, target: {path: y, type: int64}}}"}));
  EXPECT_OK(Check(kTrain, {"train.data.split={train: 1982-01..1990-12, test_fraction: 0.1, by_hash: true}"}));
  EXPECT_OK(Check(kTrain, {"train.data.transforms=[{log: {add: 1}}, {clip: {max: 3}}]"}));
  EXPECT_OK(Check(kTrain, {"train.predict={split: all, format: netcdf}", "train.profile={trace_steps: 20, hang_timeout: 90s}"}));
  EXPECT_OK(Check(kTrain, {"train.data.transforms=[standardize, {scale: {add: 1}}, {coarsen: {factor: 4}}, "
                           "{window: {length: 3, horizon: 1}}, {reshape: {array: input, shape: [1, 28]}}]"}));
  for (const std::string& name : BuiltinModels()) {
    EXPECT_OK(Check(kTrain, {absl::StrCat("train.model.builtin=", name), "train.loss=mse", "train.model.options={}"}));
  }
  EXPECT_OK(Check(kTrain, {"train.model={builtin: cnn, options: {channels: [8, 16], hidden: 32, dropout: 0.5, classes: null}}",
                           "train.loss=cross_entropy", "train.metrics=[top_k, confusion]"}));
}

struct Row {
  const char* change;
  const char* problem;
};

TEST(ValidateSpec, NamesTheFieldWhatWasWrongAndWhatWouldBeRight) {
  const Row kTable[] = {
      {"name=\"a\\nb\"", "name: has a control character"},
      {"site=a b", "site: 'a b' is no site's name"},
      {"image=-v", "image: '-v' is no name of a container image; use at most 1024 letters, digits and / . _ - : @ + ="},
      {"image=\"a b\"", "image: 'a b' is no name of a container image"},
      {"image=\"a'b\"", "image: 'a\\'b' is no name of a container image"},
      {"image=$x", "image: '$x' is no name of a container image"},
      {"image=\"a{b\"", "image: 'a{b' is no name of a container image"},
      {"resources.nodes=-1", "resources.nodes: -1 is out of range; use a whole number from 0 to 100000"},
      {"resources.partition=a b", "resources.partition: 'a b' is no name of SLURM's"},
      {"resources.account=-x", "resources.account: '-x' is no name of SLURM's"},
      {"resources.qos=\"a;b\"", "resources.qos: 'a;b'"},
      {"resources.constraint=$(x)", "resources.constraint: '$(x)'"},
      {"resources.gpu_type=a100", "resources.gpu_type: 'a100' is given without gpus_per_node"},
      {"resources.exclude_nodes=[n1, \"n 2\"]", "resources.exclude_nodes[1]: 'n 2'"},
      {"resources.scheduler_options=[-J x]", "resources.scheduler_options[0]: '-J x' is no option; write the long form"},
      {"resources.scheduler_options=[\"--time=1\"]", "--time is written as `resources.time`"},
      {"resources.scheduler_options=[\"--requeue\"]", "--requeue is the gateway's own"},
      {"resources.ranks_per_node=9999", "resources.ranks_per_node: 9999 is out of range"},
      {"resources.cpus_per_rank=-2", "resources.cpus_per_rank: -2 is out of range"},
      {"resources.gpus_per_node=-2", "resources.gpus_per_node: -2 is out of range"},
      {"resources.memory_mib_per_node=-2", "resources.memory_mib_per_node: -2 is out of range"},
      {"resources.time=0s", "resources.time: 0 is out of range; use 1s to 720h (30 days)"},
      {"resources.time=31d", "resources.time: 744h is out of range"},
      {"resources.time=-5m", "resources.time: -5m is out of range"},
      {"train.predict={split: some}", "train.predict.split: 'some' is unknown"},
      {"train.profile={hang_timeout: 0s}", "train.profile.hang_timeout: is out of range"},
      {"train.data.split.train=1982-01..tomorrow", "train.data.split.train: '1982-01..tomorrow' is no range of time"},
      {"train.data.load=lazy", "train.data.load: 'lazy' is unknown"},
      {"train.data.transforms=[{clip: {}}]", "train.data.transforms[0].clip: has neither min nor max"},
      {"train.data={npy: {input: x, target: y}, more_files: [z]}", "train.data.more_files: belongs to"},
      {"train.data={raw: {input: {path: x, type: float31}, target: {path: y, type: int64}}}", "train.data.raw.input.type: 'float31' is unknown"},
      {"train.model={}", "train.model: is missing; give {archive: <file>}, {torchscript: <file>} or {builtin: <name>}"},
      {"train.model.builtin=resnet", "train.model.builtin: 'resnet' is unknown; did you mean 'resnet18'?"},
      {"train.model.builtin=gpt", "train.model.builtin: 'gpt' is unknown; use one of mlp, cnn"},
      {"train.model.torchscript=", "train.model.torchscript: names no file"},
      {"train.model.options={a: 1}", "train.model.options: belongs to built-in models"},
      {"train.data={}", "train.data: is missing; give one of netcdf, hdf5, zarr, idx"},
      {"train.data={zarr: {input: x}}", "train.data.zarr.path: is missing; name a file"},
      {"train.data={zarr: {path: a.zarr}}", "train.data.zarr.path: 'a.zarr' is not at the site; a store is a directory"},
      {"train.data={zarr: {path: 'site:/a.zarr'}, cache: node}", "train.data.cache: is for files; a zarr store"},
      {"train.data.variables=[]", "train.data.variables: is missing; list the variables"},
      {"train.data.variables=[A, A]", "train.data.variables[1]: 'A' is given twice"},
      {"train.data.variables=['']", "train.data.variables[0]: is empty"},
      {"train.data.npz=a.npz", "train.data.variables: belongs to netcdf data"},
      {"train.data.netcdf='site:rel'", "train.data.netcdf: 'site:rel' needs an absolute path"},
      {"train.data.netcdf='sha256:12'", "train.data.netcdf: 'sha256:12' needs 64 lower-case hex digits"},
      {"train.data={idx: {train_images: a}}", "train.data.idx.train_labels: is missing"},
      {"train.data={idx: {train_images: a, train_labels: b, test_labels: c}}", "train.data.idx.test_images: is missing"},
      {"train.data={npy: {input: a}}", "train.data.npy.target: is missing"},
      {"train.data={csv: {inputs: [a], targets: [b]}}", "train.data.csv.path: is missing"},
      {"train.data={csv: {path: p, targets: [b]}}", "train.data.csv.inputs: is missing"},
      {"train.data={csv: {path: p, inputs: [b]}}", "train.data.csv.targets: is missing"},
      {"train.data={csv: {path: p, inputs: [b, b], targets: [c]}}", "train.data.csv.inputs[1]: 'b' is given twice"},
      {"train.data={csv: {path: p, inputs: [a], targets: [b, c], target_is_class: true}}",
       "train.data.csv.targets: has several columns"},
      {"train.data={synthetic: {input_shape: [1]}}", "train.data.synthetic.samples: 0 is out of range"},
      {"train.data={synthetic: {samples: 1}}", "train.data.synthetic.input_shape: is missing"},
      {"train.data={synthetic: {samples: 1, input_shape: [0]}}", "train.data.synthetic.input_shape[0]: 0 is out of range"},
      {"train.data={synthetic: {samples: 1, input_shape: [1000000000, 1000000000]}}", "input_shape: has too many elements"},
      {"train.data={synthetic: {samples: 1, input_shape: [1], classes: 1}}", "train.data.synthetic.classes: 1 is out of range"},
      {"train.data.split.train=0-108", "train.data.split.train: '0-108' is not a range; write first..last"},
      {"train.data.split.train=5..5", "train.data.split.train: '5..5' is not a range with samples in it"},
      {"train.data.split.train=9..5", "train.data.split.train: '9..5' is not a range with samples in it"},
      {"train.data.split.train=-1..5", "is not a range"},
      {"train.data.split.train=0..99999999999999999999", "is not a range"},
      {"train.data.split.test=100..132", "train.data.split.test: 100..132 overlaps train 0..108"},
      {"train.data.split.validation=0..10", "train.data.split.validation: 0..10 overlaps train 0..108"},
      {"train.data.split.validation_fraction=1.5", "train.data.split.validation_fraction: 1.5 is out of range"},
      {"train.data.split.validation_fraction=.nan", "train.data.split.validation_fraction: nan is out of range"},
      {"train.data.split.test_fraction=0.5", "train.data.split.test_fraction: is given beside a test range"},
      {"train.data.split={validation_fraction: 0.5, test_fraction: 0.5}", "leave nothing to train on"},
      {"train.data.split={validation: 1..2, validation_fraction: 0.5}", "is given beside a validation range"},
      {"train.data.transforms=[{}]", "train.data.transforms[0]: is empty; use one of standardize"},
      {"train.data.transforms=[{crop: {}}]", "train.data.transforms[0].crop.sizes: is missing"},
      {"train.data.transforms=[{crop: {sizes: [0]}}]", "train.data.transforms[0].crop.sizes[0]: 0 is out of range"},
      {"train.data.transforms=[coarsen]", "train.data.transforms[0].coarsen.factor: 0 is out of range"},
      {"train.data.transforms=[{coarsen: {factor: 2, baselines: [bicubik]}}]",
       "train.data.transforms[0].coarsen.baselines[0]: 'bicubik' is unknown; did you mean 'bicubic'?"},
      {"train.data.transforms=[scale]", "train.data.transforms[0].scale: changes nothing"},
      {"train.data.transforms=[{scale: {multiply: .inf}}]", "train.data.transforms[0].scale.multiply: is not a finite"},
      {"train.data.transforms=[{fill_missing: {value: .nan}}]", "fill_missing.value: is not a finite number"},
      {"train.data.transforms=[window]", "train.data.transforms[0].window.length: 0 is out of range"},
      {"train.data.transforms=[reshape]", "train.data.transforms[0].reshape.array: is missing"},
      {"train.data.transforms=[{standardize: {arrays: [a, a]}}]", "standardize.arrays[1]: 'a' is given twice"},
      {"train.loss=msee", "train.loss: 'msee' is unknown; did you mean 'mse'?"},
      {"train.metrics=[acuracy]", "train.metrics[0]: 'acuracy' is unknown; did you mean 'accuracy'?"},
      {"train.metrics=[mse, mse]", "train.metrics[1]: 'mse' is given twice"},
      {"train.optimizer={}", "train.optimizer: names no optimizer; use one of sgd"},
      {"train.optimizer.adam.lr=-1", "train.optimizer.adam.lr: -1 is out of range; use a number above 0"},
      {"train.optimizer.adam.lr=0", "train.optimizer.adam.lr: 0 is out of range; use a number above 0"},
      {"train.optimizer.adam.lr=.nan", "train.optimizer.adam.lr: nan is out of range"},
      {"train.optimizer.adam.beta1=1", "train.optimizer.adam.beta1: 1 is out of range; use a number from 0 to below 1"},
      {"train.optimizer.adamw.eps=0", "train.optimizer.adamw.eps: 0 is out of range"},
      {"train.optimizer.adamw.weight_decay=-0.5", "train.optimizer.adamw.weight_decay: -0.5 is out of range; use a number from 0"},
      {"train.optimizer.sgd.momentum=-1", "train.optimizer.sgd.momentum: -1 is out of range"},
      {"train.optimizer.sgd.nesterov=true", "train.optimizer.sgd.nesterov: needs a momentum above 0"},
      {"train.optimizer.rmsprop.alpha=2", "train.optimizer.rmsprop.alpha: 2 is out of range"},
      {"train.batch=-1", "train.batch: -1 is out of range"},
      {"train.batch=4", "train.batch: 4 samples cannot be shared by 8 ranks"},
      {"train.epochs=-1", "train.epochs: -1 is out of range"},
      {"train.steps=-1", "train.steps: -1 is out of range"},
      {"train.strategy=dpp", "train.strategy: 'dpp' is unknown; did you mean 'ddp'?"},
      {"train.strategy=single", "train.strategy: 'single' uses one rank but `resources` asks for 8"},
      {"train.horovod.cycle_ms=2", "train.horovod: belongs to strategy horovod, but the strategy is ddp; remove one"},
      {"train.zero.bucket_mb=2", "train.zero: belongs to strategy zero1, zero2 or zero3"},
      {"train.local_sgd.every=0", "train.local_sgd.every: 0 is out of range"},
      {"train.ddp.compression=fp8", "train.ddp.compression: 'fp8' is unknown"},
      {"train.accumulate=-1", "train.accumulate: -1 is out of range"},
      {"train.check_every=-1", "train.check_every: -1 is out of range"},
      {"train.mesh.tensor=2", "train.mesh: belongs to strategy tensor, pipeline or mesh"},
      {"train.gpu={tf32: false}", "train.gpu: is for jobs with GPUs; set resources.gpus_per_node"},
      {"resources.gpus_per_node=2", "resources.ranks_per_node: 4 ranks cannot share the 2 of gpus_per_node"},
      {"train.ddp.bucket_mb=-1", "train.ddp.bucket_mb: -1 is out of range"},
      {"train.validate_every=-1", "train.validate_every: -1 is out of range"},
      {"train.checkpoint.keep=-1", "train.checkpoint.keep: -1 is out of range"},
      {"train.clip_norm=-1", "train.clip_norm: -1 is out of range"},
      {"train.precision=fp8", "train.precision: 'fp8' is unknown; "},
      {"train.loss_scale={initial: 8}", "train.loss_scale: belongs to precision fp16"},
      {"train.loss_scale.window=0", "train.loss_scale.window: 0 is out of range"},
      {"train.ema={decay: 1}", "train.ema.decay: 1 is out of range"},
      {"train.early_stopping={patience: -1}", "train.early_stopping.patience: -1 is out of range"},
      {"train.early_stopping={metric: test/rmse}", "train.early_stopping.metric: 'test/rmse' is no metric of the evaluation"},
      {"train.early_stopping={}", "train.early_stopping: needs a validation split"},
      {"train.best={direction: mxa}", "train.best.direction: 'mxa' is unknown; did you mean 'max'?"},
      {"train.validate_every_steps=-1", "train.validate_every_steps: -1 is out of range"},
      {"train.validate_every_steps=5", "train.validate_every_steps: needs a validation split"},
      {"train.phases=[{name: g, match: [g]}]", "train.phases: have an optimizer each; leave `optimizer` out"},
      {"train={model: {torchscript: x.pt}, phases: [{name: g, match: [g]}, {name: g, match: [d]}]}",
       "train.phases[1].name: 'g' is given twice"},
      {"train={model: {torchscript: x.pt}, phases: [{name: g}]}", "train.phases[0].match: is missing"},
      {"train={model: {torchscript: x.pt}, phases: [{name: g, match: [g], optimizer: {adam: {lr: 0}}}]}",
       "train.phases[0].optimizer.adam.lr: 0 is out of range"},
      {"train={model: {builtin: mlp}, phases: [{name: g, match: [g]}]}", "train.phases: are for TorchScript modules"},
      {"train={model: {torchscript: x.pt}, strategy: zero3, phases: [{name: g, match: [g]}]}", "train.phases: work with the"},
      {"train.clip_value=-1", "train.clip_value: -1 is out of range"},
      {"train.top_k=-1", "train.top_k: -1 is out of range"},
      {"train.optimizer.adagrad.lr_decay=-1", "train.optimizer.adagrad.lr_decay: -1 is out of range"},
      {"train.optimizer.lamb.beta2=1", "train.optimizer.lamb.beta2: 1 is out of range"},
      {"train.optimizer.lars.trust=0", "train.optimizer.lars.trust: 0 is out of range"},
      {"train={model: {archive: a.itw}, loss: mse, strategy: tensor}",
       "train.strategy: tensor splits the layers of a built-in mlp or transformer, and exported graphs into the stages of a "
       "pipeline, not a module that was handed over"},
      {"train={model: {builtin: mlp}, loss: mse, strategy: tensor, mesh: {tensor: 3, data: 1}}",
       "train.model.options.hidden: 128 cannot be shared by 3 ranks"},
      {"train.optimizer.lbfgs.max_iter=0", "train.optimizer.lbfgs.max_iter: 0 is out of range"},
      {"train.optimizer.lbfgs.history=0", "train.optimizer.lbfgs.history: 0 is out of range"},
      {"train.optimizer.lbfgs.tolerance_grad=-1", "train.optimizer.lbfgs.tolerance_grad: -1 is out of range"},
      {"train={optimizer: lbfgs, strategy: zero2}",
       "train.strategy: does not go with the optimizer lbfgs, which works with single and ddp"},
      {"train={optimizer: lbfgs, local_sgd: {every: 2}}", "train.local_sgd: does not go with the optimizer lbfgs"},
      {"train={optimizer: lbfgs, precision: fp16}", "train.precision: does not go with the optimizer lbfgs"},
      {"train={optimizer: lbfgs, clip_norm: 1}", "train.clip_norm: does not go with the optimizer lbfgs"},
      {"train={optimizer: lbfgs, clip_value: 1}", "train.clip_value: does not go with the optimizer lbfgs"},
      {"train={optimizer: lbfgs, parameter_groups: [{match: [a], lr: 1}]}",
       "train.parameter_groups: does not go with the optimizer lbfgs"},
      {"train={model: {torchscript: x.pt}, phases: [{name: g, match: [g], optimizer: lbfgs}]}",
       "train.phases[0].optimizer: is lbfgs"},
      {"train.schedule.unit=epcoh", "train.schedule.unit: 'epcoh' is unknown; did you mean 'epoch'?"},
      {"train.schedule.warmup_steps=-1", "train.schedule.warmup_steps: -1 is out of range"},
      {"train.schedule={linear: {start: -1}}", "train.schedule.linear.start: -1 is out of range"},
      {"train.schedule={step: {}}", "train.schedule.step.every: 0 is out of range; use a whole number from 1"},
      {"train.schedule={multi_step: {}}", "train.schedule.multi_step.milestones: is missing"},
      {"train.schedule={multi_step: {milestones: [3, 3]}}", "milestones[1]: 3 does not rise"},
      {"train.schedule={exponential: {}}", "train.schedule.exponential.gamma: 0 is out of range"},
      {"train.schedule={cosine: {min_factor: -1}}", "train.schedule.cosine.min_factor: -1 is out of range"},
      {"train.schedule={one_cycle: {rise: 1}}", "train.schedule.one_cycle.rise: 1 is out of range"},
      {"train.schedule={one_cycle: {}, warmup_steps: 5}", "train.schedule.warmup_steps: does not go with one_cycle"},
      {"train.schedule={polynomial: {power: 0}}", "train.schedule.polynomial.power: 0 is out of range"},
      {"train.schedule={plateau: {factor: 1}}", "train.schedule.plateau.factor: 1 is out of range"},
      {"train.schedule={plateau: {metric: rmse}}", "train.schedule.plateau.metric: 'rmse' is no metric of the evaluation"},
      {"train.schedule={plateau: {direction: up}}", "train.schedule.plateau.direction: 'up' is unknown; "},
      {"train.parameter_groups=[{lr: 1}]", "train.parameter_groups[0].match: is missing"},
      {"train.parameter_groups=[{match: [a], lr: -1}]", "train.parameter_groups[0].lr: -1 is out of range"},
      {"train.parameter_groups=[{match: [a], freeze: true, lr: 1}]", "train.parameter_groups[0].freeze: leaves nothing"},
      {"train={loss: mse, loss_options: {label_smoothing: 0.1}}",
       "train.loss_options.label_smoothing: belongs to the loss cross_entropy; this job's is mse"},
      {"train={loss: cross_entropy, loss_options: {label_smoothing: 1}}", "train.loss_options.label_smoothing: 1 is out"},
      {"train={loss: focal, loss_options: {class_weights: [1, -1]}}", "train.loss_options.class_weights[1]: -1 is out"},
      {"train={loss: huber, loss_options: {delta: 0}}", "train.loss_options.delta: 0 is out of range"},
      {"train={loss: crps_ensemble, loss_options: {members: 1}}", "train.loss_options.members: 1 is out of range"},
      {"train={loss: quantile, loss_options: {quantiles: [0.5, 0.1]}}", "train.loss_options.quantiles[1]: 0.1 is out"},
      {"train.loss=quantile", "train.loss_options.quantiles: is missing"},
      {"env.1A=x", "env: '1A' is not a name of a variable"},
      {"env={'A=B': x}", "env: 'A=B' is not a name"},
      {"env.ITWIN_SPEC=x", "env.ITWIN_SPEC: names that begin with ITWIN_ belong to the service"},
      {"labels={'': x}", "labels: has an empty key"},
      {"retry.infra=-1", "retry.infra: -1 is out of range"},
      {"retry.app=-1", "retry.app: -1 is out of range"},
      {"inputs=[{path: ../x}]", "inputs[0].path: path '../x' has a '.' or '..' part"},
      {"inputs=[{path: /x}]", "inputs[0].path: path '/x' starts with '/'"},
      {"inputs=[{path: x, sha256: AB}]", "inputs[0].sha256: 'AB' is not 64 lower-case hex digits"},
      {"command.argv=[]", "command.argv: is empty; give the program"},
      {"command.argv=['']", "command.argv[0]: is empty; it is the program to run"},
      {"command={argv: [a], files: [x/y, z/y]}", "command.files[1]: 'y' is also the name of command.files[0]"},
      {"command={argv: [a], files: [x/]}", "command.files[0]: 'x/' is a directory"},
      {"command={argv: [a], files: ['']}", "command.files[0]: names no file"},
  };
  for (const Row& row : kTable) {
    EXPECT_THAT(Check(kTrain, {row.change}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(row.problem)))
        << row.change;
  }
}

TEST(ValidateSpec, RefusesWhatDoesNotWorkOnGpus) {
  const auto on_gpus = [](std::vector<std::string> changes) {
    changes.push_back("resources.gpus_per_node=4");
    return Check(kTrain, changes);
  };
  for (const char* strategy : {"ddp", "zero1", "zero2", "zero3", "horovod"}) EXPECT_OK(on_gpus({absl::StrCat("train.strategy=", strategy)}));
  EXPECT_OK(on_gpus({"train.gpu={tf32: false, channels_last: true, graphs: true}", "train.local_sgd={every: 4}"}));
  EXPECT_OK(on_gpus({"train.strategy=horovod", "train.gpu.graphs=true", "resources.nodes=1", "resources.ranks_per_node=1"})) << "it runs single";
  EXPECT_THAT(on_gpus({"train.strategy=zero1", "train.optimizer=lamb"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("train.optimizer: lamb and lars do not go with strategy zero1")));
  for (const char* strategy : {"zero2", "zero3", "horovod"}) {
    EXPECT_THAT(on_gpus({absl::StrCat("train.strategy=", strategy), "train.gpu.graphs=true"}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(absl::StrCat("train.gpu.graphs: does not go with strategy ", strategy))));
  }
  EXPECT_OK(Check(kCommand, {"resources={ranks_per_node: 8, gpus_per_node: 2}"})) << "a program shares as it likes";
}

// Each of these ended on the node.
TEST(ValidateSpec, RefusesWhatTheWorkerWould) {
  const auto mlp = [](const char* more) {
    return absl::StrCat("train={model: {builtin: mlp, options: {hidden: [8, 8]}}, data: {synthetic: {samples: 64, input_shape: [4]}}, loss: mse, ",
                        more, "}");
  };
  const std::pair<std::string, const char*> kTable[] = {
      {mlp("strategy: zero1, ema: {decay: 0.9}"),
       "train.ema: works with the strategies single, ddp and horovod, where each rank has all weights; this job's is zero1"},
      {mlp("strategy: zero3, ema: {decay: 0.9}"), "train.ema: works with the strategies single, ddp and horovod"},
      {mlp("local_sgd: {every: 4}, ema: {decay: 0.9}"), "this job's is ddp with local_sgd"},
      {mlp("local_sgd: {every: 4}, precision: fp16"), "train.precision: fp16 needs ranks that agree in every step on the loss scale"},
      {"train={model: {torchscript: x.pt}, local_sgd: {every: 4}, phases: [{name: g, match: [g]}]}",
       "train.phases: work with the strategies single, ddp, horovod, zero1 and zero2, not with ddp with local_sgd"},
      {mlp("precision: fp16, loss_scale: {smallest: 1000000}"), "train.loss_scale.initial: 65536 is out of range; use a number from 1000000"},
      {mlp("batch: 12, accumulate: 13"), "train.accumulate: 13 parts are more than the 12 samples of the batch"},
      {mlp("accumulate: 33"), "train.accumulate: 33 parts are more than the 32 samples of the batch"},
      {mlp("strategy: pipeline, mesh: {pipeline: 4}"), "train.mesh.pipeline: 4 stages are more than the model's 3 layers"},
      {mlp("strategy: pipeline"), "train.mesh.pipeline: 8 stages are more than the model's 3 layers"},
      {"train={model: {builtin: mlp}, loss: mse, strategy: mesh, mesh: {data: 2, pipeline: 4}}",
       "train.mesh.pipeline: 4 stages are more than the model's 2 layers"},
      {"train={model: {builtin: transformer, options: {tied: false, layers: 5}}, loss: cross_entropy, strategy: pipeline}",
       "train.mesh.pipeline: 8 stages are more than the model's 7 layers"},
      {"train={model: {archive: a.itw}, strategy: pipeline, mesh: {pipeline: 1}}",
       "train.mesh.pipeline: is 1, but an archive can only be cut into the stages of a pipeline"},
      {"train={model: {archive: a.itw}, strategy: pipeline, mesh: {data: 8}}",
       "train.mesh.pipeline: is 1, but an archive can only be cut into the stages of a pipeline"},
      {"train={model: {archive: a.itw}, strategy: mesh, mesh: {pipeline: 4, tensor: 2}}", "train.strategy: mesh splits the layers"},
      {"train={model: {builtin: mlp}}", "train.loss: is missing; a built-in model brings none of its own"},
      {mlp("metrics: [accuracy]"), "train.metrics[0]: 'accuracy' cannot be measured with the loss mse, whose target has no classes"},
      {"train={model: {torchscript: x.pt}, loss: cross_entropy, metrics: [rmse]}",
       "train.metrics[0]: 'rmse' cannot be measured with the loss cross_entropy, whose predictions are scores of classes"},
      {"train={model: {torchscript: x.pt}, loss: dice, metrics: [accuracy, top_k]}", "train.metrics[1]: 'top_k' cannot be measured with the loss dice"},
      {"train={model: {torchscript: x.pt}, loss: kl_div, metrics: [mse]}", "train.metrics: are of numbers or classes; the loss kl_div"},
  };
  for (const auto& [change, problem] : kTable) {
    EXPECT_THAT(Check(kTrain, {change}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(problem))) << change;
  }
  // One rank runs single, whatever the strategy.
  for (const char* more : {"strategy: zero1, ema: {decay: 0.9}", "local_sgd: {every: 4}, precision: fp16", "strategy: pipeline"}) {
    EXPECT_OK(Check(kTrain, {mlp(more), "resources={}"})) << more;
  }
  EXPECT_OK(Check(kTrain, {mlp("strategy: horovod, ema: {decay: 0.9}")}));
  EXPECT_OK(Check(kTrain, {mlp("local_sgd: {every: 4}, precision: bf16")}));
  EXPECT_OK(Check(kTrain, {mlp("local_sgd: {every: 1}, ema: {decay: 0.9}"), "train.batch=12", "train.accumulate=12"}));
  EXPECT_OK(Check(kTrain, {mlp("strategy: pipeline, mesh: {data: 2, tensor: 2}, batch: 8"), "train.model.options={hidden: [8]}"}))
      << "two stages of two layers";
  EXPECT_OK(Check(kTrain, {"train.model={archive: a.itw}", "train.strategy=mesh", "train.mesh={pipeline: 4, data: 2}"}));
}

TEST(ValidateSpec, KnowsTheOptionsOfBuiltInModels) {
  const Row kTable[] = {
      {"mlp, options: {hiden: [8]}", "train.model.options.hiden: 'hiden' is unknown; did you mean 'hidden'?"},
      {"mlp, options: {hidden: 8}", "train.model.options.hidden: must be a list of 0 to 32 whole numbers, each from 1 to 16384"},
      {"mlp, options: {hidden: [0]}", "train.model.options.hidden: must be a list of 0 to 32"},
      {"mlp, options: {hidden: [1.5]}", "train.model.options.hidden: must be a list of 0 to 32"},
      {"mlp, options: {dropout: 1}", "train.model.options.dropout: 1 is out of range; use a number from 0 to 0.95"},
      {"mlp, options: {dropout: a}", "train.model.options.dropout: must be a number from 0 to 0.95"},
      {"mlp, options: {classes: -1}", "train.model.options.classes: -1 is out of range; use a whole number from 0 to 1000000"},
      {"cnn, options: {channels: []}", "train.model.options.channels: must be a list of 1 to 8"},
      {"resnet18, options: {small_images: 1}", "train.model.options.small_images: must be true or false"},
      {"resnet18, options: {width: 4096}", "train.model.options.width: 4096 is out of range"},
      {"unet, options: {depth: 9}", "train.model.options.depth: 9 is out of range; use a whole number from 1 to 8"},
      {"lstm, options: {dropout: 0.1}", "train.model.options.dropout: works between layers; set train.model.options.layers to 2 or more"},
      {"downscale, options: {kernels: [4, 3, 3]}", "train.model.options.kernels: 4 is even; sizes must be odd"},
      {"downscale, options: {hidden: [4], kernels: [3]}", "train.model.options.kernels: must be a list of 2 whole numbers"},
      {"transformer, options: {heads: 5}", "train.model.options.heads: 5 does not divide the width 64"},
      {"transformer, options: {vocabulary: 1}", "train.model.options.vocabulary: 1 is out of range"},
  };
  for (const Row& row : kTable) {
    EXPECT_THAT(Check(kTrain, {absl::StrCat("train={loss: mse, model: {builtin: ", row.change, "}}")}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(row.problem)))
        << row.change;
  }
  EXPECT_OK(Check(kTrain, {"train.loss=mse", "train.model={builtin: lstm, options: {dropout: 0.1, layers: 2, hidden: 8.0}}"}));
  EXPECT_OK(Check(kTrain, {"train.loss=mse", "train.model={builtin: downscale, options: {hidden: [4, 4], kernels: [3, 5, 3]}}"}));
}

TEST(ValidateSpec, NeedsAKind) {
  EXPECT_THAT(Check("name: x"), StatusIs(absl::StatusCode::kInvalidArgument,
                                         HasSubstr("train: is missing; a job needs either `train` or `command`")));
}

TEST(ValidateSpec, KnowsTheLimitsAtTheirEdge) {
  v1::JobSpec spec = *ParseSpecDocument(kCommand, {});
  const auto problem = [&] { return std::string(ValidateSpec(spec).message()); };

  for (int i = 0; i < 128; ++i) spec.mutable_name()->append("é");
  EXPECT_OK(ValidateSpec(spec));
  spec.mutable_name()->append("é");
  EXPECT_THAT(problem(), HasSubstr("name: has 129 characters; use at most 128"));
  spec.clear_name();

  for (int i = 0; i < 256; ++i) (*spec.mutable_env())[absl::StrCat("V", i)] = "x";
  EXPECT_OK(ValidateSpec(spec));
  (*spec.mutable_env())["ONE_MORE"] = "x";
  EXPECT_THAT(problem(), HasSubstr("env: has 257 entries; use at most 256"));
  spec.clear_env();
  (*spec.mutable_env())["A"] = std::string(65'535, 'x');
  EXPECT_OK(ValidateSpec(spec));
  (*spec.mutable_env())["A"] = std::string(65'536, 'x');
  EXPECT_THAT(problem(), HasSubstr("env: has 65537 bytes in all"));
  spec.clear_env();

  for (int i = 0; i < 64; ++i) (*spec.mutable_labels())[absl::StrCat("k", i)] = std::string(63, 'v');
  EXPECT_OK(ValidateSpec(spec));
  (*spec.mutable_labels())["k0"] = std::string(64, 'v');
  EXPECT_THAT(problem(), HasSubstr("has 64 characters; use at most 63"));
  (*spec.mutable_labels())["k0"] = "";
  (*spec.mutable_labels())["k64"] = "";
  EXPECT_THAT(problem(), HasSubstr("labels: has 65 entries"));
  spec.clear_labels();

  for (int i = 0; i < 10'000; ++i) {
    v1::InputFile* input = spec.add_inputs();
    input->set_path(absl::StrCat("f", i));
    input->set_sha256(std::string(64, '0'));
  }
  EXPECT_OK(ValidateSpec(spec));
  *spec.add_inputs() = spec.inputs(0);
  EXPECT_THAT(problem(), HasSubstr("inputs: has 10001 files"));
  spec.clear_inputs();

  spec.mutable_command()->add_argv(std::string(1 << 20, 'x'));
  EXPECT_THAT(problem(), HasSubstr("the spec has"));
}

TEST(ValidateSpec, RefusesInputsThatCollide) {
  v1::JobSpec spec = *ParseSpecDocument(kCommand, {});
  for (const char* path : {"a", "b/c", "a"}) {
    spec.add_inputs()->set_path(path);
    spec.mutable_inputs()->rbegin()->set_sha256(std::string(64, '0'));
  }
  EXPECT_THAT(ValidateSpec(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                           HasSubstr("inputs[2].path: 'a' is also inputs[0]")));
  spec.mutable_inputs(2)->set_path("b/c/d");
  EXPECT_THAT(ValidateSpec(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                           HasSubstr("inputs[2].path: 'b/c/d' lies below inputs[1]")));
  spec.mutable_inputs(2)->set_path("b/cd");
  EXPECT_OK(ValidateSpec(spec));
}

TEST(ValidateSpec, RefusesTextThatIsNone) {
  v1::JobSpec spec = *ParseSpecDocument(kCommand, {});
  spec.mutable_command()->add_argv("a\xff");
  EXPECT_THAT(ValidateSpec(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                           HasSubstr("command.argv[2]: is not valid UTF-8")));
  spec.mutable_command()->set_argv(2, std::string("a\0b", 3));
  EXPECT_THAT(ValidateSpec(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                           HasSubstr("command.argv[2]: contains a NUL character")));
  spec = *ParseSpecDocument(kTrain, {});
  google::protobuf::Value* value = &(*spec.mutable_train()->mutable_model()->mutable_options()->mutable_fields())["a"];
  for (int i = 0; i < 60; ++i) value = value->mutable_list_value()->add_values();
  EXPECT_THAT(ValidateSpec(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("nested deeper than 16")));
}

TEST(ValidateSpec, CollectsUpToTenProblems) {
  const absl::Status status = Check(kTrain, {"resources.nodes=-1", "train.loss=x", "train.epochs=-1"});
  EXPECT_THAT(std::vector<std::string>(absl::StrSplit(std::string(status.message()), '\n')),
              ElementsAre(HasSubstr("resources.nodes"), HasSubstr("train.loss"), HasSubstr("train.epochs")));
  std::string variables = "train.data.variables=[";
  for (int i = 0; i < 30; ++i) variables += "A, ";
  EXPECT_THAT(Check(kTrain, {variables + "]"}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\n... and 19 more")));
}

TEST(ParseIndexRange, ReadsHalfOpenRanges) {
  EXPECT_EQ(ParseIndexRange("0..108").value(), (std::pair<int64_t, int64_t>(0, 108)));
  for (const char* text : {"", "..", "1..", "..1", "1...2", "1..2..3", " 1..2", "1 ..2", "+1..2", "a..b", "2..2"}) {
    EXPECT_THAT(ParseIndexRange(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("range"))) << text;
  }
}

}  // namespace
}  // namespace itwin
