"""deploy/testcluster does what it says: a real SLURM cluster, faults on command, and nothing left behind.

Needs root and the packages of `deploy/install-packages.sh cluster`. Nothing here sleeps: `wait_for` looks again until
a deadline. Runs alone: /usr/bin/python3 -m pytest --noconftest tests/e2e/testcluster_test.py
"""
import contextlib
import json
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

import testcluster
from testcluster import TOOL
from traces import Traces, wait_for

PROGRAM = """
#include <mpi.h>
#include <stdio.h>
#include <unistd.h>
int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank, size, sum;
  char host[64];
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  gethostname(host, sizeof host);
  MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
  printf("%d of %d on %s sum %d\\n", rank, size, host, sum);
  return MPI_Finalize();
}
"""

pytestmark = pytest.mark.skipif(bool(testcluster.missing()), reason=testcluster.missing())


class Cluster(testcluster.Cluster):
    def ssh_argv(self, alias, command):
        return ["ssh", "-F", self.status["ssh_config"], "-o", "ConnectTimeout=15", alias, command]

    def ssh(self, alias, command, check=True, seconds=60):
        result = subprocess.run(self.ssh_argv(alias, command), capture_output=True, text=True, timeout=seconds,
                                check=False, stdin=subprocess.DEVNULL)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result if not check else result.stdout

    def ssh_with_key(self, key, command):
        """As ada, with this key and no other."""
        host, port = self.wan_address()
        return subprocess.run(["ssh", "-F", "/dev/null", "-p", str(port), "-i", key, "-o", "IdentitiesOnly=yes", "-o",
                               "BatchMode=yes", "-o", f"UserKnownHostsFile={self.status['known_hosts']}", "-o",
                               "StrictHostKeyChecking=yes", f"ada@{host}", command], capture_output=True, text=True,
                              check=False, stdin=subprocess.DEVNULL)

    def wan_address(self, node="login"):
        ssh = self.status["nodes"][node]["ssh"]
        return ssh["wan_host"], ssh["wan_port"]

    def states(self, site="alpha"):
        return {row[1]: row[2] for row in self.queue(site)}


@pytest.fixture(scope="module")
def cluster():
    traces = Traces()
    one = Cluster("--accounting", "--login2", "--jump", "--second-cluster", "--gpus", "2", "--preemption", "requeue",
                  "--home-size", "100M", "--nodes", "2")
    try:
        yield one.up()
    finally:
        one.close()
    traces.assert_nothing_left(one.directory)


@pytest.fixture
def healthy_wan(cluster):
    yield cluster
    cluster.wan("restore")


