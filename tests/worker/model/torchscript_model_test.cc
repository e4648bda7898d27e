// Modules written by Python's torch.jit at test time.
#include "agent/worker/model/torchscript_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/model/archive.h"
#include "agent/worker/model/torchscript_export.h"
#include "tests/worker/data/scratch.h"
#include "tests/worker/model/fixed_dataset.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using testing::Descend;
using testing::FixedDataset;
using ::testing::HasSubstr;
using testing::Scratch;
using testing::UserErrorOf;

constexpr char kModules[] = R"(
import enum, torch, zipfile
from typing import Any, Dict, NamedTuple, Optional, Tuple
from torch import nn, Tensor
F = nn.functional

class Color(enum.Enum):
    RED = 1

class Point(NamedTuple):
    x: Tensor
    scale: float = 1.5

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

class Own(Body):
    @torch.jit.export
    def training_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        error = self(batch["input"]) - batch["target"]
        return error.square().mean(), {"mae": error.abs().mean()}

class Both(Own):
    @torch.jit.export
    def evaluation_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        return torch.tensor(42.0), {"evaluated": torch.tensor(1.0)}

class WrongSignature(Body):
    @torch.jit.export
    def training_step(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x) - y).square().mean()

class VectorMetric(Body):
    @torch.jit.export
    def training_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        error = self(batch["input"]) - batch["target"]
        return error.square().mean(), {"each": error.abs().mean(1)}

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.head = nn.Linear(3, 2)
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x))) * self.frozen

class Careless(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.5)

class NoRecurrentDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.LSTM(3, 2, batch_first=True)
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.unsqueeze(1))[0][:, 0]

@torch.jit.script
class Remembers(object):
    def __init__(self, n: Tensor):
        self.n = n
    def __getstate__(self) -> Tensor:
        return self.n
    def __setstate__(self, s: Tensor) -> None:
        self.n = s
        torch.save(s, 'written.pt')

@torch.jit.script
class Reads(object):
    def __init__(self, n: Tensor):
        self.n = n
    def unused(self) -> Tensor:
        return torch.from_file('/etc/hostname', False, 1)

class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = torch.zeros(1)
    def forward(self, x: Tensor) -> Tensor:
        return x
    @torch.jit.export
    def __getstate__(self) -> Tuple[Tensor, bool]:
        return self.n, self.training
    @torch.jit.export
    def __setstate__(self, s: Tuple[Tensor, bool]):
        self.n, self.training = s
        torch.save(s[0], 'written.pt')

class Whole(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.part = part
    def forward(self, x: Tensor, more: int = 7) -> Tensor:
        return self.a(x) * seven(more)

def seven(n: int) -> int:
    return n

@torch.jit.script
class Entered(object):
    def __init__(self):
        self.n = 1
    def __enter__(self):
        torch.save(self.n, 'written.pt')
    def __exit__(self, a: Any, b: Any, c: Any):
        pass

class Enters(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
    def forward(self, x: Tensor) -> Tensor:
        with Entered():
            x = x + 1
        return self.a(x)

class WithoutGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x + 1
        return self.a(x)

class ForeignClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
    def forward(self, x: Tensor) -> Tensor:
        foreign = torch.classes._nnapi.Compilation()
        return self.a(x)

class EveryValue(nn.Module):  # that may stand as a default or constant
    limit: torch.jit.Final[float]
    __constants__ = ['sizes', 'place', 'nothing', 'pair']
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.limit, self.sizes, self.place = float('-inf'), [1, 2], torch.device('cpu')
        self.nothing, self.pair = None, ('a', -1.5)
    def forward(self, x: Tensor, n: int = 3, o: Optional[Tensor] = None, z: float = float('inf'), s: str = 'a',
                color: Color = Color.RED, b: bool = False, p: Tuple[int, float] = (1, -2.),
                point: Optional[Point] = None) -> Tensor:
        return F.max_pool2d(self.a(x).unsqueeze(1).unsqueeze(1), 1).flatten(1) * float(self.sizes[0] + self.pair[1])

torch.manual_seed(0)
save = lambda m, name: torch.jit.script(m).save(name + '.pt')
x = torch.randn(4, 3)
save(Body(), 'plain'); save(Own(), 'own'); save(Both(), 'both'); save(WrongSignature(), 'wrong'); save(VectorMetric(), 'vector')
save(Tied(), 'tied'); save(Careless(), 'careless'); save(NoRecurrentDropout(), 'recurrent')
torch.jit.freeze(torch.jit.script(Body().eval())).save('frozen.pt')
torch.jit.trace(Body(), x, check_trace=False).save('traced.pt')
torch.jit.trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), x).save('traced_plain.pt')
torch.jit.trace(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval(), x).save('traced_norm.pt')
lstm = nn.LSTM(3, 2, 2, dropout=0.5)
class L(nn.Module):
    def __init__(self): super().__init__(); self.a = lstm
    def forward(self, x): return self.a(x.unsqueeze(0))[0][0]
