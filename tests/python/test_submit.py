"""From keywords and documents to the spec that arrives at the gateway, and the files that travel with it."""

import datetime
import hashlib
import io
import json
import os

import grpc
import numpy as np
import pytest
import torch

import modules
from itwin import archive, safetensors, spec as specs
from itwin.errors import ConflictError, DamagedError, ModelError, SpecError, UnavailableError

X, Y = np.random.rand(20, 3).astype("float32"), np.random.rand(20, 2).astype("float32")


def submitted(fake):
    return [request for method, request in fake.calls if method == "SubmitJob"][-1].spec


def names(fake, method):
    return [name for name, _ in fake.calls].count(method)


def test_a_module_with_arrays_arrives_whole(fake, gw, tmp_path):
    net = modules.Net()
    job = gw.submit(model=net, loss=torch.nn.MSELoss(), metrics="mae", data=(X, Y), split={"train": (0, 15), "test": (15, 20)},
                    optimizer=torch.optim.Adam(net.parameters(), 2e-3), batch=5, epochs=3, ranks=2, time="10m".replace("10m", "600s"),
                    seed=7, name="wind", env={"OMP_NUM_THREADS": 1}, labels={"team": "sea"})
    spec = submitted(fake)
    assert job.state == "QUEUED" and job.name == "wind"
    assert spec.train.model.archive == "model.itw" and spec.train.data.npz == "data.npz"
    assert spec.train.loss == "mse" and list(spec.train.metrics) == ["mae"] and spec.train.optimizer.adam.lr == 2e-3
    assert (spec.train.batch, spec.train.epochs, spec.train.seed) == (5, 3, 7)
    assert (spec.resources.nodes, spec.resources.ranks_per_node, spec.resources.time.seconds) == (1, 2, 600)
    assert spec.train.data.split.train == "0..15" and dict(spec.env) == {"OMP_NUM_THREADS": "1"}
    inputs = {entry.path: fake.blobs[entry.sha256] for entry in spec.inputs}
    with np.load(io.BytesIO(inputs["data.npz"])) as arrays:
        np.testing.assert_array_equal(arrays["target"], Y)
    (tmp_path / "model.itw").write_bytes(inputs["model.itw"])
    script = safetensors.read(tmp_path / "model.itw")["script"].numpy().tobytes()
    assert set(torch.jit.load(io.BytesIO(script)).state_dict()) == set(net.state_dict())
    assert archive.read_manifest(tmp_path / "model.itw")["handshake"]["samples"] == 4


def test_a_module_that_torchscript_does_not_take_goes_as_a_graph(fake, gw, tmp_path):
    gw.submit(model=modules.GraphOnly(), loss="mse", data=(X, Y))
    spec = submitted(fake)
    (tmp_path / "model.itw").write_bytes({entry.path: fake.blobs[entry.sha256] for entry in spec.inputs}["model.itw"])
    assert archive.read_manifest(tmp_path / "model.itw")["kind"] == "graph"
    with pytest.raises(ModelError, match="cannot be scripted.*with samples at hand"):
        gw.submit(model=modules.GraphOnly(), loss="mse", data="site:/x.npz")


@pytest.mark.parametrize("data, transforms, width", [
    ((X, Y), [{"standardize": {}}, {"crop": {"sizes": [2]}}], 2),
    ({"synthetic": {"samples": 20, "input_shape": [3], "target_shape": [2]}}, None, 3),
    ({"csv": {"path": "x.csv", "inputs": ["a", "b", "c"], "targets": ["d", "e"]}}, [{"log": {"add": 1.0}}], 3),
])
def test_samples_are_those_that_the_model_will_see(tmp_path, data, transforms, width):
    net = modules.Net(width, 2)
    train = specs.train(str(tmp_path), net, "mse", data, transforms=transforms)
    manifest = archive.read_manifest(train["model"]["archive"])
    assert manifest["data"]["input"]["shape"] == [width] and manifest["handshake"]["samples"] == 4 and manifest["operators"]
    with pytest.raises(ModelError, match="forward fails"):
        specs.train(str(tmp_path), modules.Net(width + 1, 2), "mse", data, transforms=transforms)


