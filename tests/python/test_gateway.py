"""The package against the built programs: itwin-gateway, its embedded site, agent and worker."""

import json
import math
import os
import pathlib
import subprocess
import threading

import numpy as np
import pytest
import torch

import itwin
import modules
from conftest import wait_until
from itwin.errors import JobFailedError, NotFoundError, SpecError, StateError

EXAMPLES = pathlib.Path(__file__).parents[2] / "deploy" / "examples"


@pytest.fixture
def gw(gateway):
    with gateway.connect() as connected:
        yield connected


def spool_points(gateway, job):
    """Every point that the programs wrote, as (series, attempt, step, value)."""
    points = []
    for spool in gateway.spools(job.id):
        for name in ["metrics.jsonl", *sorted(path.name for path in spool.glob("node-*.jsonl"))]:
            for line in (spool / name).read_text().splitlines():
                entry = json.loads(line)
                host = entry.get("host")  # node series are kept with their host in the name
                points += [(series.replace("node/", f"node/{host}/", 1) if host else series, int(spool.name),
                            entry.get("step", 0), float(value))
                           for series, value in entry.get("metrics", {}).items()]
    return sorted(points, key=repr)


def received(points):
    return sorted(((p.series, p.attempt, p.step, p.value) for p in points), key=repr)


def linear_task(samples=400):
    x = np.random.default_rng(0).normal(size=(samples, 3)).astype("float32")
    return x, x @ np.array([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]], dtype="float32")


