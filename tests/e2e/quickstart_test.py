"""deploy/quickstart.sh --slurm as somebody at a terminal meets it: ended by Ctrl-C it leaves nothing, with --keep it says how to stop
what it leaves. The programs are those that are built; needs root and the packages of `deploy/install-packages.sh cluster`."""
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import subprocess
import tempfile

import pytest

import testcluster
from harness import BIN, SOURCE, jobs_pb2, processes
from traces import Traces, wait_for

pytestmark = pytest.mark.skipif(bool(testcluster.missing()), reason=testcluster.missing())


class Quickstart:
    """In a session of its own, as a terminal gives it; Ctrl-C goes to all of it."""

    def __init__(self, *options):
        self.traces = Traces()
        self.base = pathlib.Path(tempfile.mkdtemp(prefix="itwin-qs-", dir="/var/tmp"))
        self.base.chmod(0o755)
        self.data, self.cluster = self.base / "data", self.base / "c"
        self.environment = {**os.environ, "ITWIN_TESTCLUSTER": str(self.cluster), "PATH": f"{BIN}:{os.environ['PATH']}"}
        with open(self.base / "output", "wb") as output:
            self.process = subprocess.Popen([SOURCE / "deploy" / "quickstart.sh", "--slurm", "--bin", BIN, "--data", self.data, *options],
                                            env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                                            start_new_session=True)

    def output(self):
        return (self.base / "output").read_text(errors="replace")

    def wait_for(self, what, predicate, seconds):
        def look():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.output()}"
            return predicate()

        return wait_for(f"{what}:\n{self.output()[-3000:]}", look, seconds)

    def phase(self):
        """Of the cluster: starting or up."""
        try:
            return json.loads((self.cluster / "state.json").read_text())["phase"]
        except (OSError, ValueError):
            return None

    def job_states(self):
        if not (self.data / "gateway.db").exists():
            return []
        with sqlite3.connect(f"file:{self.data}/gateway.db?mode=ro", uri=True) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'jobs'").fetchone():
                return []  # the gateway is about to make it
            return [jobs_pb2.JobState.Name(row[0]).removeprefix("JOB_STATE_") for row in database.execute("SELECT state FROM jobs ORDER BY num")]

    def assert_nothing_runs(self):
        self.traces.assert_nothing_left(self.cluster)
        assert not processes(str(self.data)), self.output()

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        subprocess.run([BIN / "itwin-gateway", "stop", "--data", self.data], capture_output=True, check=False, timeout=60)
        subprocess.run([testcluster.TOOL, "down", "--dir", self.cluster], capture_output=True, check=False, timeout=120)
        for pid in processes(str(self.data)):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.base, ignore_errors=True)


@pytest.fixture
def quickstart():
    started = []

    def start(*options):
        started.append(Quickstart(*options))
        return started[-1]

    yield start
    for one in started:
        one.close()


def interrupted(one):
    os.killpg(one.process.pid, signal.SIGINT)
    assert one.process.wait(120) == 130, one.output()
    one.assert_nothing_runs()


def test_ctrl_c_while_the_cluster_starts(quickstart):
    one = quickstart()
    one.wait_for("the cluster to begin", lambda: one.phase() == "starting", 60)
    interrupted(one)


@pytest.mark.parametrize("options", [(), ("--keep",)], ids=["plain", "keep"])
def test_ctrl_c_while_it_trains(quickstart, options):
    """Also with --keep: that is for what came to its end. The job is cancelled before its site goes."""
    one = quickstart(*options)
    one.wait_for("the training to run", lambda: one.job_states() == ["RUNNING"], 180)
    interrupted(one)
    assert one.job_states() == ["CANCELLED"], one.output()


def test_what_is_kept_is_stopped_as_it_says(quickstart):
    one = quickstart("--keep")
    assert one.process.wait(600) == 0, one.output()  # LibTorch 2.6 takes five minutes for it on two cores
    result = json.loads((one.data / "quickstart.json").read_text())
    assert result["state"] == "SUCCEEDED" and result["ranks"] == 2 and result["ratio_to_bilinear"] < 1
    # Both are left, and work.
    environment = {**one.environment, "ITWIN_CONFIG": str(one.data / "client" / "config.yaml")}
    sites = json.loads(subprocess.run([BIN / "itwin", "--output", "json", "sites"], env=environment, capture_output=True, text=True,
                                      check=True, timeout=60).stdout)
    assert [(site["name"], site["state"]) for site in sites] == [("testcluster", "READY")]
    assert one.phase() == "up"
    lines = one.output().splitlines()
    stop = lines[lines.index("Gateway and cluster are left running. To stop them:") + 1]
    # Word for word, where the script was called.
    ended = subprocess.run(["bash", "-ec", stop], cwd=SOURCE, env=one.environment, capture_output=True, text=True, check=False, timeout=180)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    one.assert_nothing_runs()
