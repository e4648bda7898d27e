"""Exported graphs and archives, on the Python side."""

import json
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import modules
from itwin import archive, graph, losses, safetensors
from itwin.errors import DataError, ModelError

X, Y = torch.randn(5, 3), torch.randn(5, 2)
EXPORTS = hasattr(torch, "export") and hasattr(torch.export, "export")  # PyTorch 2; else the graph is traced


def batch(x=X, y=Y):
    return {"input": x, "target": y}


def test_sizes_follow_the_input_and_weights_have_their_names():
    document, tensors, frontend = graph.export(modules.ResNet(), batch(torch.randn(3, 1, 8, 8)), own_loss=False)
    names = {entry["name"]: entry for entry in document["weights"]}
    assert names["blocks.0.norm.running_mean"]["kind"] == "buffer" and names["head.weight"]["kind"] == "parameter"
    assert set(tensors) == set(names)
    flags = [node["args"]["training"] for node in document["nodes"] if node["op"] == "aten::batch_norm"]
    assert flags == [True] * 3  # by name, so that evaluation can change it
    assert "size" in [node["op"] for node in document["nodes"]]
    json.dumps(document, allow_nan=False)


def test_tied_weights_are_one():
    document, _, _ = graph.export(modules.Tied(), batch(), own_loss=False)
    assert [entry.get("same_as") for entry in document["weights"]] == [None, "a.weight"]


def test_infinity_is_spelt():
    document, _, _ = graph.export(modules.Transformer(), batch(torch.randn(3, 6, 16)), own_loss=False)
    assert {"float": "-inf"} in [value for node in document["nodes"] for value in node["args"].values()]


@pytest.mark.parametrize("net, message", [
    (modules.BranchesByValue(), r"decides in Python by the values of tensors \(.*modules.py:\d+"),
    (modules.LoopsOverSamples(), r"the size of the batch \(5\), or a value in it, is built into the exported graph"),
    (modules.TakesNumberOut(), "is built into the exported graph|takes a number out of a tensor"),
    (modules.ReturnsTwo(), "must return one tensor"),
])
def test_what_a_graph_cannot_keep_is_refused(net, message):
    with pytest.raises(ModelError, match=message):
        graph.export(net, batch(), own_loss=False)


def test_len_and_int_of_the_batch_are_followed_or_refused():
    if not EXPORTS:  # a trace has fixed them
        with pytest.raises(ModelError, match=r"the size of the batch \(5\), or a value in it, is built into .*modules.py:\d+"):
            graph.export(modules.FixedBatch(), batch(), own_loss=False)
        return
    document, _, _ = graph.export(modules.FixedBatch(), batch(), own_loss=False)
    size = next(node for node in document["nodes"] if node["op"] == "size")
    zeros = next(node for node in document["nodes"] if node["op"] == "aten::zeros")
    assert size["args"] == {"self": {"v": "input"}, "dim": 0} and zeros["args"]["size"] == [{"v": size["out"][0]}, 2]


def test_script_first_graph_second_never_a_trace(tmp_path):
    assert archive.export(modules.Net(), batch(), tmp_path / "a.itw", "mse")["kind"] == "script"
    manifest = archive.export(modules.GraphOnly(), batch(), tmp_path / "b.itw", "mse")
    assert manifest["kind"] == "graph" and manifest["operators"] and "aten::dropout" in manifest["operators"]
    assert archive.read_manifest(tmp_path / "b.itw") == manifest
    with pytest.raises(ModelError, match="fixed training flag"):  # not exported instead
        archive.export(torch.jit.trace(modules.Net(), X, check_trace=False), batch(), tmp_path / "c.itw", "mse")
    with pytest.raises(ModelError, match="built into the exported graph.*because TorchScript does not take it"):
        archive.export(modules.LoopsOverSamples(), batch(), tmp_path / "d.itw", "mse")


def test_the_handshake_is_recorded_without_touching_the_module(tmp_path):
    net = modules.Net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    manifest = archive.export(net, batch(), tmp_path / "a.itw", "mse")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()) and net.training
    net.eval()
    assert manifest["handshake"]["loss"] == pytest.approx(((net(X[:4]) - Y[:4]) ** 2).mean().item(), rel=1e-6)
    assert "training_loss" not in manifest["handshake"]  # dropout draws at random
    assert torch.equal(safetensors.read(tmp_path / "a.itw")["sample/input"], X[:4])


