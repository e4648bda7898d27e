"""Handing over modules: what cannot work is said here, with the construct and what to do about it."""

import pathlib
import re
import warnings

import pytest
import torch

import modules
from itwin import handover
from itwin.errors import DataError, ModelError, SpecError

X, Y = torch.randn(4, 3), torch.randn(4, 2)


def batch(x, y):
    return {"input": x, "target": y}


def test_a_scripted_module_keeps_mode_buffers_and_weights(tmp_path):
    net = modules.Net()
    scripted = handover.script(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    handover.check_step(scripted, "mse", batch(X, Y))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())  # batch norm too
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in net.parameters())
    handover.save(scripted, tmp_path / "model.pt")
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    assert set(loaded.state_dict()) == set(net.state_dict())
    loaded.train()
    assert not torch.equal(loaded(X), loaded(X))  # dropout lives


def test_training_step_is_exported_without_touching_the_class():
    scripted = handover.script(modules.OwnStep())
    assert not hasattr(modules.OwnStep.training_step, "_torchscript_modifier")
    handover.check_step(scripted, "", batch(X, Y))
    loss, metrics = scripted.training_step(batch(X, Y))
    assert loss.requires_grad and "mae" in metrics


def test_a_named_loss_leaves_the_step_behind():
    assert not hasattr(handover.script(modules.OtherSignature(), "mse"), "training_step")
    exported = torch.jit.export(modules.OwnStep.training_step)
    try:
        with pytest.raises(ModelError, match="brings its own loss.*leave loss= out"):
            handover.script(modules.OwnStep(), "mse")
    finally:
        del exported._torchscript_modifier


def test_a_step_of_another_signature_is_told_the_right_one():
    with pytest.raises(ModelError, match=r"OtherSignature.training_step is \(self, Tensor, Tensor\) -> Tensor; it must be"):
        handover.script(modules.OtherSignature())
    with pytest.raises(ModelError, match="metric 'mae' with shape"):
        handover.check_step(handover.script(modules.VectorMetric()), "", batch(X, Y))


@pytest.mark.parametrize("kind, construct, advice", [
    (modules.StarArgs, r"\*args|variable number", "write out the arguments"),
    (modules.TryExcept, "`try:`|Try", "plain loops, conditions"),
    (modules.UsesNumpy, "", "torch operations|plain loops"),
    (modules.LambdaInside, "[Ll]ambda", "named function"),
    (modules.Unconvertible, "self.table", "register_buffer"),
    (modules.CallsSuper, r"super\(\)", "a name of its own"),
    (modules.ChangesType, "y = 3|y", "one type per variable"),
])
def test_what_cannot_be_scripted_is_named(kind, construct, advice):
    with pytest.raises(ModelError) as info:
        handover.script(kind())
    text = str(info.value)
    assert text.startswith(f"{kind.__name__} cannot be scripted") and "\n" not in text
    assert __import__("re").search(construct, text), text
    assert __import__("re").search(f"What to do: .*({advice})", text), text


def test_a_class_without_source_is_explained():
    names = {}
    exec("import torch\nclass Hidden(torch.nn.Linear):\n    def forward(self, x):\n        return x", names)
    with pytest.raises(ModelError, match="file or in a notebook cell"):
        handover.script(names["Hidden"](2, 2))


def test_nothing_to_train():
    with pytest.raises(ModelError, match="no parameters.*freez"):
        handover.script(torch.nn.ReLU())
    frozen = torch.jit.freeze(torch.jit.script(modules.Net().eval()))
    with pytest.raises(ModelError, match="no parameters.*before freezing"):
        handover.script(frozen)
    with pytest.raises(ModelError, match="all 6 parameters of Net are frozen.*requires_grad_"):
        handover.script(modules.Net().requires_grad_(False))
    with pytest.raises(ModelError, match="lazy"):
        handover.script(torch.nn.Sequential(torch.nn.LazyLinear(2)))
    with pytest.raises(ModelError, match="model=int is none"):
        handover.script(3)