def test_a_module_goes_out_and_comes_back_trained(gateway, gw):
    x, y = linear_task()
    net = modules.Net()
    job = gw.submit(model=net, loss="mse", data=(x, y), split={"test_fraction": 0.2},
                    optimizer=torch.optim.Adam(net.parameters(), 3e-2), batch=20, epochs=25, ranks=2, name="linear", time="5m")
    job.wait(120)
    assert job.state == "SUCCEEDED", (job.reason, job.logs("stderr"))
    frame = job.metrics()
    assert received(frame.itertuples()) == spool_points(gateway, job)
    loss = frame[frame.series == "train/loss"].value
    assert loss.tail(10).mean() < loss.head(10).mean() / 2
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = job.result()
    result.load(net)
    assert any(not torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    net.eval()
    with torch.no_grad():
        inputs = torch.from_numpy(x[:50])
        assert torch.allclose(net(inputs), result.model()(inputs), atol=1e-6)
    assert result.metrics and all(math.isfinite(value) for value in result.metrics.values())
    assert len(job.plot()) >= 1 and not job.events().empty
    assert job.id in [found.id for found in gw.jobs(name="linear")] and gw.job(job.id[:6]).id == job.id


def test_a_running_job_is_traced(binaries, gateway, gw, tmp_path):
    x, y = linear_task(100)
    job = gw.submit(model="mlp", loss="mse", data=(x, y), epochs=1_000_000, batch=10, ranks=2)
    wait_until(lambda: job.refresh().state == "RUNNING", 60, "the job to run")
    trace = json.loads(job.trace(steps=4, file=tmp_path / "here.json").read_text())
    steps = [event["pid"] for event in trace["traceEvents"] if event["ph"] == "X" and event["name"] == "step"]
    assert sorted(steps) == [0] * 4 + [1] * 4  # of both ranks
    assert job.refresh().state == "RUNNING" and [file.path for file in itwin.result.Result(gw._connection, job).files] == ["trace-1.json"]
    # The same from a shell.
    environment = dict(os.environ, ITWIN_CONFIG=str(gateway.write_config(tmp_path / "config.yaml")))
    shell = subprocess.run([binaries / "itwin", "trace", job.id, "--steps", "2"], env=environment, cwd=tmp_path, capture_output=True,
                           text=True, timeout=60, check=True)
    assert "ui.perfetto.dev" in shell.stdout
    assert json.loads((tmp_path / f"{job.id}-trace-2.json").read_text())["traceEvents"]
    assert list(job.events().kind).count("traced") == 2
    job.cancel()
    assert job.wait(60).state == "CANCELLED"
    kept = {file.path for file in job.result(partial=True).files}
    assert {"trace-1.json", "trace-2.json"} <= kept
    with pytest.raises(StateError, match="only|no more steps"):
        job.trace()


def test_a_training_step_of_its_own(gw):
    x, y = linear_task(100)
    job = gw.submit(model=modules.OwnStep(), data={"input": x, "target": y}, split={"test_fraction": 0.2},
                    optimizer="sgd", epochs=1, batch=10)
    assert job.wait(120).state == "SUCCEEDED", job.reason
    assert "test/mae" in set(job.metrics().series)


def test_a_frame_for_a_builtin_model(gw):
    import pandas as pd
    x, y = linear_task(100)
    frame = pd.DataFrame(x, columns=["a", "b", "c"]).assign(y=y[:, 0])
    job = gw.submit(model="mlp", loss="mse", data=frame, target="y", epochs=1, batch=10)
    assert job.wait(120).state == "SUCCEEDED", job.reason


def test_every_point_once_although_the_gateway_is_killed(gateway, gw, tmp_path):
    program = tmp_path / "count.py"
    program.write_text("""
import json, os, time
with open(os.environ["ITWIN_METRICS"], "a") as out:
    for step in range(600):
        out.write(json.dumps({"t": time.time(), "step": step, "metrics": {"a": step / 7, "b": -step}}) + "\\n")
        out.flush()
        time.sleep(0.01)
""")
    job = gw.command(["python3", "count.py"], files=[program], name="count")
    points, errors = [], []

    def follow():
        try:
            for update in job.stream():
                points.extend(update.points)
        except Exception as error:
            errors.append(error)
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    for kill in range(2):
        wait_until(lambda: len(points) > 100 * (kill + 1) or errors, 60, "points before the kill")
        gateway.kill()
        gateway.start()
    thread.join(120)
    assert not thread.is_alive() and not errors and job.state == "SUCCEEDED", (errors, job.reason)
    assert received(points) == spool_points(gateway, job)
    assert len([p for p in points if p.series in "ab"]) == 1200
    assert received(gw.job(job.id).metrics().itertuples()) == spool_points(gateway, job)


@pytest.mark.parametrize("name", ["command-python", "command-shell"])
def test_the_contract_examples_run_as_jobs(gw, tmp_path, name):
    job = gw.submit(EXAMPLES / name / "job.yaml")
    assert job.wait(120).state == "SUCCEEDED", (job.reason, job.logs("stderr"))
    assert len(job.metrics()) >= 30
    files = job.result().download(tmp_path)
    assert files and all(path.stat().st_size for path in files)


def test_keywords_over_a_document(gw):
    job = gw.submit(EXAMPLES / "command-shell" / "job.yaml", name="renamed", labels={"team": "sea"}, set=["resources.time=2m"])
    job.refresh()
    assert job.name == "renamed" and job.message.labels["team"] == "sea" and job.message.spec.resources.time.seconds == 120
    assert job.wait(120).state == "SUCCEEDED"


def test_the_gateway_explains_a_misspelt_key(gw):
    with pytest.raises(SpecError, match="epochs"):
        gw.submit({"train": {"model": "mlp", "epocs": 3}})
    with pytest.raises(SpecError, match="resnet18"):
        gw.submit(model="resnet81", loss="mse", data={"synthetic": {"samples": 8, "input_shape": [3], "target_shape": [1]}})


def test_failure_cancel_and_retry(gw):
    job = gw.command(["sh", "-c", "echo the reason >&2; exit 7"])
    with pytest.raises(JobFailedError, match="FAILED"):
        job.result(timeout=60)
    assert "the reason" in job.logs("stderr")
    again = job.retry()
    assert again.id != job.id and again.wait(60).state == "FAILED"
    running = gw.command(["sh", "-c", "while :; do read -r _ </dev/zero || :; done"])
    wait_until(lambda: running.refresh().state == "RUNNING", 60, "the job to run")
    running.cancel("enough")
    assert running.wait(60).state == "CANCELLED"
    with pytest.raises(StateError):
        running.cancel()


def test_connects_by_configuration_alone(gateway, monkeypatch, tmp_path):
    monkeypatch.setenv("ITWIN_CONFIG", str(gateway.write_config(tmp_path / "config.yaml")))
    with itwin.connect() as connected:
        assert [site.name for site in connected.sites()] == ["local"] and connected.version().version == itwin.__version__


def test_sites_are_looked_at_paused_and_resumed(gw):
    site = gw.site("local")
    assert site.state == "READY" and site.slots >= 1 and "itwin-agent connect" in site.address
    with pytest.raises(NotFoundError, match="did you mean 'local'"):
        gw.site("lokal")
    paused = gw.pause_site("local", "maintenance")
    assert paused.state == "PAUSED" and "maintenance" in paused.reason
    assert gw.resume_site("local").state == "READY"
