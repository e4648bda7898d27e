"""The `itwin` command against a real gateway and its embedded site: what a user types, what comes back, and a watch
across a gateway that is killed."""
import contextlib
import csv
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "e2e"))
import harness  # noqa: E402
from harness import BIN, wait_for  # noqa: E402


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Gateway:
    """On one port for as long as the test lasts, so that a client finds it again after a restart."""

    def __init__(self, directory):
        self.data = directory / "data"
        self.log = directory / "gateway.log"
        self.port = free_port()
        self.process = None
        subprocess.run([BIN / "itwin-gateway", "init", "--data", self.data], check=True, stdout=subprocess.DEVNULL)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("ITWIN_")}
        self.environment.update(ITWIN_CONFIG=str(self.data / "client" / "config.yaml"),
                                ITWIN_ENDPOINT=f"127.0.0.1:{self.port}", LC_ALL="C.UTF-8")
        self.directory = directory

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [BIN / "itwin-gateway", "serve", "--data", self.data, "--listen", f"127.0.0.1:{self.port}"],
                stdout=log, stderr=log)
        wait_for("the gateway to answer", lambda: self.run("version", "--timeout", "2s", check=None).returncode == 0)
        wait_for("its site", lambda: self.json("sites")[0]["state"] == "READY")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def run(self, *arguments, check=0, text=True):
        done = subprocess.run([BIN / "itwin", *map(str, arguments)], env=self.environment, cwd=self.directory,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=text, timeout=120)
        assert check is None or done.returncode == check, (done.returncode, done.stdout, done.stderr)
        return done

    def json(self, *arguments):
        return json.loads(self.run("--output", "json", *arguments).stdout)

    def spawn(self, *arguments):
        return subprocess.Popen([BIN / "itwin", *map(str, arguments)], env=self.environment, cwd=self.directory,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def close(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        subprocess.run([BIN / "itwin-agent", "stop", "--root", self.data / "sites" / "local", "--kill-jobs"],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        for pid in harness.processes(str(self.directory)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def gateway():
    with tempfile.TemporaryDirectory(prefix="itwin-cli-", ignore_cleanup_errors=True) as directory:
        one = Gateway(pathlib.Path(directory))
        one.start()
        yield one
        one.close()


def write_job(gateway, name, script, **more):
    path = gateway.directory / f"{name}.json"
    path.write_text(json.dumps({"name": name, "command": {"argv": ["/bin/bash", "-c", script], **more}}))
    return path


def test_a_job_from_submit_to_its_outputs(gateway):
    (gateway.directory / "words.txt").write_text("one\ntwo\n")
    job_file = write_job(gateway, "whole", """
        cat words.txt; echo to stderr >&2
        for i in 1 2 3; do echo '{"step":'$i',"metrics":{"train/loss":'$((4 - i))'}}' >> $ITWIN_METRICS; done
        mkdir $ITWIN_OUTPUTS/deep; head -c 3000000 /dev/urandom > $ITWIN_OUTPUTS/deep/model.bin
        echo $GREETING > $ITWIN_OUTPUTS/greeting.txt""", files=["words.txt"])
    assert gateway.run("validate", job_file).stdout.endswith("# valid\n")
    assert gateway.run("validate", job_file, "--remote").stdout.endswith("# valid, says the gateway\n")
    done = gateway.run("submit", job_file, "--watch", "--set", "env.GREETING=hello", "--set", "resources.time=5m",
                       "--id-file", "id")
    job = (gateway.directory / "id").read_text().strip()
    assert f"job {job} submitted\n" in done.stdout and "SUCCEEDED" in done.stdout, done.stdout

    status = gateway.json("status", job[:8])
    assert (status["id"], status["state"], status["site"]) == (job, "SUCCEEDED", "local")
    assert status["spec"]["env"] == {"GREETING": "hello"} and status["spec"]["inputs"][0]["path"] == "words.txt"
    assert gateway.run("logs", job).stdout == "one\ntwo\n"
    assert gateway.run("logs", job, "-f").stdout == "one\ntwo\n"
    assert gateway.run("logs", job, "--stderr").stdout == "to stderr\n"
    rows = list(csv.DictReader(io.StringIO(gateway.run("metrics", job, "--csv", "--series", "train/*").stdout)))
    assert [(r["series"], r["step"], float(r["value"])) for r in rows] == [("train/loss", str(i), 4.0 - i) for i in (1, 2, 3)]
    assert [p["value"] for p in gateway.json("metrics", job, "--series", "train/loss")] == [3, 2, 1]
    assert "train/loss" in gateway.run("metrics", job).stdout
    kinds = [event["kind"] for event in gateway.json("events", job)]
    assert kinds[0] == "submitted" and kinds[-1] == "succeeded"
    assert job in [j["id"] for j in gateway.json("jobs", "--state", "succeeded", "--name", "whole")["jobs"]]
    assert gateway.run("jobs", "--live", "-q").stdout == ""

    got = gateway.json("get", job, "results")
    assert sorted(f["output"] for f in got["files"]) == ["deep/model.bin", "greeting.txt"]
    assert (gateway.directory / "results/greeting.txt").read_text() == "hello\n"
    # A fetch that was cut off goes on.
    whole = gateway.directory / "results/deep/model.bin"
    content = whole.read_bytes()
    whole.rename(whole.with_name("model.bin.part"))
    os.truncate(whole.with_name("model.bin.part"), 1_000_000)
    gateway.run("get", job, "results", "deep/model.bin")
    assert whole.read_bytes() == content


def test_the_same_request_is_the_same_job(gateway):
    job_file = write_job(gateway, "once", "true")
    first = gateway.json("submit", job_file, "--request-id", "cli-request")
    second = gateway.json("submit", job_file, "--request-id", "cli-request")
    assert (first["id"], first["existed"]) == (second["id"], False) and second["existed"]
    other = gateway.run("submit", job_file, "--request-id", "cli-request", "--name", "other", check=6)
    assert "cli-request" in other.stderr or "request" in other.stderr


def test_failure_retry_and_errors_have_their_codes(gateway):
    failing = write_job(gateway, "failing", "[[ -e $ITWIN_CHECKPOINTS/x ]] ; echo broken >&2; exit 7")
    done = gateway.run("submit", failing, "--watch", "--id-file", "failed", check=1)
    job = (gateway.directory / "failed").read_text().strip()
    assert "FAILED" in done.stdout and f"itwin logs {job} --stderr" in done.stdout
    assert gateway.run("watch", job, check=1).stdout.count("FAILED") >= 1
    again = gateway.run("retry", job, "--watch", check=1)
    assert f"(repeats {job})" in again.stdout
    assert job in gateway.run("cancel", job, check=6).stderr
    assert "0000" in gateway.run("status", "0000000000000000", check=3).stderr
    assert gateway.run("get", job, "nothing", "x", check=3).stderr.startswith("itwin: the job has no output 'x'")
    bad = gateway.directory / "bad.yaml"
    bad.write_text("train:\n  optimzer: adam\n")
    assert "line 2: train.optimzer: unknown key; did you mean 'optimizer'?" in gateway.run("submit", bad, check=2).stderr
    wrong = dict(gateway.environment, ITWIN_TOKEN="not-a-token-of-this-gateway")
    assert subprocess.run([BIN / "itwin", "jobs"], env=wrong, capture_output=True, timeout=60).returncode == 4


def test_cancel_ends_a_running_job(gateway):
    job = gateway.json("submit", write_job(gateway, "endless", "tail -f /dev/null"))["id"]
    wait_for("it to run", lambda: gateway.json("status", job)["state"] == "RUNNING")
    watch = gateway.spawn("watch", job)
    gateway.run("cancel", job, "--reason", "enough")
    out, _ = watch.communicate(timeout=60)
    assert watch.returncode == 1 and "CANCELLED" in out


def test_a_watch_survives_a_killed_gateway_without_losing_or_doubling_a_point(gateway):
    """The program emits a point each time the test lets it; the gateway is killed and started between points."""
    script = """
        mkfifo gate; exec 3<> gate; echo $PWD > $HOME_OF_TEST/where
        step=0
        while read -r count <&3; do
          for ((i = 0; i < count; ++i)); do
            step=$((step + 1)); echo '{"step":'$step',"metrics":{"m":'$step'}}' >> $ITWIN_METRICS
          done
          [[ $count == 0 ]] && break
        done"""
    job = gateway.json("submit", write_job(gateway, "gated", script), "--set",
                       f"env.HOME_OF_TEST={gateway.directory}")["id"]
    where = gateway.directory / "where"
    wait_for("the program", lambda: where.exists() and where.read_text().strip())
    gate = pathlib.Path(where.read_text().strip()) / "gate"
    watch = gateway.spawn("watch", job, "--output", "json")
    follower = gateway.spawn("watch", job)

    def let(count):
        with open(gate, "w") as out:
            out.write(f"{count}\n")

    for _ in range(4):
        let(50)
        gateway.kill()
        let(50)  # the program runs on while nobody watches
        gateway.start()
    let(0)
    out, err = watch.communicate(timeout=120)
    assert watch.returncode == 0, err
    points = [p["step"] for line in out.splitlines() for p in json.loads(line).get("points", []) if p["series"] == "m"]
    assert points == list(range(1, 401))
    text, err = follower.communicate(timeout=120)
    assert follower.returncode == 0 and "SUCCEEDED" in text, err
    assert "connection lost" in err and "connected again" in err