@pytest.mark.parametrize("keywords", [{"data": {"npz": "site:/x.npz"}}, {"data": (X, Y), "check": False}, {}])
def test_operators_are_told_before_anything_is_queued(tmp_path, keywords):
    train = specs.train(str(tmp_path), modules.ReadsFiles(), "mse", **keywords)
    manifest = archive.read_manifest(train["model"]["archive"])
    assert "aten::from_file" in manifest["operators"] and manifest["kind"] == "script" and not manifest["handshake"]


def test_shapes_follow_the_transforms():
    from itwin import dataset
    batch = {"input": torch.rand(4, 2, 5, 5), "target": torch.rand(4, 2, 5, 5)}
    crop = {"crop": {"sizes": [4, 4]}}
    made = dataset.transformed(batch, [crop, {"coarsen": {"factor": 2}}, {"fill_missing": {}}])
    assert made["input"].shape == (4, 2, 2, 2) and made["target"].shape == (4, 2, 4, 4)
    made = dataset.transformed(batch, [{"window": {"length": 3, "horizon": 2}}])
    assert made["input"].shape == (4, 3, 2, 5, 5) and made["target"].shape == (4, 2, 5, 5)
    assert dataset.transformed(batch, [{"reshape": {"shape": [10, -1]}}])["input"].shape == (4, 10, 5)
    assert dataset.transformed(batch, [{"reshape": {"shape": [7]}}]) is None and dataset.transformed(batch, [{"new": {}}]) is None


def test_groups_schedulers_and_loss_options_travel_by_name(fake, gw):
    net = modules.Net()
    optimizer = torch.optim.AdamW([{"params": [net.first.weight, net.first.bias], "lr": 1e-4},
                                   {"params": [*net.norm.parameters(), *net.last.parameters()], "weight_decay": 0.0}], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    gw.submit(model=net, loss=torch.nn.SmoothL1Loss(beta=0.5), data=(X, Y), optimizer=optimizer, scheduler=scheduler, epochs=40)
    train = submitted(fake).train
    assert train.optimizer.adamw.lr == 1e-4 and train.schedule.unit == "epoch" and train.schedule.cosine.length == 40
    assert train.schedule.cosine.min_factor == 0 and train.loss_options.beta == 0.5
    group = train.parameter_groups[0]
    assert list(group.match) == ["norm.weight", "norm.bias", "last.weight", "last.bias"]
    assert group.lr == 1e-3 and group.weight_decay == 0 and group.HasField("weight_decay")


def test_what_cannot_train_is_never_sent(fake, gw):
    with pytest.raises(ModelError, match="forward fails"):
        gw.submit(model=modules.Net(4), loss="mse", data=(X, Y))
    assert names(fake, "ValidateJob") == names(fake, "UploadArtifact") == 0
    gw.submit(model=modules.Net(4), loss="mse", data=(X, Y), check=False)
    assert names(fake, "SubmitJob") == 1


def test_builtin_model_and_keywords_alone(fake, gw):
    gw.submit(model="mlp", data={"synthetic": {"samples": 64, "input_shape": [3], "target_shape": [2]}}, optimizer="sgd", epochs=2,
              image="/p/torch.sif", time=datetime.timedelta(minutes=5))
    spec = submitted(fake)
    assert spec.train.model.builtin == "mlp" and spec.train.data.synthetic.samples == 64 and spec.image == "/p/torch.sif"
    assert spec.train.optimizer.HasField("sgd") and spec.resources.time.seconds == 300 and not spec.inputs


def test_a_document_with_files_beside_it(fake, gw, tmp_path):
    place = tmp_path / "project"
    (place / "data").mkdir(parents=True)
    (place / "data" / "w.cdf").write_bytes(b"netcdf")
    (tmp_path / "shared.pt").write_bytes(b"model")
    document = {"name": "a", "train": {"model": {"torchscript": "../shared.pt"}, "data": {"netcdf": "data/w.cdf"}}}
    (place / "job.json").write_text(json.dumps(document))
    gw.submit(place / "job.json", epochs=9, ranks=4, set=["train.batch=3"], labels={"k": "v"})
    spec = submitted(fake)
    assert spec.train.data.netcdf == "data/w.cdf" and spec.train.model.torchscript == "shared.pt"
    assert {entry.path: fake.blobs[entry.sha256] for entry in spec.inputs} == {"data/w.cdf": b"netcdf", "shared.pt": b"model"}
    assert (spec.train.epochs, spec.train.batch, spec.resources.ranks_per_node) == (9, 3, 4) and spec.labels["k"] == "v"
    request = [request for method, request in fake.calls if method == "ValidateJob"][-1]
    assert list(request.overrides) == ["resources.nodes=1", "resources.ranks_per_node=4", 'labels.k="v"', "train.epochs=9",
                                       "train.batch=3"] or set(request.overrides) >= {"train.epochs=9", "train.batch=3"}


def test_dict_and_text_documents_are_relative_to_here(fake, gw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"npz")
    document = {"train": {"model": {"builtin": "mlp"}, "data": {"npz": "x.npz"}}}
    gw.submit(document)
    gw.submit(json.dumps(document))
    assert [entry.path for entry in submitted(fake).inputs] == ["x.npz"]
    assert names(fake, "UploadArtifact") == 1  # the second time the gateway has it


def test_files_that_are_not_here(fake, gw, tmp_path):
    with pytest.raises(SpecError, match=r"train.data.npz: .*none.npz does not exist.*site:"):
        gw.submit({"train": {"data": {"npz": "none.npz"}}})
    with pytest.raises(SpecError, match="is a directory"):
        gw.submit({"train": {"data": {"npz": str(tmp_path)}}})
    gw.submit({"train": {"data": {"npz": "site:/x.npz"}, "model": {"torchscript": "sha256:" + "0" * 64}}})
    assert not submitted(fake).inputs


def test_two_files_of_one_name_stay_apart(fake, gw, tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "x.npy").write_bytes(part.encode())
    gw.submit({"train": {"data": {"npy": {"input": str(tmp_path / "a" / "x.npy"), "target": str(tmp_path / "b" / "x.npy")}}}})
    spec = submitted(fake)
    content = {entry.path: fake.blobs[entry.sha256] for entry in spec.inputs}
    assert content[spec.train.data.npy.input] == b"a" and content[spec.train.data.npy.target] == b"b"


def test_a_command_with_files(fake, gw, tmp_path):
    script = tmp_path / "train.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    gw.command(["./train.sh", "--epochs", 5], files=[script], mpi=True, ranks=4, nodes=2, env={"A": "b"}, image="docker://a/b:1",
               inputs={"cfg/a.json": __file__})
    spec = submitted(fake)
    assert list(spec.command.argv) == ["./train.sh", "--epochs", "5"] and list(spec.command.files) == ["train.sh"]
    assert spec.image == "docker://a/b:1"
    assert spec.command.mpi and (spec.resources.nodes, spec.resources.ranks_per_node) == (2, 2)
    assert {entry.path: entry.executable for entry in spec.inputs} == {"train.sh": True, "cfg/a.json": False}


