"""The science examples of deploy/examples, at a size that runs in seconds: each has to come near the aim that its job
names. The real worker on two ranks, without gateway and agent."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import yaml

EXAMPLES = pathlib.Path(os.environ["ITWIN_SOURCE"]) / "deploy" / "examples"
WORKER = pathlib.Path(os.environ["ITWIN_BIN"]) / "itwin-worker"
WINDS = pathlib.Path("/usr/share/ferret-vis/data/monthly_navy_winds.cdf")


def prepare(folder, example, script, *arguments):
    """Runs a script of the example, which leaves its files in `folder`."""
    subprocess.run([sys.executable, str(EXAMPLES / example / script), *map(str, arguments)], cwd=folder, check=True)


def run(folder, example, ranks=2, job="job.yaml", **train):
    """Metrics of the example's job with some keys of `train` replaced."""
    document = yaml.safe_load((EXAMPLES / example / job).read_text())
    document.pop("resources")  # durations are the gateway's spelling; the launcher below says how many
    document["train"].update(train)
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
    metrics = run(tmp_path, "gravitational-waves", epochs=6)
    assert metrics["test/rmse"] < 0.45 * metrics["test/signal_rmse"]  # the job's aim, 0.4, takes its 20 epochs


@pytest.mark.skipif(not WINDS.exists(), reason="Debian's ferret-datasets is not installed")
def test_winds_are_forecast(tmp_path):
    (tmp_path / WINDS.name).symlink_to(WINDS)
    metrics = run(tmp_path, "wind-forecast", epochs=25)
    assert metrics["test/rmse"] < 0.75


@pytest.mark.skipif(not WINDS.exists(), reason="Debian's ferret-datasets is not installed")
@pytest.mark.parametrize("variant", [{"strategy": "zero2"}])
def test_winds_are_downscaled(tmp_path, variant):
    (tmp_path / WINDS.name).symlink_to(WINDS)
    metrics = run(tmp_path, "wind-downscaling", epochs=4, **variant)
    assert metrics["test/ratio_to_bilinear"] < 0.9
