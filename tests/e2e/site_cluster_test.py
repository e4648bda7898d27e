"""Sites as an administrator meets them: a real SLURM cluster behind a real sshd, `itwin site …`, and jobs that run there.

Needs root and the packages of `deploy/install-packages.sh cluster`. One cluster and one gateway for all cases, in the order of this file.
"""
import hashlib
import json
import os
import pathlib
import shutil
import subprocess

import pytest

import harness
import testcluster
from harness import BIN, wait_for
from itwin.v1 import jobs_pb2

OK, UNSUCCESSFUL, USAGE, NOT_FOUND, NOT_ALLOWED, UNREACHABLE, OTHER = range(7)

pytestmark = pytest.mark.skipif(bool(testcluster.missing()), reason=testcluster.missing())


class Cluster(testcluster.Cluster):
    def ssh(self, login="login"):
        return self.status["nodes"][login]["ssh"]

    def run(self, command, login="login"):
        return self.tool("exec", login, "--", "bash", "-c", command).stdout

    def site_file(self, path, name, login="login", site="alpha", key="ada", pinned=False, more=""):
        ssh = self.ssh(login)
        lines = [f"name: {name}", "ssh:", f"  hosts: [{ssh['wan_host']}]", f"  port: {ssh['wan_port']}", "  user: ada",
                 f"  key: {self.status['keys'][key]}"]
        if pinned:
            lines.append(f"  fingerprint: {ssh['fingerprint']}")
        lines += [f"root: {self.status['sites'][site]['shared']}/$USER/{name}", "scheduler: slurm",
                  "launcher: srun --mpi=pmix -n {ranks}", "query_interval: 1s", more]
        path.write_text("\n".join(lines) + "\n")
        return path


class Gateway(harness.World):
    """Without the embedded site: everything has to come from the cluster."""

    def itwin(self, *words, code=OK, seconds=180):
        environment = {**os.environ, "ITWIN_CONFIG": str(self.data / "client" / "config.yaml")}
        result = subprocess.run([BIN / "itwin", *words], env=environment, capture_output=True, text=True, timeout=seconds,
                                check=False)
        assert result.returncode == code, \
            f"itwin {' '.join(map(str, words))} ended with {result.returncode}, not {code}:\n{result.stdout}{result.stderr}\n{self.gateway_log()[-3000:]}"
        return result.stdout + result.stderr

    def site(self, name):
        sites = json.loads(self.itwin("--output", "json", "sites"))
        return next((site for site in sites if site["name"] == name), None)

    def wait_site(self, name, state="READY", seconds=60):
        return wait_for(f"site {name} to be {state}", lambda: (self.site(name) or {}).get("state") == state and self.site(name), seconds)

    def run_at(self, site, script, seconds=90, **resources):
        spec = self.shell(script, **resources)
        spec.site = site
        job = self.wait_final(self.submit(spec), seconds)
        assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, f"{job.reason}\n{self.events(job.id)}\n{self.gateway_log()[-3000:]}"
        return job


@pytest.fixture(scope="module")
def cluster():
    one = Cluster("--nodes", "2", "--second-cluster")
    try:
        yield one.up()
    finally:
        one.close()


@pytest.fixture(scope="module")
def gateway(cluster):
    one = Gateway(arguments=["--no-local"])
    try:
        one.start()
        yield one
        print("gateway log:\n", one.gateway_log()[-6000:])
        for log in pathlib.Path(cluster.status["sites"]["alpha"]["shared"]).glob("ada/*/agent.log"):
            print(f"{log}:\n", log.read_text(errors="replace")[-3000:])
    finally:
        one.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("sites")


def test_the_login_node_forwards_nothing(cluster):
    """What all the rest of this file has to live with."""
    node = cluster.status["nodes"]["n1"]["address"]
    forward = subprocess.run(["ssh", "-F", cluster.status["ssh_config"], "-W", f"{node}:6818", "login"], capture_output=True, text=True,
                             check=False, stdin=subprocess.DEVNULL)
    assert forward.returncode != 0 and "forwarding failed" in forward.stderr