def test_command_refusals(gw, tmp_path):
    with pytest.raises(SpecError, match="argv is a list"):
        gw.command("python3 train.py")
    with pytest.raises(SpecError, match="without mpi=True"):
        gw.command(["a"], ranks=2)
    (tmp_path / "d").mkdir()
    for path in (tmp_path / "x", tmp_path / "d" / "x"):
        path.write_text(str(path))
    with pytest.raises(SpecError, match="two different files would be called 'x'"):
        gw.command(["a"], files=[tmp_path / "x", tmp_path / "d" / "x"])
    with pytest.raises(SpecError, match="not a path inside"):
        gw.command(["a"], inputs={"../x": tmp_path / "x"})


@pytest.mark.parametrize("keywords, expected", [
    (dict(ranks=4), {"nodes": 1, "ranks_per_node": 4}), (dict(ranks=8, nodes=2), {"nodes": 2, "ranks_per_node": 4}),
    (dict(ranks=8, ranks_per_node=4), {"nodes": 2, "ranks_per_node": 4}), (dict(nodes=3), {"nodes": 3}),
    (dict(time=90.0), {"time": "90s"}), (dict(time="30m", more={"gpus_per_node": 1}), {"gpus_per_node": 1, "time": "30m"}),
    (dict(), {})])
def test_resources(keywords, expected):
    assert specs.resources(**keywords) == expected


@pytest.mark.parametrize("keywords", [
    dict(ranks=0), dict(ranks=3, nodes=2), dict(ranks=3, ranks_per_node=2), dict(ranks=5, nodes=2, ranks_per_node=2),
    dict(ranks=1.5), dict(ranks=True), dict(time=-1)])