def test_fixed_training_flags_are_refused():
    with pytest.raises(ModelError, match="dropout in FixedDropout has a fixed training flag.*training=self.training"):
        handover.script(modules.FixedDropout())
    handover.script(torch.nn.Sequential(torch.nn.LSTM(3, 4)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = torch.jit.trace(modules.Net(), X)
        plain = torch.jit.trace(torch.nn.Linear(3, 2), X)
    with pytest.raises(ModelError, match="fixed training flag.*hand over the nn.Module"):
        handover.script(trace)
    handover.check_step(handover.script(plain), "mse", batch(X, Y))


def test_every_fixed_flag_is_found():
    trace = lambda net: torch.jit.trace(net, torch.randn(4, 2, 3), check_trace=False)  # noqa: E731
    for layer in (torch.nn.RReLU(), torch.nn.InstanceNorm1d(2, track_running_stats=True)):
        with pytest.raises(ModelError, match="(rrelu|instance_norm) in .* has a fixed training flag"):
            handover.script(trace(torch.nn.Sequential(layer, torch.nn.Linear(3, 2))), "mse")
    for layer in (torch.nn.InstanceNorm1d(2), torch.nn.BatchNorm1d(2, track_running_stats=False)):
        handover.script(trace(torch.nn.Sequential(layer, torch.nn.Linear(3, 2))), "mse")  # the same in training and evaluation


def test_training_arguments_are_those_of_the_worker():
    source = pathlib.Path(__file__).resolve().parents[2] / "agent/worker/model/training_flags.cc"
    assert dict(re.findall(r'{"aten::(\w+)", "(\w+)"', source.read_text())) == handover.TRAINING_ARGUMENTS


def test_what_runs_while_a_file_is_read_is_refused():
    with pytest.raises(ModelError, match="has a part with a method __setstate__"):
        handover.script(modules.WithState(), "mse")


def test_an_already_scripted_module_is_taken_as_it_is():
    scripted = torch.jit.script(modules.Net())
    assert handover.script(scripted) is scripted


@pytest.mark.parametrize("net, loss, x, y, error, message", [
    (modules.Net(4), "mse", X, Y, ModelError, r"forward fails on inputs of shape \(4, 3\)"),
    (modules.Net(), "mse", X, torch.randn(4), DataError, r"needs equal shapes; the model's output has shape \(4, 2\) and the target \(4,\)"),
    (modules.Net(), "cross_entropy", X, Y, DataError, "needs class numbers"),
    (modules.Net(), "cross_entropy", X, torch.tensor([0, 1, 2, 0]), DataError, "class 2, but the model has 2 outputs"),
    (modules.Net(), "mse", X * float("nan"), Y, ModelError, "loss of the first samples is nan"),
    (modules.NoGrad(), "mse", X, Y, ModelError, "does not depend on any trainable"),
    (modules.ReturnsTwo(), "mse", X, Y, ModelError, "forward returns tuple"),
    (modules.Net(), "", X, Y, SpecError, "no loss is given"),
    (modules.OwnStep(), "", X, torch.randn(4, 7), ModelError, "training_step fails"),
])
def test_one_step_finds_what_does_not_fit(net, loss, x, y, error, message):
    with pytest.raises(error, match=message) as info:
        handover.check_step(handover.script(net), loss, batch(x, y))
    assert "\n" not in str(info.value)


def test_unused_parameters_are_a_warning():
    with pytest.warns(UserWarning, match="2 trainable parameters take no part.*unused"):
        handover.check_step(handover.script(modules.Unused()), "mse", batch(X, Y))


@pytest.mark.parametrize("loss, y", [
    ("mse", Y), ("l1", Y), ("huber", Y), ("bce_logits", Y.sigmoid()), ("cross_entropy", torch.tensor([0, 1, 1, 0])),
    ("smooth_l1", Y), ("focal", torch.tensor([0, 1, 1, 0])), ("dice", torch.tensor([0, 1, 1, 0])), ("crps", torch.randn(4, 1)),
    ("gaussian_nll", torch.randn(4)), ("crps_ensemble", torch.randn(4, 1)), ("kl_div", Y.softmax(1)), ("nll", torch.tensor([0, 1, 1, 0]))])
def test_every_named_loss_is_tried(loss, y):
    handover.check_step(handover.script(modules.Net(), loss), loss, batch(X, y))
    handover.check_step(handover.script(modules.Net(3, 1), "mse"), "mse", batch(X, torch.randn(4)))  # [n] is [n, 1]