def test_an_unknown_host_key_is_shown_and_nothing_is_kept(cluster, gateway, files):
    path = cluster.site_file(files / "alpha.yaml", "alpha")
    fingerprint = cluster.ssh()["fingerprint"]
    said = gateway.itwin("site", "add", path, "--without-jobs", code=OTHER)
    assert fingerprint in said and f"itwin site add {path} --without-jobs --accept-host-key {fingerprint}" in said
    assert gateway.site("alpha") is None and not (gateway.data / "sites" / "alpha.yaml").exists()
    # Another key than the one that was accepted is not that one.
    said = gateway.itwin("site", "add", path, "--accept-host-key", "SHA256:" + "A" * 43, code=OTHER)
    assert fingerprint in said and gateway.site("alpha") is None


def test_a_key_that_others_can_read_is_refused(cluster, gateway, files):
    key = files / "open-key"
    shutil.copy(cluster.status["keys"]["ada"], key)
    key.chmod(0o644)
    path = cluster.site_file(files / "open.yaml", "open", pinned=True)
    path.write_text(path.read_text().replace(cluster.status["keys"]["ada"], str(key)))
    assert f"chmod 600 {key}" in gateway.itwin("site", "add", path, code=NOT_ALLOWED)


def test_the_site_is_added_and_examined(cluster, gateway, files):
    said = gateway.itwin("site", "add", files / "alpha.yaml", "--accept-host-key", cluster.ssh()["fingerprint"])
    steps = {line[9:].split()[0]: line[:8].strip() for line in said.splitlines() if line[:8].strip() in ("ok", "warning", "ERROR", "skipped")}
    assert "ERROR" not in steps.values() and steps["install"] == steps["agent"] == "ok", said
    assert {"scheduler", "partitions", "mpi", "worker", "scratch"} <= set(steps), said
    site = gateway.wait_site("alpha")
    assert site["scheduler"] == "slurm" and "main" in site["partitions"] and site["host"] == "login"
    assert site["calls_per_minute"] > 0
    # The accepted key is part of what is kept; the release lies there whole, with its link.
    assert cluster.ssh()["fingerprint"] in (gateway.data / "sites" / "alpha.yaml").read_text()
    releases = pathlib.Path(cluster.status["sites"]["alpha"]["shared"]) / "ada" / "alpha" / "releases"
    agent = (releases / "current" / "itwin-agent").read_bytes()
    assert hashlib.sha256(agent).digest() == hashlib.sha256((BIN / "itwin-agent").read_bytes()).digest()
    assert not [entry for entry in os.listdir(releases) if entry.startswith(".")]
    # Again: nothing is sent.
    assert "is there already" in gateway.itwin("site", "add", files / "alpha.yaml", "--replace", "--without-jobs",
                                               "--accept-host-key", cluster.ssh()["fingerprint"])
    gateway.wait_site("alpha")


def test_doctor_says_what_is_wrong(cluster, gateway):
    said = gateway.itwin("site", "doctor", "alpha", "--without-jobs")
    assert "ok       scheduler" in said
    cluster.tool("stop", "slurmctld")
    try:
        said = gateway.itwin("site", "doctor", "alpha", "--without-jobs", code=UNSUCCESSFUL)
        assert "ERROR    scheduler" in said
    finally:
        cluster.tool("start", "slurmctld")
        cluster.tool("ready")
    assert "did you mean 'alpha'" in gateway.itwin("site", "doctor", "alhpa", code=NOT_FOUND)


def test_a_training_runs_on_two_nodes_and_its_model_comes_back_whole(gateway, tmp_path):
    job_file = tmp_path / "job.yaml"
    job_file.write_text("""
name: two-nodes
site: alpha
resources: {nodes: 2, ranks_per_node: 1, time: 5m}
train:
  model: {builtin: mlp, options: {hidden: [16]}}
  data: {synthetic: {samples: 64, input_shape: [4], classes: 3}}
  loss: cross_entropy
  optimizer: {sgd: {lr: 0.1}}
  batch: 16
  epochs: 3
""")
    said = gateway.itwin("submit", job_file, "--watch", "--id-file", tmp_path / "id")
    job = (tmp_path / "id").read_text().strip()
    assert "RUNNING" in said and "train/loss" in said, said
    status = json.loads(gateway.itwin("--output", "json", "status", job))
    assert status["state"] == "SUCCEEDED" and status["ranks"] == 2 and status["attempt"] == 1
    points = json.loads(gateway.itwin("metrics", job, "--json", "--series", "train/loss"))
    assert len(points) >= 3 and len({(p["series"], p["step"]) for p in points}) == len(points)
    fetched = json.loads(gateway.itwin("--output", "json", "get", job, tmp_path / "out"))["files"]
    assert any(entry["output"].startswith(("model", "weights")) for entry in fetched)
    spool = pathlib.Path(gateway_root(gateway, "alpha")) / job / "1" / "outputs"
    for entry in fetched:
        here, there = pathlib.Path(entry["path"]).read_bytes(), (spool / entry["output"]).read_bytes()
        assert hashlib.sha256(here).hexdigest() == hashlib.sha256(there).hexdigest() == entry["sha256"]