torch.jit.trace(L(), x, check_trace=False).save('traced_lstm.pt')
class Normed(nn.Module):  # of x as [samples, 1, 3]
    def __init__(self, layer, after=nn.Identity()):
        super().__init__()
        self.a, self.layer, self.after = nn.Linear(3, 2), layer, after
    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.a(self.layer(x.unsqueeze(1)).squeeze(1)))
trace = lambda m, name: torch.jit.trace(m, x, check_trace=False).save(name + '.pt')
trace(Normed(nn.Identity(), nn.RReLU()), 'traced_rrelu'); save(Normed(nn.Identity(), nn.RReLU()), 'rrelu')
trace(Normed(nn.InstanceNorm1d(1, track_running_stats=True)), 'traced_instance')
trace(Normed(nn.InstanceNorm1d(1)), 'traced_instance_plain'); save(Normed(nn.InstanceNorm1d(1)), 'instance_plain')
save(Normed(nn.InstanceNorm1d(1, track_running_stats=True)), 'instance')
save(Normed(nn.BatchNorm1d(1, track_running_stats=False)), 'norm_plain')
trace(Normed(nn.BatchNorm1d(1, track_running_stats=False)), 'traced_norm_plain')
torch.save(Body().state_dict(), 'state.pt')
for p in (m := Body()).parameters(): p.requires_grad_(False)
save(m, 'fixed')
save(nn.Linear(4, 2), 'four')
def altered(name, result, *changes):
    with zipfile.ZipFile(name + '.pt') as old, zipfile.ZipFile(result + '.pt', 'w') as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith('.py'):
                for before, after in changes: data = data.replace(before, after)
            new.writestr(item, data)
altered('plain', 'newer', (b'torch.linear', b'torch.lineal_attention'))
save(Whole(Part()), 'state_of_part'); save(Whole(Remembers(torch.zeros(1))), 'state_of_class')
save(Whole(Reads(torch.zeros(1))), 'unused_method'); save(ForeignClass(), 'foreign'); save(EveryValue(), 'values')
save(Enters(), 'enters'); save(WithoutGradients(), 'no_grad'); save(Whole(None), 'whole')
writes = (b'  return n\n', b'  torch.save(n, "written.pt")\n  return n\n')
altered('whole', 'default', writes, (b'more: int=7', b'more: int=__torch__.seven(7)'))
altered('whole', 'constant', writes, (b'  a : __torch__', b'  c : Final[int] = __torch__.seven(7)\n  a : __torch__'))
altered('values', 'named_tuple', (b'scale : float', b'scale : float = float(torch.dim(torch.from_file("/etc/hostname")))'))
import glob, os
for name in glob.glob('written.pt'): os.remove(name)
)";

class TorchScriptModelTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    scratch_ = new Scratch;
    scratch_->Python(kModules);
  }
  static void TearDownTestSuite() {
    delete scratch_;
    scratch_ = nullptr;
  }

  static TrainSpec SpecOf(const std::string& name, const std::string& loss = "") {
    TrainSpec spec;
    spec.model.torchscript = name + ".pt";
    spec.loss = loss;
    return spec;
  }
  std::unique_ptr<Model> Make(const std::string& name, const std::string& loss = "") const {
    return MakeModel(SpecOf(name, loss), data_, scratch_->path());
  }
  std::string ErrorOf(const std::string& name, const std::string& loss = "") const {
    return UserErrorOf([&] { Make(name, loss); });
  }

  static Scratch* scratch_;
  const FixedDataset data_{at::randn({16, 3}), at::randn({16, 2})};
};
Scratch* TorchScriptModelTest::scratch_ = nullptr;