def test_resources_that_do_not_add_up(keywords):
    with pytest.raises(SpecError):
        specs.resources(**keywords)


def test_the_gateways_words_arrive(gw):
    with pytest.raises(SpecError, match="epocs"):
        gw.submit({"train": {"epocs": 3}})
    with pytest.raises(TypeError, match="epocs"):
        gw.submit(epocs=3)
    with pytest.raises(SpecError, match="nothing to run"):
        gw.submit()
    with pytest.raises(SpecError, match="no plain value.*model="):
        gw.submit({"train": {"model": modules.Net()}})
    with pytest.raises(SpecError, match="spec=Net is none.*model="):
        gw.submit(modules.Net())


def test_documents_that_are_none(gw, tmp_path):
    with pytest.raises(SpecError, match="job.yaml cannot be read"):
        gw.submit("no/such/job.yaml")
    (tmp_path / "job.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(SpecError, match="not UTF-8"):
        gw.submit(tmp_path / "job.yaml")
    with open(tmp_path / "big.yaml", "wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(SpecError, match="at most 1 MiB"):
        gw.submit(tmp_path / "big.yaml")
    with pytest.raises(SpecError, match="at most 1 MiB"):
        gw.submit({"name": "x" * (2 << 20)})


def test_a_lost_reply_makes_one_job(fake, gw):
    fake.fail_next["SubmitJob"] = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED]
    job = gw.submit(model="mlp", data={"synthetic": {"samples": 1}})
    ids = {request.request_id for method, request in fake.calls if method == "SubmitJob"}
    assert len(ids) == 1 and list(fake.jobs) == [job.id] and names(fake, "SubmitJob") == 3
    assert gw.submit(model="mlp", data={"synthetic": {"samples": 1}}).id != job.id  # asked for again: another job


def test_an_upload_goes_on_where_it_broke_off(fake, gw, tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "big.bin").write_bytes(content)
    fake.cut_uploads_after = 1_500_000
    gw.command(["a"], files=[tmp_path / "big.bin"])
    assert fake.blobs[hashlib.sha256(content).hexdigest()] == content
    offsets = [request.offset for method, request in fake.calls if method == "UploadArtifact"]
    assert offsets == [0, 1_500_000]


def test_an_empty_file_travels(fake, gw, tmp_path):
    (tmp_path / "empty").touch()
    gw.command(["a"], files=[tmp_path / "empty"])
    assert fake.blobs[hashlib.sha256(b"").hexdigest()] == b""


def test_a_file_that_changes_meanwhile(fake, gw, tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    from itwin import artifacts
    real = artifacts._stat

    def change(*arguments):
        path.write_bytes(b"after!")
        return real(*arguments)
    monkeypatch.setattr(artifacts, "_stat", change)
    with pytest.raises(DamagedError, match="changed while it was uploaded"):
        gw.command(["a"], files=[path])
    assert not fake.blobs and not fake.jobs


def test_a_full_disk_is_told_and_a_dead_gateway_given_up(fake, gw, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"x")
    fake.fail_next["UploadArtifact"] = [grpc.StatusCode.RESOURCE_EXHAUSTED]
    with pytest.raises(Exception, match="cannot upload .*scripted RESOURCE_EXHAUSTED"):
        gw.command(["a"], files=[tmp_path / "x"])
    fake.fail_next["UploadArtifact"] = [grpc.StatusCode.UNAVAILABLE] * 20
    monkeypatch.setattr("itwin.artifacts.TRIES", 3)
    with pytest.raises(UnavailableError):
        gw.command(["a"], files=[tmp_path / "x"])
    assert names(fake, "UploadArtifact") == 4


def test_a_request_id_with_another_body_is_a_conflict(fake, gw):
    fake.fail_next["SubmitJob"] = [grpc.StatusCode.ALREADY_EXISTS]
    with pytest.raises(ConflictError):
        gw.submit(model="mlp", data={"synthetic": {"samples": 1}})


def test_validate_returns_the_spec(gw):
    assert gw.validate({"name": "x", "train": {"epochs": 2}}, set="train.epochs=5") == {"name": "x", "train": {"epochs": 5}}