class Echo:
    """A session that answers every line with the same line, to see whether a link carries bytes."""

    def __init__(self, cluster, alias="login"):
        self.process = subprocess.Popen(cluster.ssh_argv(alias, "exec cat"), stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        self.say(b"hello\n")
        assert self.heard(15) == b"hello\n"

    def say(self, line):
        self.process.stdin.write(line)

    def heard(self, seconds):
        """The next bytes, or None if there are none in time."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return os.read(self.process.stdout.fileno(), 4096) if ready else None

    def close(self):
        self.process.kill()
        self.process.wait()


# -- a real cluster ----------------------------------------------------------------------------------------------
def test_users_submit_over_ssh_through_the_wan(cluster):
    before = cluster.wan("status")["login"]["bytes_up"]
    assert cluster.ssh("login", "hostname; id -un; srun -N2 hostname | sort").split() == ["login", "ada", "n1", "n2"]
    cluster.ssh("login-bob", "sbatch -J bobs --wrap 'id -un > who; hostname >> who' --chdir ~")
    who = cluster.home("bob") / "who"
    wait_for("bob's job", lambda: who.exists() and len(who.read_text().split()) == 2)
    assert who.read_text().split()[0] == "bob" and who.read_text().split()[1] in ("n1", "n2")
    assert cluster.wan("status")["login"]["bytes_up"] > before + 2000


def test_open_mpi_runs_between_nodes(cluster):
    source = cluster.home() / "hello.c"
    source.write_text(PROGRAM)
    subprocess.run(["mpicc", "-o", cluster.home() / "hello", source], check=True)
    expected_hosts = {"n1", "n2"}

    def check(text):
        lines = sorted(text.strip().splitlines())
        assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"], text
        assert {line.split()[4] for line in lines} == expected_hosts and all(line.endswith("sum 6") for line in lines)

    check(cluster.ssh("login", "srun --mpi=pmix -N2 -n4 --ntasks-per-node=2 ./hello"))
    cluster.ssh("login", "printf '#!/bin/sh\\nmpirun ./hello && echo end\\n' > j.sh; "
                         "sbatch -J mpirun -N2 -n4 --ntasks-per-node=2 -o mpirun.txt j.sh")
    output = cluster.home() / "mpirun.txt"
    wait_for("the mpirun job", lambda: output.exists() and "end" in output.read_text())
    check(output.read_text().replace("end\n", ""))


def test_accounting_knows_ended_jobs(cluster):
    cluster.ssh("login", "sbatch -J accounted --comment=note -o /dev/null --wrap 'exit 3'")
    row = wait_for("the job in sacct", lambda: [line for line in cluster.ssh(
        "login", "sacct -n -P -X --starttime now-1hour -o JobName,State,ExitCode,Comment,Account").splitlines()
        if line.startswith("accounted|FAILED")], 60)
    assert row == ["accounted|FAILED|3:0|note|science"]


def test_second_login_node_shares_homes_and_queue_but_nothing_else(cluster):
    cluster.ssh("login", "echo shared > from-login; echo private > /tmp/private; (setsid cat /dev/zero > /dev/null 2>&1 &) ; true")
    assert cluster.ssh("login2", "hostname; cat from-login; sinfo -h -p main -o %D").split() == ["login2", "shared", "2"]
    assert "No such file" in cluster.ssh("login2", "cat /tmp/private", check=False).stderr
    assert cluster.ssh("login", "pgrep -u ada -c cat").strip() == "1"
    assert cluster.ssh("login2", "pgrep -u ada -c cat", check=False).stdout.strip() == "0"


def test_second_cluster_is_another_site(cluster):
    cluster.ssh("login", "sbatch -J only-alpha -o /dev/null --wrap true")
    assert cluster.ssh("b-login", "hostname; srun -N2 hostname | sort").split() == ["b-login", "b-n1", "b-n2"]
    assert "only-alpha" in cluster.states("alpha") and "only-alpha" not in cluster.states("beta")
    assert cluster.home(site="beta") != cluster.home(site="alpha")


def test_gpus_are_handed_out(cluster):
    shown = cluster.ssh("login", "srun -N1 --gpus-per-node=2 printenv CUDA_VISIBLE_DEVICES; "
                                 "srun -N1 --gres=gpu:1 printenv CUDA_VISIBLE_DEVICES")
    assert shown.split()[0] == "0,1" and shown.split()[1] in ("0", "1")
    assert cluster.ssh("login", "srun -N1 --gpus-per-node=3 true", check=False).returncode != 0


def test_preemption_requeues_the_lower_partition(cluster):
    cluster.ssh("login", "sbatch -J low -p low -N2 --exclusive -o /dev/null --wrap 'exec tail -f /dev/null'")
    wait_for("the low job to run", lambda: cluster.states().get("low") == "RUNNING")
    cluster.ssh("login", "srun -p high -N2 --exclusive hostname")
    assert cluster.states()["low"] == "PENDING"
    cluster.ssh("login", "scancel --me -n low")


# -- ssh ---------------------------------------------------------------------------------------------------------
def test_ssh_is_as_strict_as_a_site(cluster):
    ssh = cluster.status["nodes"]["login"]["ssh"]
    fingerprint = subprocess.check_output(["ssh-keyscan", "-t", "ed25519", "-p", str(ssh["wan_port"]), ssh["wan_host"]],
                                          stderr=subprocess.DEVNULL)
    shown = subprocess.run(["ssh-keygen", "-lf", "-"], input=fingerprint, stdout=subprocess.PIPE, check=True).stdout
    assert ssh["fingerprint"] in shown.decode()
    stranger = cluster.ssh_with_key(cluster.status["keys"]["stranger"], "true")
    assert stranger.returncode == 255 and "Permission denied" in stranger.stderr
    forward = subprocess.run(["ssh", "-F", cluster.status["ssh_config"], "-W", f"{cluster.status['nodes']['n1']['address']}:6818",
                              "login"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert forward.returncode != 0 and "forwarding failed" in forward.stderr
    through = subprocess.run(["ssh", "-F", cluster.status["ssh_config"], "-J", "jump", "login-direct", "hostname"],
                             capture_output=True, text=True, check=False)
    assert through.stdout == "login\n", through.stderr


def test_forced_command_runs_one_program_only(cluster):
    cluster.tool("forced-command", 'echo "asked: $SSH_ORIGINAL_COMMAND"')
    assert cluster.ssh("login-forced", "cat /etc/passwd") == "asked: cat /etc/passwd\n"
    assert cluster.ssh("login", "echo free") == "free\n"


def test_certificates_of_the_sites_authority_are_accepted(cluster, tmp_path):
    keys = cluster.status["keys"]
    for name in ("stranger", "stranger.pub"):
        shutil.copy(pathlib.Path(keys["stranger"]).parent / name, tmp_path / name)

    def attempt(validity):
        subprocess.run(["ssh-keygen", "-q", "-s", keys["user_ca"], "-I", "test", "-n", "ada", "-V", validity,
                        tmp_path / "stranger.pub"], check=True)
        return cluster.ssh_with_key(tmp_path / "stranger", "id -un")

    assert attempt("-1m:+5m").stdout == "ada\n"
    assert attempt("-2h:-1h").returncode == 255


# -- the link ----------------------------------------------------------------------------------------------------
def banner_and_answer(address):
    """Seconds until sshd's banner, and from our banner to its next packet."""
    with socket.create_connection(address, timeout=15) as channel:
        started = time.monotonic()
        assert channel.recv(4096).startswith(b"SSH-")
        banner = time.monotonic()
        channel.sendall(b"SSH-2.0-probe\r\n")
        assert channel.recv(4096)
        return banner - started, time.monotonic() - banner


def test_wan_delays_each_direction(healthy_wan):
    address = healthy_wan.wan_address()
    assert sum(banner_and_answer(address)) < 0.3
    healthy_wan.wan("delay", "200ms")
    banner, answer = banner_and_answer(address)
    assert 0.2 <= banner < 0.5 and 0.4 <= answer < 0.7
    healthy_wan.wan("--direction", "up", "delay", "0ms")
    banner, answer = banner_and_answer(address)
    assert 0.2 <= banner < 0.5 and 0.2 <= answer < 0.4
    healthy_wan.wan("restore")
    assert sum(banner_and_answer(address)) < 0.3


def test_wan_delay_does_not_lower_the_throughput(healthy_wan):
    healthy_wan.wan("delay", "100ms")
    started = time.monotonic()
    assert healthy_wan.ssh("login", "head -c 20000000 /dev/zero | tr '\\0' x").count("x") == 20000000
    assert time.monotonic() - started < 15  # one chunk per round trip would take longer


def test_wan_throttles(healthy_wan):
    healthy_wan.wan("--direction", "down", "throttle", "500K")
    started = time.monotonic()
    assert len(healthy_wan.ssh("login", "head -c 1500000 /dev/zero | tr '\\0' x")) == 1500000
    assert 2.5 < time.monotonic() - started < 8


def test_wan_cut_ends_connections_and_refuses_new_ones(healthy_wan):
    echo = Echo(healthy_wan)
    healthy_wan.wan("--link", "login", "cut")
    assert echo.process.wait(5) == 255
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(healthy_wan.wan_address(), timeout=5)
    assert healthy_wan.ssh("login2", "hostname") == "login2\n"  # the other link is up
    healthy_wan.wan("restore")
    assert healthy_wan.ssh("login", "hostname") == "login\n"


def test_wan_half_open_is_silent_and_loses_nothing(healthy_wan):
    echo = Echo(healthy_wan)
    try:
        healthy_wan.wan("half-open")
        echo.say(b"are you there\n")
        assert echo.heard(1) is None and echo.process.poll() is None
        healthy_wan.wan("restore")
        assert echo.heard(10) == b"are you there\n"
    finally:
        echo.close()


def test_wan_lose_forgets_connections_but_takes_new_ones(healthy_wan):
    echo = Echo(healthy_wan)
    try:
        healthy_wan.wan("lose")
        echo.say(b"are you there\n")
        assert healthy_wan.ssh("login", "hostname") == "login\n"
        assert echo.heard(1) is None and echo.process.poll() is None
        assert healthy_wan.wan("status")["login"]["lost_connections"] == 1
    finally:
        echo.close()
    # Neither side hears of the other's end: the session on the login node lives on until the link is cut.
    assert healthy_wan.wan("status")["login"]["lost_connections"] == 1
    healthy_wan.wan("cut")
    assert healthy_wan.wan("status")["login"]["lost_connections"] == 0


def test_wan_flaps(healthy_wan):
    before = healthy_wan.wan("status")["login"]["resets"]
    echo = Echo(healthy_wan)
    healthy_wan.wan("flap", "100ms", "50ms", "3")
    assert echo.process.wait(5) == 255
    wait_for("the flapping to end", lambda: healthy_wan.wan("status")["login"]["mode"] == "up")
    assert healthy_wan.wan("status")["login"]["resets"] > before
    assert healthy_wan.ssh("login", "hostname") == "login\n"


def test_wan_proxy_comes_back_on_the_same_port(cluster):
    address = cluster.wan_address()
    cluster.tool("kill", "wan")
    assert cluster.tool("wan", "status", check=False).returncode == 1
    cluster.tool("start", "wan")
    assert sum(banner_and_answer(address)) < 0.5


# -- faults ------------------------------------------------------------------------------------------------------
def test_frozen_controller_takes_the_job_and_does_not_say_so(cluster):
    cluster.tool("freeze", "slurmctld")
    try:
        assert cluster.tool("status", "--json").stdout.count('"frozen"') == 1
        result = cluster.ssh("login", "sbatch -J unsaid -o /dev/null --wrap true", check=False)
    finally:
        cluster.tool("thaw", "slurmctld")
    assert result.returncode == 1 and "Socket timed out" in result.stderr
    wait_for("the job of which nobody was told", lambda: "unsaid" in cluster.states())


def test_controller_and_munge_are_killed_and_started(cluster):
    cluster.tool("stop", "slurmctld")
    down = cluster.ssh("login", "scontrol ping; sbatch --wrap true", check=False)
    assert "DOWN" in down.stdout and down.returncode != 0
    cluster.tool("start", "slurmctld")
    cluster.tool("kill", "munge")
    assert cluster.ssh("login", "munge -n < /dev/null", check=False).returncode != 0  # squeue would try for 50 s
    assert cluster.ssh("login2", "munge -n < /dev/null").startswith("MUNGE:")  # each node has its own
    cluster.tool("start", "munge")
    cluster.tool("ready")
    cluster.ssh("login", "srun -N2 true")


def test_nodes_die_drain_and_return(cluster):
    cluster.tool("drain", "n1", "--reason", "maintenance")
    assert "drain" in cluster.ssh("login", "sinfo -h -n n1 -p main -o %T")
    cluster.tool("resume", "n1")
    cluster.tool("kill", "node", "n2")
    assert cluster.tool("exec", "n2", "true", check=False).returncode == 1
    assert not json.loads(cluster.tool("status", "--json").stdout)["nodes"]["n2"]["alive"]
    cluster.tool("start", "node", "n2")
    cluster.tool("kill", "slurmd", "n1")
    cluster.tool("start", "slurmd", "n1")
    cluster.tool("ready")
    assert cluster.ssh("login", "srun -N2 hostname | sort").split() == ["n1", "n2"]


def test_sshd_and_sessions_are_killed(cluster):
    echo = Echo(cluster)
    assert int(cluster.tool("kill", "sessions", "login").stdout) >= 1
    assert echo.process.wait(5) == 255
    echo = Echo(cluster)
    cluster.tool("kill", "sshd", "login")
    echo.say(b"still here\n")
    assert echo.heard(5) == b"still here\n"  # a session outlives its listener
    assert cluster.ssh("login", "true", check=False).returncode == 255
    cluster.tool("start", "sshd", "login")
    cluster.ssh("login", "true")
    echo.close()


def test_full_home_says_so(cluster):
    result = cluster.ssh("login", "head -c 200000000 /dev/zero > big; code=$?; rm -f big; exit $code", check=False)
    assert result.returncode == 1 and "No space left" in result.stderr


def test_exec_passes_user_input_and_status(cluster):
    assert cluster.tool("exec", "n1", "--user", "bob", "--", "id", "-un").stdout == "bob\n"
    assert cluster.tool("exec", "login2", "--root", "cat", input="through").stdout == "through"
    assert cluster.tool("exec", "n2", "sh", "-c", "exit 7", check=False).returncode == 7
    assert "no node 'n9'" in cluster.tool("exec", "n9", "true", check=False).stderr


# -- coming and going --------------------------------------------------------------------------------------------
def test_two_clusters_side_by_side(cluster):
    traces = Traces()
    other = Cluster("--nodes", "1")
    try:
        other.up()
        assert other.status["subnet"] != cluster.status["subnet"] and other.status["link"] != cluster.status["link"]
        assert other.ssh("login", "srun hostname") == "n1\n"
        assert cluster.ssh("login", "srun hostname").strip() in ("n1", "n2")
        # A program that a user left in the background goes with the cluster.
        other.ssh("login", "(setsid tail -f /dev/null > /dev/null 2>&1 &) ; true")
        again = other.tool("up", "--nodes", "1")
        assert "already up" in again.stdout
        assert "other options" in other.tool("up", "--nodes", "2", check=False).stderr
    finally:
        other.close()
    traces.assert_nothing_left(other.directory)
    assert cluster.ssh("login", "hostname") == "login\n"


@contextlib.contextmanager
def start_until(one, stage):
    """Starts `up` and hands its process over when state.json says that the stage is reached."""
    process = subprocess.Popen([TOOL, "up", "--dir", one.directory, *one.options], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)

    def now():
        assert process.poll() is None, "up ended before it could be killed"
        with contextlib.suppress(OSError, ValueError):
            return STAGES[stage](json.loads((one.directory / "state.json").read_text()))
        return False

    try:
        wait_for(f"the stage {stage}", now, 60, interval=0.001)
        yield process
    finally:
        process.kill()
        process.wait()
        one.close()


def node(state, name):
    return state["nodes"].get(name, {"services": {}})


STAGES = {
    "first_note": lambda state: True,
    "switch": lambda state: "holder" in state["switch"],
    "network": lambda state: "subnet" in state,
    "first_node": lambda state: "holder" in node(state, "login"),
    "last_node": lambda state: "holder" in node(state, "n2"),
    "wan": lambda state: "process" in state["wan"],
    "slurmctld": lambda state: "slurmctld" in node(state, "login")["services"],
    "slurmd": lambda state: "slurmd" in node(state, "n1")["services"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_start_leaves_nothing_after_down(stage):
    traces = Traces()
    one = Cluster("--nodes", "2", "--home-size", "10M")
    with start_until(one, stage) as process:
        process.kill()
    traces.assert_nothing_left(one.directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["switch", "last_node", "slurmd"])
def test_interrupted_start_cleans_up_by_itself(stage, number):
    traces = Traces()
    one = Cluster("--nodes", "2", "--home-size", "10M")
    with start_until(one, stage) as process:
        os.killpg(process.pid, number)  # as the terminal does it: the helper commands get it too
        assert process.wait(60) in (128 + number, 1)
        traces.assert_nothing_left(one.directory)


def test_down_stops_a_start_that_is_under_way():
    traces = Traces()
    one = Cluster("--nodes", "2")
    with start_until(one, "first_node") as process:
        one.tool("down")
        assert process.wait(30) != 0
        traces.assert_nothing_left(one.directory)


def test_start_after_a_killed_start():
    traces = Traces()
    one = Cluster("--nodes", "1")
    with start_until(one, "first_node") as process:
        process.kill()
        process.wait()
        one.up()
        assert one.ssh("login", "srun hostname") == "n1\n"
    traces.assert_nothing_left(one.directory)


def test_failed_start_cleans_up_and_says_why():
    traces = Traces()
    one = Cluster()
    try:
        result = one.tool("up", "--nodes", "1", "--slurm-conf", "NoSuchWord=1", check=False)
        assert result.returncode == 1 and "slurmctld on login ended" in result.stderr and "NoSuchWord" in result.stderr
        traces.assert_nothing_left(one.directory)
    finally:
        one.close()


def test_foreign_directories_are_not_touched():
    base = pathlib.Path(tempfile.mkdtemp(prefix="itwin-tc-", dir="/var/tmp"))
    (base / "precious").write_text("data")
    try:
        for command in ("down", "up"):
            result = subprocess.run([TOOL, command, "--dir", base], capture_output=True, text=True, check=False)
            assert result.returncode == 1 and "not" in result.stderr
        assert (base / "precious").read_text() == "data"
    finally:
        shutil.rmtree(base)


def test_unreachable_directory_is_refused():
    with tempfile.TemporaryDirectory(prefix="itwin-tc-", dir="/var/tmp") as private:
        result = subprocess.run([TOOL, "up", "--dir", f"{private}/c"], capture_output=True, text=True, check=False)
        assert result.returncode == 1 and "ordinary users cannot enter" in result.stderr
