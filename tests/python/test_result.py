"""Results: nothing but what the hash says gets a name; weights fit or nothing changes."""

import io
import json
import os
import random
import struct

import pytest
import torch

import modules
from itwin import artifacts, safetensors
from itwin.errors import DamagedError, ItwinError, ModelError, NotFoundError, OptimizerError


def to_safetensors(tensors):
    header, data = {"__metadata__": {"made_by": "test"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def to_torchscript(module):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


@pytest.fixture
def job(fake):
    job = fake.add_job()
    fake.move(job, "SUCCEEDED", summary={"test/rmse": 0.25})
    return job


def test_files_metrics_and_download(fake, gw, job, tmp_path):
    fake.put_output(job, "model.pt", b"m" * 5000)
    fake.put_output(job, "plots/a b.png", b"")
    result = gw.job("7f3c").result()
    assert result.metrics == {"test/rmse": 0.25} and [file.path for file in result.files] == ["model.pt", "plots/a b.png"]
    paths = result.download(tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in paths] == ["model.pt", "plots/a b.png"]
    assert paths[0].read_bytes() == b"m" * 5000 and paths[1].read_bytes() == b""
    before = len(fake.calls)
    result.download(tmp_path / "out", "model.pt")  # it is there already
    assert len(fake.calls) == before
    paths[0].write_bytes(b"x" * 5000)
    assert result.download(tmp_path / "out", ["model.pt"])[0].read_bytes() == b"m" * 5000
    with pytest.raises(NotFoundError, match="no 'nope'; its files: model.pt"):
        result.download(tmp_path, "nope")
    assert "model.pt" in result._repr_html_()


def test_a_broken_off_download_is_resumed_not_restarted(fake, gw, job, tmp_path):
    content = os.urandom(5000)
    fake.put_output(job, "model.pt", content)
    fake.cut_downloads_after = 2000
    assert gw.job("7f3c").result().download(tmp_path)[0].read_bytes() == content
    offsets = [request.offset for method, request in fake.calls if method == "DownloadArtifact"]
    assert offsets == [0, 2000] and not list(tmp_path.glob("*.part"))


def test_the_rest_of_an_earlier_session_is_used_or_replaced(fake, gw, job, tmp_path):
    content = os.urandom(5000)
    fake.put_output(job, "model.pt", content)
    (tmp_path / "model.pt.part").write_bytes(content[:3000])
    result = gw.job("7f3c").result()
    assert result.download(tmp_path)[0].read_bytes() == content
    (tmp_path / "model.pt").unlink()
    (tmp_path / "model.pt.part").write_bytes(b"?" * 3000)
    assert result.download(tmp_path)[0].read_bytes() == content
    (tmp_path / "model.pt").unlink()
    (tmp_path / "model.pt.part").write_bytes(b"?" * 9000)
    assert result.download(tmp_path)[0].read_bytes() == content
    offsets = [request.offset for method, request in fake.calls if method == "DownloadArtifact"]
    assert offsets == [3000, 3000, 0, 0]


def test_damage_on_the_way_leaves_nothing(fake, gw, job, tmp_path):
    fake.put_output(job, "model.pt", b"m" * 5000)
    fake.corrupt_downloads = 5
    with pytest.raises(DamagedError, match="another SHA-256"):
        gw.job("7f3c").result().download(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_gateway_that_sends_too_much_is_stopped(fake, gw, job, tmp_path):
    fake.put_output(job, "model.pt", b"m" * 5000)
    job.outputs[0].size_bytes = 1500
    with pytest.raises(DamagedError, match="more of model.pt"):
        gw.job("7f3c").result().download(tmp_path)
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "a//b", "..", "a\\b", "a\0b", "a/.."])
def test_paths_that_would_leave_the_directory(tmp_path, name):
    with pytest.raises(DamagedError, match="outside"):
        artifacts.target_path(tmp_path, name)


def test_links_are_not_followed_out(fake, gw, job, tmp_path):
    fake.put_output(job, "a/x", b"1")
    fake.put_output(job, "y", b"2")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").symlink_to(tmp_path)
    (out / "y").symlink_to(tmp_path / "target")
    result = gw.job("7f3c").result()
    with pytest.raises(DamagedError, match="through a link"):
        result.download(out, "a/x")
    with pytest.raises(ItwinError, match="is a link"):
        result.download(out, "y")
    assert not (tmp_path / "x").exists() and not (tmp_path / "target").exists()


def test_load_puts_weights_and_buffers_into_the_module(fake, gw, job):
    trained, net = modules.Net(), modules.Net()
    trained.norm.num_batches_tracked += 3
    fake.put_output(job, "weights.safetensors", to_safetensors(trained.state_dict()))
    assert gw.job("7f3c").result().load(net) is net
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())