def test_losses_are_the_workers(tmp_path):
    """The constants of tests/worker/model/loss_test.cc."""
    def sines(rows, columns, a=0.7):
        return (torch.arange(rows * columns, dtype=torch.float64) * a + 0.3).sin().mul(2).reshape(rows, columns)
    p, y, y1, labels = sines(4, 3), sines(4, 3, 1.9), sines(4, 1, 1.9), torch.tensor([0, 2, 1, 2])
    for loss, prediction, target, options, expected in [
            ("smooth_l1", p, y, {"beta": 0.5}, 1.2096879435), ("huber", p, y, {"delta": 0.5}, 0.6048439717),
            ("cross_entropy", p, labels, {"label_smoothing": 0.1}, 1.7503803241),
            ("cross_entropy", p, labels, {"class_weights": [1, 0.5, 3]}, 3.3965558925),
            ("kl_div", p.log_softmax(1), y.softmax(1), {}, 0.6100322563), ("focal", p, labels, {}, 1.3178077892),
            ("gaussian_nll", p[:, :2], y[:, :1], {}, 0.9232168930), ("crps", p[:, :2], y[:, :1], {}, 0.93813001),
            ("crps_ensemble", sines(4, 5), y1, {}, 1.0333589898),
            ("quantile", p, y1, {"quantiles": [0.1, 0.5, 0.9]}, 0.5557147725)]:
        assert losses.compute(torch, loss, prediction, target, options).item() == pytest.approx(expected, abs=2e-8), loss
    with pytest.raises(DataError, match="crps' needs 2 numbers"):
        losses.compute(torch, "crps", p, y1)


# What torch.export of 2.6 records of Linear, BatchNorm1d, Dropout, view(x.shape[0], -1): its nodes, made with torch.fx by hand.
def recorded_program():
    aten, g = torch.ops.aten, torch.fx.Graph()
    names = ["p_module_line_weight", "p_module_line_bias", "p_module_norm_weight", "p_module_norm_bias",
             "b_module_norm_running_mean", "b_module_norm_running_var", "b_module_norm_num_batches_tracked", "input_1"]
    node = {name: g.placeholder(name) for name in names}
    size = g.call_function(aten.sym_size.int if hasattr(aten, "sym_size") else aten.size.int, (node["input_1"], 0))
    line = g.call_function(aten.linear.default, (node["input_1"], node["p_module_line_weight"], node["p_module_line_bias"]))
    g.call_function(aten.add_.Tensor, (node["b_module_norm_num_batches_tracked"], 1))
    norm = g.call_function(aten.batch_norm.default, (
        line, node["p_module_norm_weight"], node["p_module_norm_bias"], node["b_module_norm_running_mean"],
        node["b_module_norm_running_var"], True, 0.1, 1e-05, True))
    drop = g.call_function(aten.dropout.default, (norm, 0.5, True))
    import operator
    rows = g.call_function(operator.mul, (size, 1))
    view = g.call_function(aten.view.default, (drop, [rows, -1]))
    halves = g.call_function(aten.split.Tensor, (view, 2), {"dim": 1})
    half = g.call_function(operator.getitem, (halves, 0))
    g.output((half,))
    kinds = {"p": "PARAMETER", "b": "BUFFER", "i": "USER_INPUT"}
    specs = [SimpleNamespace(arg=SimpleNamespace(name=name), kind=SimpleNamespace(name=kinds[name[0]]),
                             target=name[2:].replace("module_line_", "module.line.").replace("module_norm_", "module.norm."))
             for name in names]
    outputs = [SimpleNamespace(kind=SimpleNamespace(name="USER_OUTPUT"), target=None)]
    return SimpleNamespace(graph=g, graph_signature=SimpleNamespace(input_specs=specs, output_specs=outputs), constants={})


class Recorded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module = torch.nn.Module()
        self.module.line, self.module.norm = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)


def test_a_program_of_torch_export_becomes_the_same_kind_of_graph():
    document, tensors = graph.from_program(torch, recorded_program(), Recorded(), ["input"], ["prediction"])
    assert [node["op"] for node in document["nodes"]] == [
        "size", "aten::linear", "aten::add_", "aten::batch_norm", "aten::dropout", "mul", "aten::view", "aten::split", "item"]
    norm = next(node for node in document["nodes"] if node["op"] == "aten::batch_norm")
    assert norm["args"]["training"] is True and norm["args"]["running_mean"] == {"v": "w.norm.running_mean"}
    assert document["nodes"][6]["args"]["size"] == [{"v": "mul"}, -1] and document["nodes"][7]["overload"] == "Tensor"
    assert document["inputs"] == [{"value": "input_1", "name": "input"}]
    assert {"line.weight", "norm.running_var", "norm.num_batches_tracked"} <= set(tensors)