def gateway_root(gateway, site):
    """Where the site's spool lies, from its kept file."""
    document = (gateway.data / "sites" / f"{site}.yaml").read_text()
    root = next(line.split(":", 1)[1].strip() for line in document.splitlines() if line.startswith("root:"))
    return root.replace("$USER", "ada")


def test_what_the_site_cannot_run_is_refused_with_the_limit(gateway):
    spec = gateway.shell("true", nodes=3)
    spec.site = "alpha"
    with pytest.raises(Exception, match="gives a job at most 2 nodes, and resources.nodes is 3"):
        gateway.submit(spec)
    spec = gateway.shell("true")
    spec.site = "alpha"
    spec.resources.partition = "mian"
    with pytest.raises(Exception, match="did you mean 'main'"):
        gateway.submit(spec)


def test_the_wrong_key_pauses_nothing_else(cluster, gateway, files):
    path = cluster.site_file(files / "stranger.yaml", "stranger", key="stranger", pinned=True)
    said = gateway.itwin("site", "add", path, "--without-jobs", code=NOT_ALLOWED)
    assert "ERROR    login" in said and gateway.site("stranger") is None
    gateway.run_at("alpha", "true")


def test_a_forced_command_is_noticed_and_used(cluster, gateway, files):
    root = f"{cluster.status['sites']['alpha']['shared']}/ada/forced"
    path = cluster.site_file(files / "forced.yaml", "forced", key="forced", pinned=True)
    # Something else than an agent: the line that is needed is shown.
    cluster.tool("forced-command", "echo no shell for you")
    said = gateway.itwin("site", "add", path, "--without-jobs", code=OTHER)
    assert "no shell for you" in said and 'restrict,command="' in said
    # As the site's administrator does it, with a release of its own.
    cluster.run(f"mkdir -p {root}/releases/first && cp {gateway_root(gateway, 'alpha')}/releases/current/itwin-agent "
                f"{root}/releases/first/ && ln -sfn first {root}/releases/current")
    cluster.tool("forced-command", f"{root}/releases/current/itwin-agent connect --root {root} --scheduler slurm")
    said = gateway.itwin("site", "add", path, "--without-jobs")
    assert "skipped  install" in said and "ok       agent" in said
    gateway.wait_site("forced")
    gateway.run_at("forced", "hostname > $ITWIN_OUTPUTS/where")
    gateway.itwin("site", "remove", "forced")


def test_a_second_cluster_is_a_second_site(cluster, gateway, files):
    path = cluster.site_file(files / "beta.yaml", "beta", login="b-login", site="beta", pinned=True)
    gateway.itwin("site", "add", path, "--without-jobs")
    gateway.wait_site("beta")
    assert gateway.run_at("beta", "hostname").site == "beta"
    # `any` goes where there is room; a paused site gets nothing.
    gateway.itwin("site", "pause", "alpha", "--reason", "work on the cooling")
    gateway.wait_site("alpha", "PAUSED")
    assert gateway.run_at("any", "hostname").site == "beta"
    gateway.itwin("site", "resume", "alpha")
    gateway.itwin("site", "pause", "beta")
    gateway.wait_site("beta", "PAUSED")
    gateway.wait_site("alpha")
    assert gateway.run_at("any", "hostname").site == "alpha"
    gateway.itwin("site", "remove", "beta")
    assert gateway.site("beta") is None