TEST_F(TorchScriptModelTest, TrainsByItsOwnStepOrByANamedLoss) {
  const auto own = Make("own");
  const auto [before, after] = Descend(own.get(), data_.all(), 20, 0.1);
  EXPECT_LT(after, before * 0.95);
  own->Train(false);
  const StepOutput step = own->EvaluationStep(data_.all());
  EXPECT_EQ(step.loss.dim(), 0);
  EXPECT_FALSE(step.loss.requires_grad());
  EXPECT_EQ(step.metrics.size(), 1u);
  const at::Tensor error = own->Predict(data_.all().at("input")) - data_.all().at("target");
  EXPECT_FLOAT_EQ(step.metrics.at("mae").item<float>(), error.abs().mean().item<float>());
  EXPECT_FALSE(own->TrainingStep(data_.all()).metrics.at("mae").requires_grad());

  const auto plain = Make("plain", "mse");
  const auto [first, last] = Descend(plain.get(), data_.all(), 20, 0.1);
  EXPECT_LT(last, first * 0.95);
  EXPECT_EQ(Make("both")->EvaluationStep(data_.all()).loss.item<float>(), 42);
  EXPECT_NE(Make("both")->TrainingStep(data_.all()).loss.item<float>(), 42);
}

TEST_F(TorchScriptModelTest, ObeysTrainingAndEvaluation) {
  const auto model = Make("own");  // in training mode
  const auto loss = [&] { return model->TrainingStep(data_.all()).loss.item<float>(); };
  EXPECT_NE(loss(), loss());
  at::Tensor batches;
  for (const auto& [name, buffer] : model->buffers()) {
    if (name == "layers.1.num_batches_tracked") batches = buffer;
  }
  ASSERT_TRUE(batches.defined());
  EXPECT_EQ(batches.item<int64_t>(), 2);  // the trial of MakeModel left no trace
  model->Train(false);
  EXPECT_EQ(loss(), loss());
  EXPECT_EQ(batches.item<int64_t>(), 2);
}

TEST_F(TorchScriptModelTest, SavesTheTrainedModule) {
  const auto model = Make("own");
  at::Tensor flat =
      at::zeros({1000000});  // as the loop leaves the parameters: views into one large storage
  int64_t at = 0;
  for (auto& [name, parameter] : model->parameters()) {
    at::Tensor view = flat.narrow(0, at, parameter.numel()).view(parameter.sizes());
    view.copy_(parameter.detach());
    at += parameter.numel();
    parameter.set_data(view);
    parameter.mutable_grad() = at::zeros_like(parameter);
  }
  Descend(model.get(), data_.all(), 3, 0.1);
  const Scratch out;
  model->Save(out.path());
  EXPECT_EQ(ExportTorchScript(*model, data_, out / "model.pt"), "");
  EXPECT_LT(std::filesystem::file_size(out / "model.pt"), 100000u);
  // Parameters are still the loop's, and can be trained on.
  for (const auto& [name, parameter] : model->parameters()) {
    EXPECT_EQ(parameter.storage().nbytes(), flat.storage().nbytes()) << name;
    EXPECT_TRUE(parameter.requires_grad());
  }
  Descend(model.get(), data_.all(), 1, 0.1);
  out.Python(R"(
import torch
model = torch.jit.load('model.pt')
state = model.state_dict()
assert len(state) == 9, list(state)
assert all(p.requires_grad for p in model.parameters())
assert state['layers.1.num_batches_tracked'] == 5  # three steps, and a look before and after
torch.save(dict(state), 'state.pt')
)");
  const auto saved = ReadSafetensors(out / "weights.safetensors");
  EXPECT_EQ(saved.size(), 9u);
  EXPECT_TRUE(std::filesystem::exists(out / "preprocessing.json"));
}

TEST_F(TorchScriptModelTest, TiedParametersCountOnceAndFixedOnesAreNotTrained) {
  const auto model = Make("tied", "mse");
  std::vector<std::string> names;
  for (const auto& [name, tensor] : model->parameters()) names.push_back(name);
  EXPECT_THAT(names, ::testing::UnorderedElementsAre("a.weight", "a.bias", "b.bias", "head.weight",
                                                     "head.bias"));
  const Scratch out;
  model->Save(out.path());
  EXPECT_EQ(ReadSafetensors(out / "weights.safetensors").size(), 7u);
}

TEST_F(TorchScriptModelTest, AcceptsTracesWithoutTrainingFlags) {
  EXPECT_EQ(ErrorOf("traced_plain", "mse"), "");
  EXPECT_EQ(ErrorOf("recurrent", "mse"), "");
  // Without running statistics training and evaluation are the same.
  for (const char* name : {"traced_instance_plain", "traced_norm_plain", "instance_plain", "norm_plain", "instance", "rrelu"})
    EXPECT_EQ(ErrorOf(name, "mse"), "") << name;
}