def trained_with(optimizer, net, step="step"):
    """What a job would leave of this optimizer."""
    names = {id(p): name for name, p in net.named_parameters()}
    state = {step: torch.tensor([7])}
    for parameter, values in optimizer.state.items():
        state |= {f"{name}/{names[id(parameter)]}": value for name, value in values.items()
                  if name != "step" and value is not None}
    return state


def optimized(kind, net, **options):
    optimizer = kind(net.parameters(), **options)
    for _ in range(7):
        net(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind, options", [("SGD", {"lr": 0.1, "momentum": 0.9}), ("SGD", {"lr": 0.1}), ("Adam", {}), ("AdamW", {}),
                                           ("RMSprop", {"momentum": 0.5}), ("Adagrad", {})])
def test_load_puts_the_state_into_the_optimizer(fake, gw, job, kind, options):
    kind = getattr(torch.optim, kind)
    trained, net = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    theirs, ours = optimized(kind, trained, **options), kind(net.parameters(), **options)
    fake.put_output(job, "weights.safetensors", to_safetensors(trained.state_dict()))
    fake.put_output(job, "optimizer.safetensors", to_safetensors(trained_with(theirs, trained)))
    gw.job("7f3c").result().load(net, ours)
    x = torch.randn(3, 4)
    for module, optimizer in ((trained, theirs), (net, ours)):  # they go on alike
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(net.weight, trained.weight) and torch.equal(net.bias, trained.bias)


def test_an_optimizer_that_does_not_fit_changes_nothing(fake, gw, job):
    trained, net = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    fake.put_output(job, "weights.safetensors", to_safetensors(trained.state_dict()))
    adam, before = torch.optim.Adam(net.parameters()), net.weight.clone()
    with pytest.raises(NotFoundError, match="export_optimizer"):
        gw.job("7f3c").result().load(net, adam)
    state = trained_with(optimized(torch.optim.SGD, trained, lr=0.1, momentum=0.9), trained)
    fake.put_output(job, "optimizer.safetensors", to_safetensors(state))
    result = gw.job("7f3c").result()
    for optimizer, message in ((adam, "exp_avg/weight is missing.*Nothing was changed"),
                               ({"critic": adam}, "one optimizer and none named 'critic'"),
                               (torch.optim.LBFGS(net.parameters()), "LBFGS cannot.*Possible: SGD, Adam"),
                               (torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], 0.1), r"shape \(3,\) is not the module's")):
        with pytest.raises(OptimizerError, match=message):
            result.load(net, optimizer)
    assert torch.equal(net.weight, before) and not adam.state


def test_the_optimizers_of_phases_are_named(fake, gw, job):
    trained, net = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    state = trained_with(optimized(torch.optim.Adam, trained), trained, "step/critic")
    fake.put_output(job, "weights.safetensors", to_safetensors(trained.state_dict()))
    fake.put_output(job, "optimizer.safetensors", to_safetensors(state))
    adam, result = torch.optim.Adam(net.parameters()), gw.job("7f3c").result()
    with pytest.raises(OptimizerError, match="several optimizers.*names of critic"):
        result.load(net, adam)
    result.load(net, {"critic": adam})
    assert torch.equal(adam.state[net.weight]["exp_avg"], state["exp_avg/weight"])


def test_load_from_the_model_alone_and_for_tied_weights(fake, gw, job):
    trained, net = modules.Tied(), modules.Tied()
    fake.put_output(job, "model.pt", to_torchscript(trained))
    fake.put_output(job, "weights.safetensors", to_safetensors({"a.weight": trained.a.weight.detach()}))
    result = gw.job("7f3c").result()
    result.load(net)
    assert torch.equal(net.b.weight, trained.a.weight) and net.a.weight is net.b.weight
    x = torch.randn(2, 3)
    assert torch.equal(result.model()(x), trained(x))