def test_a_worker_bundle_is_unpacked_there(cluster, gateway, files):
    # What deploy/make-worker-bundle.sh makes, without its weight (tests/e2e/worker_bundle_test.py has the real one).
    inside = files / "bundle"
    inside.mkdir()
    (inside / "itwin-worker").write_text(f"#!/bin/sh\nexec {BIN}/itwin-worker \"$@\"\n")
    (inside / "itwin-worker").chmod(0o755)
    subprocess.run(["tar", "-czf", files / "bundle.tar.gz", "-C", inside, "."], check=True)
    path = cluster.site_file(files / "bundled.yaml", "bundled", pinned=True, more=f"worker: {{bundle: {files}/bundle.tar.gz}}")
    gateway.itwin("site", "add", path, "--without-jobs")
    gateway.wait_site("bundled")
    releases = pathlib.Path(gateway_root(gateway, "bundled")) / "releases"
    digest = hashlib.sha256((files / "bundle.tar.gz").read_bytes()).hexdigest()
    assert (releases / "current" / "itwin-worker").resolve() == (releases / f"worker-{digest[:8]}" / "itwin-worker").resolve()
    assert sorted(os.listdir(releases / f"worker-{digest[:8]}")) == ["itwin-worker"]
    gateway.itwin("site", "remove", "bundled")


# Prints points until the file GATE is there, so that there is something to lose or to double at every moment.
PROGRAM = """
step=0
emit() { step=$((step+1)); printf '{"step":%d,"metrics":{"loss":0.%04d}}\\n' $step $step >>"$ITWIN_METRICS"; }
readlink /proc/$PPID/exe
exec {never}<> <(:)
until [ -e GATE ]; do emit; read -rt 0.05 -u $never || :; done
emit
"""


def daemon_of(root):
    """The hash of the agent that serves the site now."""
    for pid in harness.processes("itwin-agent", "serve", str(root)):
        return hashlib.sha256(pathlib.Path(f"/proc/{pid}/exe").read_bytes()).hexdigest()
    return None


def test_a_newer_gateway_renews_the_agent_under_a_running_job(cluster, files):
    """The gateway is updated: over SSH it brings its own agent beside the one that is there; the job that runs does not notice."""
    old = files / "old-programs"
    old.mkdir()
    shutil.copy(BIN / "itwin-gateway", old)
    (old / "itwin-worker").symlink_to(BIN / "itwin-worker")
    (old / "itwin-agent").write_bytes((BIN / "itwin-agent").read_bytes() + b"another build")
    (old / "itwin-agent").chmod(0o755)
    hashes = {path: hashlib.sha256((path / "itwin-agent").read_bytes()).hexdigest() for path in (old, BIN)}
    one = Gateway(arguments=["--no-local"])
    try:
        one.programs = old
        one.start()
        one.itwin("site", "add", cluster.site_file(files / "renewed.yaml", "renewed", pinned=True), "--without-jobs")
        one.wait_site("renewed")
        one.site_root = root = pathlib.Path(gateway_root(one, "renewed"))
        releases = root / "releases"
        first = os.readlink(releases / "current")
        assert daemon_of(root) == hashes[old]
        gate = root.parent / "renewed-gate"
        spec = one.shell(PROGRAM.replace("GATE", str(gate)))
        spec.site = "renewed"
        job = one.submit(spec)
        wait_for("points", lambda: len(one.points(job)[1]) >= 10)

        one.stop_gateway()
        one.programs = BIN
        one.start()
        wait_for("the gateway's own agent to serve", lambda: daemon_of(root) == hashes[BIN], 120, interval=0.1)
        one.wait_site("renewed")
        second = os.readlink(releases / "current")
        assert second != first and (releases / first / "itwin-agent").exists(), "the release of what runs is kept"
        assert hashlib.sha256((releases / second / "itwin-agent").read_bytes()).hexdigest() == hashes[BIN]
        assert "its agent goes from" in one.gateway_log() and "not renewed" not in one.gateway_log()
        before = len(one.points(job)[1])
        wait_for("points that the new agent brings", lambda: len(one.points(job)[1]) > before + 10)
        assert one.state(job) == "RUNNING"
        gate.touch()
        end = one.wait_final(job)
        assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED and end.attempt == 1, end.reason
        one.check_exactly_once(job)
        assert f"/releases/{first}/itwin-agent" in one.log(job), "it was started from the old release"
        next_job = one.run_at("renewed", "readlink /proc/$PPID/exe")
        assert f"/releases/{second}/itwin-agent" in one.log(next_job.id)
    except BaseException:
        print("gateway log:\n", one.gateway_log()[-6000:])
        raise
    finally:
        one.close()


def test_the_sites_are_there_after_a_restart(gateway):
    gateway.stop_gateway()
    gateway.start()
    gateway.wait_site("alpha")
    assert gateway.site("beta") is None and gateway.site("forced") is None
    gateway.run_at("alpha", "true")
    gateway.itwin("site", "remove", "alpha")
    assert gateway.site("alpha") is None