TEST_F(TorchScriptModelTest, RefusesWithTheReasonWhatCannotBeTrained) {
  EXPECT_THAT(ErrorOf("frozen", "mse"),
              AllOf(HasSubstr("no parameters"), HasSubstr("torch.jit.freeze")));
  EXPECT_THAT(ErrorOf("fixed", "mse"), HasSubstr("no parameter requires a gradient"));
  EXPECT_THAT(ErrorOf("traced", "mse"),
              AllOf(HasSubstr("batch_norm"), HasSubstr("torch.jit.trace")));
  EXPECT_THAT(ErrorOf("traced_norm", "mse"), HasSubstr("batch_norm"));
  EXPECT_THAT(ErrorOf("traced_lstm", "mse"),
              HasSubstr("lstm in \"forward\" has a fixed training flag"));
  EXPECT_THAT(ErrorOf("traced_rrelu", "mse"),
              HasSubstr("rrelu in \"forward\" has a fixed training flag"));
  EXPECT_THAT(ErrorOf("traced_instance", "mse"),
              HasSubstr("instance_norm in \"forward\" has a fixed training flag"));
  EXPECT_THAT(ErrorOf("careless", "mse"), HasSubstr("in \"forward\" has a fixed training flag"));
  EXPECT_THAT(ErrorOf("newer", "mse"),
              AllOf(HasSubstr("operator aten::lineal_attention"), HasSubstr("newer LibTorch")));
  EXPECT_THAT(ErrorOf("state", "mse"), HasSubstr("torch.jit.script(model).save"));
  EXPECT_THAT(ErrorOf("absent", "mse"), HasSubstr("absent.pt"));
}

// Code of the user's, which would run while LibTorch reads the file: before anything was checked.
TEST_F(TorchScriptModelTest, NothingRunsWhileTheFileIsRead) {
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(scratch_->path());
  EXPECT_THAT(ErrorOf("state_of_part", "mse"), HasSubstr("has a method __"));
  EXPECT_THAT(ErrorOf("state_of_class", "mse"), HasSubstr("has a method __"));
  EXPECT_THAT(ErrorOf("default", "mse"),
              AllOf(HasSubstr("the default of the argument more (in code/"),
                    HasSubstr("computed by code")));
  EXPECT_THAT(ErrorOf("constant", "mse"), HasSubstr("a constant of a class"));
  EXPECT_THAT(ErrorOf("named_tuple", "mse"), HasSubstr("a constant of a class"));
  ModelArchive archive{.file = "net.itw", .script = scratch_->Read("state_of_part.pt")};
  EXPECT_THAT(
      UserErrorOf([&] { MakeTorchScriptModel(SpecOf("", "mse"), data_, archive); }),
      AllOf(HasSubstr("train.model.archive: net.itw"), HasSubstr("has a method __")));
  EXPECT_FALSE(std::filesystem::exists("written.pt"));
  std::filesystem::current_path(before);
  EXPECT_EQ(ErrorOf("values", "mse"), "");
}

TEST_F(TorchScriptModelTest, ChecksWhatIsNotCalledToo) {
  EXPECT_THAT(ErrorOf("unused_method", "mse"), HasSubstr("uses aten::from_file"));
  EXPECT_THAT(ErrorOf("enters", "mse"), HasSubstr("uses aten::save"));
  EXPECT_EQ(ErrorOf("no_grad", "mse"), "");
  EXPECT_THAT(ErrorOf("foreign", "mse"), HasSubstr("uses torch.classes._nnapi.Compilation"));
}

TEST_F(TorchScriptModelTest, NamesWhatDoesNotFit) {
  EXPECT_THAT(ErrorOf("plain"), AllOf(HasSubstr("train.loss"), HasSubstr("@torch.jit.export")));
  EXPECT_THAT(ErrorOf("own", "mse"), HasSubstr("brings its own loss"));
  EXPECT_THAT(ErrorOf("wrong"),
              AllOf(HasSubstr("training_step is (self, Tensor, Tensor) -> Tensor"),
                    HasSubstr("Dict[str, Tensor]")));
  EXPECT_THAT(ErrorOf("vector"), HasSubstr("\"each\" with 2 elements"));
  EXPECT_THAT(ErrorOf("four", "mse"),
              AllOf(HasSubstr("does not run on a sample"), HasSubstr("input [3]")));
  EXPECT_THAT(ErrorOf("plain", "cross_entropy"), HasSubstr("floats"));
  TrainSpec spec = SpecOf("plain", "mse");
  spec.model.options = {{"hidden", 3}};
  EXPECT_THAT(UserErrorOf([&] { MakeModel(spec, data_, scratch_->path()); }),
              HasSubstr("train.model.options"));
}

}  // namespace
}  // namespace itwin::worker