@pytest.mark.parametrize("module, message", [
    (lambda: modules.Net(5), r"first.weight is \(8, 3\) in the result, \(8, 5\) in the module"),
    (lambda: torch.nn.Linear(3, 2), r"weight is missing in the result.*\(and \d+ more\).*Nothing was changed"),
    (lambda: modules.Net, "takes the module to fill"),
])
def test_weights_that_do_not_fit_change_nothing(fake, gw, job, module, message):
    fake.put_output(job, "weights.safetensors", to_safetensors(modules.Net().state_dict()))
    target = module()
    before = [] if isinstance(target, type) else [tensor.clone() for tensor in target.state_dict().values()]
    with pytest.raises(ModelError, match=message):
        gw.job("7f3c").result().load(target)
    assert all(torch.equal(a, b) for a, b in zip(before, [] if isinstance(target, type) else target.state_dict().values()))


def test_a_result_without_a_model(fake, gw, job):
    fake.put_output(job, "report.txt", b"x")
    result = gw.job("7f3c").result()
    with pytest.raises(NotFoundError, match="its files: report.txt"):
        result.load(modules.Net())
    with pytest.raises(NotFoundError, match="no 'model.pt'"):
        result.model()
    fake.put_output(job, "model.pt", b"not torchscript")
    with pytest.raises(DamagedError, match="not TorchScript"):
        gw.job("7f3c").result().model()


# ---- safetensors ---------------------------------------------------------------------------------------------------

def file_of(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    return path


def test_all_element_types_and_empty_tensors(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4), "c": torch.tensor([True, False]), "e": torch.zeros(0, 3),
               "s": torch.tensor(2.5)}
    read = safetensors.read(file_of(tmp_path, to_safetensors(tensors)))
    assert list(read) == list(tensors)
    assert all(torch.equal(read[name], tensor) and read[name].shape == tensor.shape for name, tensor in tensors.items())


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content, message", [
    (b"", "it has 0 bytes"), (header({}, length=2**63), "header would be"), (header({}, length=99), "header would be"),
    (header(b"{]"), "not JSON"), (header(b"\xff\xff"), "not JSON"), (header(b"[]"), "not a JSON object"),
    (header(b"[" * 100_000), "not JSON"),
    (header(b'{"a": {}, "a": {}}'), "twice"), (header({"a": 3}), "lacks"), (header({"a": {**ENTRY, "dtype": "F31"}}), "F31"),
    (header({"a": {**ENTRY, "dtype": []}}), "unknown type"),
    (header({"a": ENTRY}, b"1234567"), "outside the file"), (header({"a": {**ENTRY, "data_offsets": [-8, 0]}}), "outside"),
    (header({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"12345678"), "outside"),
    (header({"a": {**ENTRY, "shape": [3]}}, b"12345678"), "does not need"),
    (header({"a": {**ENTRY, "shape": [-2]}}, b"12345678"), "list of sizes"),
    (header({"a": {**ENTRY, "shape": [True]}}, b"12345678"), "list of sizes"),
    (header({"a": {**ENTRY, "shape": [2**61, 2**61, 2**10]}}, b"12345678"), "does not need"),
    (header({"a": {**ENTRY, "data_offsets": [0, 8.0]}}, b"12345678"), "pair of numbers"),
    (header({"a": ENTRY, "b": ENTRY}, b"12345678"), "does not begin where"),
    (header({"a": ENTRY}, b"123456789"), "belong to no tensor"),
    (header({"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2"), "neither 0 nor 1"),
])
def test_damage_is_named(tmp_path, content, message):
    with pytest.raises(DamagedError, match=message):
        safetensors.read(file_of(tmp_path, content))


def test_random_damage_never_gets_past_the_checks(tmp_path):
    good = to_safetensors(modules.Net().state_dict())
    seed = 20240607
    dice = random.Random(seed)
    refused = 0
    for round_number in range(400):
        bad = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            action = dice.randrange(3)
            at = dice.randrange(min(len(bad), 900)) if len(bad) else 0
            if action == 0 and bad:
                bad[at] = dice.randrange(256)
            elif action == 1:
                del bad[at:at + dice.randint(1, 40)]
            else:
                bad[at:at] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 40)))
        try:
            tensors = safetensors.read(file_of(tmp_path, bytes(bad)))
            assert all(tensor.numel() * tensor.element_size() <= len(bad) for tensor in tensors.values())
        except DamagedError:
            refused += 1
        except Exception as error:
            pytest.fail(f"seed {seed}, round {round_number}: {type(error).__name__}: {error}")
    assert refused > 200
