"""The agent on a real SLURM cluster: ada's agent on the login node, driven through its gRPC service.

One cluster for the module. What takes its time on its own (limits, lost nodes, forgotten records) is begun first and
looked at last, so that the whole stays short. Runs alone: /usr/bin/python3 -m pytest --noconftest tests/e2e/slurm_agent_test.py
"""
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time

import grpc
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from slurm_site import BIN, Agent, Cluster, missing, wait_for  # noqa: E402

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

WAITS = "exec tail -f /dev/null"
# sbatch and squeue as the agent finds them first: each does what the file of its name in $ITWIN_FAULTS says, once.
WRAPPER = """#!/bin/bash
here=$ITWIN_FAULTS
name=$(basename "$0")
echo "$name $*" >> "$here/calls"
case " $* " in *" --test-only "*) exec /usr/bin/$name "$@";; esac
if mv "$here/$name.hold" "$here/$name.held" 2>/dev/null; then
  while [ ! -e "$here/$name.go" ]; do read -r -t 0.05 < "$here/pipe" || true; done
  rm -f "$here/$name.go"
fi
if mv "$here/$name.lose" "$here/$name.lost" 2>/dev/null; then
  /usr/bin/$name "$@" > "$here/$name.answer" 2>&1
  echo "$name: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
  exit 1
fi
if mv "$here/$name.fail" "$here/$name.failed" 2>/dev/null; then
  echo "$name: error: Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
exec /usr/bin/$name "$@"
"""


class Site:
    """The cluster, two agents of ada's, and what was begun at the start."""

    def __init__(self):
        self.cluster = Cluster("--login2", "--preemption", "requeue", "--slurmd-timeout", "5", "--nodes", "4", "--accounting",
                               "--slurm-conf", "SchedulerParameters=sched_interval=1,batch_sched_delay=0")
        self.agents = []

    def open(self):
        self.cluster.up()
        self.faults = self.cluster.home() / "faults"
        self.cluster.run("login", "mkdir", "-p", self.faults)
        for name in ("sbatch", "squeue"):
            path = self.faults / name
            path.write_text(WRAPPER)
            path.chmod(0o755)
        os.mkfifo(self.faults / "pipe")
        os.chmod(self.faults / "pipe", 0o666)
        self.hold_pipe = os.open(self.faults / "pipe", os.O_RDWR)
        self.agent = self.make_agent(environment=[f"ITWIN_FAULTS={self.faults}", f"PATH={self.faults}:/usr/bin:/bin"])
        self.begin_long_ones()
        return self

    def make_agent(self, **options):
        self.agents.append(Agent(self.cluster, **options))
        return self.agents[-1]

    def close(self):
        for agent in self.agents:
            agent.disconnect()  # the daemons end with their node
        self.cluster.close()

    def order(self, word):
        """The next sbatch or squeue: "sbatch.hold", "sbatch.lose", "squeue.fail"."""
        (self.faults / word).touch()
        os.chmod(self.faults / word, 0o666)
        self.cluster.run("login", "true")

    def begin_long_ones(self):
        agent = self.agent
        self.limit = agent.request("trap '' TERM; while :; do read -t 1 < /dev/zero; done", minutes=1)
        self.saving = agent.request('until [ "$(date +%s)" -ge "$((ITWIN_DEADLINE - 8))" ]; do read -t 0.5 x < "$ITWIN_OUTPUTS/p"; done; '
                                    'echo s > "$ITWIN_CHECKPOINTS/state"; exit 85', minutes=1)
        self.saving.argv[2] = 'mkfifo "$ITWIN_OUTPUTS/p"; exec 3<> "$ITWIN_OUTPUTS/p"; ' + self.saving.argv[2]
        self.lost_node = agent.request(WAITS, nodes=1)
        self.lost_node.slurm.options.append("--nodelist=n4")
        for request in (self.limit, self.saving, self.lost_node):
            agent.start(request)
        self.low, self.high = agent.request(WAITS), agent.request("true")
        for request, partition in ((self.low, "low"), (self.high, "high")):
            request.slurm.partition = partition
            request.slurm.exclusive = True
            request.slurm.options.append("--nodelist=n3")
        agent.start(self.low)
        agent.reaches(self.lost_node.attempt, "RUNNING")
        self.cluster.tool("kill", "node", "n4")
        agent.reaches(self.low.attempt, "RUNNING")
        agent.start(self.high)
        # sbatch fails, nothing is there, and nobody asks again.
        self.failed = agent.request("true")
        self.order("sbatch.fail")
        with pytest.raises(grpc.RpcError):
            agent.start(self.failed)
        # Ends while nobody looks, and is forgotten by SLURM before anybody does.
        self.unseen_agent = self.make_agent()
        self.unseen = self.unseen_agent.request("echo done; exit 5")
        self.unseen_agent.start(self.unseen)
        # The same, killed so hard that it leaves no record of its own.
        self.unseen_kill = self.unseen_agent.request(WAITS)
        self.unseen_agent.start(self.unseen_kill)
        self.unseen_agent.reaches(self.unseen_kill.attempt, "RUNNING")
        self.unseen_agent.kill()
        script = self.unseen_agent.lifecycle(self.unseen_kill.attempt)[0]
        self.cluster.run(script["host"], "kill", "-9", script["pid"])


@pytest.fixture(scope="module")
def site():
    one = Site()
    try:
        yield one.open()
    finally:
        one.close()


@pytest.fixture
def agent(site):
    return site.agent


def refused(call, *arguments):
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION, error.value
    return error.value.details()


def jobs_of(site, key):
    return [(row[0], row[2]) for row in site.cluster.queue() if row[1] == "itwin-" + key]


def test_hello_knows_the_cluster(agent):
    hello = agent.hello(scheduler="slurm")
    assert hello.scheduler == "slurm" and hello.slurm.version and hello.slurm.cluster == "alpha"
    assert {p.name: p.max_time.seconds for p in hello.slurm.partitions}["short"] == 60
    assert "pmix" in hello.slurm.mpi_plugins and hello.slurm.accounting and hello.slurm.min_job_age.seconds == 20
    assert hello.term == 1 and len(hello.spool_id) == 32
    assert "runs jobs by 'slurm'" in refused(lambda: agent.hello(scheduler="process"))


def test_runs_on_two_nodes_under_srun(agent):
    request = agent.request(argv=["/bin/sh", "-c", 'echo "$(hostname) $SLURM_PROCID"; exit 0'], nodes=2, ranks_per_node=2, mpi=True)
    agent.start(request)
    status = agent.ends(request.attempt)
    assert agent.cause(status) == "EXITED" and status.exit_code == 0 and status.starts == 1
    lines = sorted(agent.output(request.attempt).split("\n")[:-1])
    assert len(lines) == 4 and len({line.split()[0] for line in lines}) == 2 and {line.split()[1] for line in lines} == set("0123")
    one_dies = agent.request(argv=["/bin/sh", "-c", '[ "$SLURM_PROCID" = 2 ] && exit 9; exec tail -f /dev/null'], nodes=2, ranks_per_node=2, mpi=True)
    agent.start(one_dies)
    status = agent.ends(one_dies.attempt)
    # srun tells the highest code, which is that of the ranks it had to end.
    assert status.exit_code in (9, 143) and "task 2: Exited with exit code 9" in agent.output(one_dies.attempt, "stderr.log")


def test_what_can_never_run_is_refused_in_words(site, agent):
    def with_slurm(change, **fields):
        request = agent.request("true", **fields)
        change(request)
        return request

    cases = [(with_slurm(lambda r: r.slurm.__setattr__("partition", "nowhere")), "it has main, short"),
             (with_slurm(lambda r: r.slurm.__setattr__("partition", "short"), minutes=30), "allows at most 1m"),
             (with_slurm(lambda r: None, nodes=9), "at most 4 nodes"),
             (with_slurm(lambda r: None, memory_mib_per_node=10**6), "MiB, but the job asks for 1000000 MiB per node"),
             (with_slurm(lambda r: None, gpus_per_node=1), "Invalid generic resource"),
             (with_slurm(lambda r: r.slurm.__setattr__("reservation", "none")), "Requested reservation is invalid"),
             (with_slurm(lambda r: r.slurm.options.append("--job-name=other")), "cannot be set for a site")]
    for request, words in cases[:-1]:
        assert words in refused(agent.start, request)
        assert not agent.directory(request.attempt).exists() and not jobs_of(site, request.attempt)
    with pytest.raises(grpc.RpcError) as error:
        agent.start(cases[-1][0])
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and cases[-1][1] in error.value.details()


def test_hostile_environment_arrives_as_it_is(site, agent):
    values = {"COMMAS": "a=1,b=2,", "QUOTES": "'\"`id`$(touch pwned)\\", "LINES": "one\ntwo\n", "BLANK": "  ", "UNICODE": "für"}
    request = agent.request(argv=["/usr/bin/python3", "-c", "import json,os;print(json.dumps(dict(os.environ)))"], env=values)
    request.launch.env["FROM_SITE"] = "x y"
    request.launch.prologue.append("export FROM_PROLOGUE='p q'")
    agent.start(request)
    status = agent.ends(request.attempt)
    seen = json.loads(agent.output(request.attempt))
    assert {name: seen[name] for name in values} == values and status.exit_code == 0
    assert seen["FROM_SITE"] == "x y" and seen["FROM_PROLOGUE"] == "p q"
    assert not list(agent.root.glob("**/pwned"))


def test_pending_reasons_hold_and_release(site, agent):
    request = agent.request("true")
    request.slurm.options.append("--begin=now+3600")
    number = agent.start(request).scheduler_id
    status = wait_for("a reason", lambda: (s := agent.status_of(request.attempt)) and "BeginTime" in s.reason and s)
    assert status.phase == agent.phase("PENDING") and status.expected_start_us > time.time() * 1e6
    site.cluster.admin("scontrol", "hold", number)
    assert "JobHeld" in agent.reaches(request.attempt, "HELD").reason
    site.cluster.admin("scontrol", "release", number)
    agent.reaches(request.attempt, "PENDING")
    agent.cancel(request.attempt)
    status = agent.ends(request.attempt)
    assert agent.cause(status) == "CANCELLED" and status.starts == 0


def test_scancel_by_an_administrator(site, agent):
    running, waiting = agent.request(WAITS), agent.request("true")
    waiting.slurm.options.append("--begin=now+3600")
    numbers = [agent.start(r).scheduler_id for r in (running, waiting)]
    agent.reaches(running.attempt, "RUNNING")
    site.cluster.admin("scancel", *numbers)
    status = agent.ends(running.attempt)
    assert agent.cause(status) == "CANCELLED_EXTERNALLY" and "CANCELLED" in status.reason, status
    status = agent.ends(waiting.attempt)
    assert agent.cause(status) == "CANCELLED_EXTERNALLY" and status.starts == 0, status
    # It can never start any more: somebody has the lease.
    assert (agent.directory(waiting.attempt) / "lease").exists()


def test_cancel_ends_a_program_that_obeys_and_one_that_does_not(agent):
    good = agent.request("trap 'echo bye; exit 0' TERM; while :; do read -t 0.2 x < /dev/zero; done")
    bad = agent.request("trap '' TERM; while :; do read -t 0.2 x < /dev/zero; done")
    for request in (good, bad):
        agent.start(request)
        agent.reaches(request.attempt, "RUNNING")
    for request in (good, bad):
        agent.cancel(request.attempt)
    assert agent.cause(agent.ends(bad.attempt)) == "CANCELLED"
    assert agent.ends(good.attempt).exit_code == 0 and "bye" in agent.output(good.attempt)


def test_a_requeue_does_not_start_it_twice(site, agent):
    request = agent.request(f"echo x >> \"$ITWIN_OUTPUTS/runs\"; {WAITS}")
    number = agent.start(request).scheduler_id
    agent.reaches(request.attempt, "RUNNING")
    # SLURM lets an administrator requeue even a --no-requeue job only after this.
    site.cluster.admin("scontrol", "update", f"JobId={number}", "Requeue=1")
    assert site.cluster.admin("scontrol", "requeue", number).returncode == 0
    status = agent.ends(request.attempt)
    assert agent.cause(status) == "PREEMPTED" and status.starts == 1, status
    assert (agent.directory(request.attempt) / "outputs" / "runs").read_text() == "x\n"
    wait_for("its second life to be taken out", lambda: all(s in ("CANCELLED", "COMPLETED") for _, s in jobs_of(site, request.attempt)))


def test_the_answer_of_sbatch_is_lost(site, agent):
    request = agent.request('echo x >> "$ITWIN_OUTPUTS/runs"')
    site.order("sbatch.lose")
    with pytest.raises(grpc.RpcError) as error:
        agent.start(request)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE and "Socket timed out" in error.value.details()
    agent.start_until_clear(request)
    status = agent.ends(request.attempt)
    assert status.starts == 1 and (agent.directory(request.attempt) / "outputs" / "runs").read_text() == "x\n"
    assert len(jobs_of(site, request.attempt)) == 1


def test_a_frozen_controller_holds_up_nobody(site, agent):
    runs, waits = agent.request("echo $$; " + WAITS), agent.request("true")
    agent.start(runs)
    agent.reaches(runs.attempt, "RUNNING")
    site.order("sbatch.hold")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starting = pool.submit(agent.start_until_clear, waits, 90)
        wait_for("sbatch to be called", (site.faults / "sbatch.held").exists)
        site.cluster.tool("freeze", "slurmctld")
        try:
            (site.faults / "sbatch.go").touch()
            for call in (agent.hello, lambda: agent.statuses([runs.attempt]), lambda: agent.cancel(runs.attempt), agent.hello):
                before = time.monotonic()
                call()
                assert time.monotonic() - before < 5
            wait_for("sbatch to give up", lambda: "sbatch" in agent.log() or starting.done() or "no clear answer" in agent.log(), 60)
        finally:
            site.cluster.tool("thaw", "slurmctld")
            (site.faults / "sbatch.held").unlink()
        starting.result()
    status = agent.ends(waits.attempt)
    assert status.starts == 1 and agent.cause(agent.ends(runs.attempt)) == "CANCELLED"
    jobs = wait_for("SLURM to say so", lambda: (j := jobs_of(site, waits.attempt)) and all(s == "COMPLETED" for _, s in j) and j)
    assert len(jobs) == 1


def test_a_controller_killed_before_its_state_was_safe(site, agent):
    request = agent.request('echo x >> "$ITWIN_OUTPUTS/runs"')
    request.slurm.options.append("--begin=now+4")  # not started before the controller is gone
    lost = agent.start(request).scheduler_id
    site.cluster.tool("kill", "slurmctld")
    site.cluster.tool("start", "slurmctld")
    # Somebody else gets the number.
    other = subprocess.run(site.cluster.exec_argv("login", "sbatch", "--parsable", "-J", "strange", "--wrap", "exec tail -f /dev/null", user="bob"),
                           capture_output=True, text=True, check=True, cwd="/").stdout.strip()
    status = agent.ends(request.attempt, seconds=90)
    assert status.exit_code == 0 and status.starts == 1
    assert (agent.directory(request.attempt) / "outputs" / "runs").read_text() == "x\n"
    if other == lost:
        assert status.scheduler_id != lost
    assert [row[2] for row in site.cluster.queue() if row[1] == "strange" and row[0] == other] == ["RUNNING"], "not ours: not touched"
    site.cluster.admin("scancel", other)


def test_killed_and_connected_again_nothing_is_lost(agent):
    request = agent.request("read line < \"$ITWIN_OUTPUTS/gate\"; exit 3")
    request.argv[2] = 'mkfifo "$ITWIN_OUTPUTS/gate"; ' + request.argv[2]
    agent.start(request)
    agent.reaches(request.attempt, "RUNNING")
    first = agent.pid()
    agent.kill()
    agent.connect()
    assert agent.hello().term == 2 and agent.pid() != first
    assert agent.status_of(request.attempt).phase == agent.phase("RUNNING")
    with open(agent.directory(request.attempt) / "outputs" / "gate", "w", encoding="ascii") as gate:
        gate.write("go\n")
    assert agent.ends(request.attempt).exit_code == 3


def test_looks_do_not_grow_with_jobs(site, agent):
    def looks(seconds):
        before = (site.faults / "calls").read_text().count("squeue ")
        end = time.monotonic() + seconds
        wait_for("the time", lambda: time.monotonic() > end, seconds + 5)
        return (site.faults / "calls").read_text().count("squeue ") - before

    requests = [agent.request("true") for _ in range(40)]
    for request in requests:
        request.slurm.options.append("--begin=now+3600")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(agent.start, requests))
    wait_for("all to be known", lambda: all("BeginTime" in s.reason for s in agent.statuses([r.attempt for r in requests])))
    assert looks(6) <= 6 / 2 + 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda r: agent.cancel(r.attempt), requests))
    for request in requests:
        agent.ends(request.attempt)


def test_another_login_node_takes_over(site):
    one = site.make_agent()
    request = one.request(WAITS)
    one.start(request)
    one.reaches(request.attempt, "RUNNING")
    first = json.loads((one.root / "agent.json").read_text())
    two = site.make_agent(node="login2", root=one.root)
    assert two.hello().term == first["term"] + 1 and two.hello().host == "login2"
    wait_for("the first to end", lambda: "takes over" in one.log())
    assert two.status_of(request.attempt).phase == two.phase("RUNNING")
    two.cancel(request.attempt)
    assert two.cause(two.ends(request.attempt)) == "CANCELLED"
    # One that is killed says nothing: it is waited for until it has been silent for long enough.
    two.kill()
    one.connect()
    before = time.monotonic()
    assert one.hello(60).term == first["term"] + 2
    assert 10 < time.monotonic() - before < 50


def test_retire_makes_room_for_the_next(site):
    one = site.make_agent()
    pid, term = (one.hello(), one.pid())[1], one.hello().term
    one.call("Retire", one.pb.RetireRequest(), one.pb.RetireResponse)
    wait_for("it to end", lambda: not (one.root / "agent.json").exists())
    one.connect()
    assert one.hello().term == term + 1 and one.pid() != pid


def test_doctor(site, agent):
    checks = {c.name: c for c in agent.diagnose(run_jobs=(BIN / "itwin-worker").exists())}
    ok = agent.pb.CHECK_VERDICT_OK
    for name in ("host", "scratch", "quota", "scheduler", "partitions", "accounting", "mpi", "calls"):
        assert checks[name].verdict == ok, checks[name]
    assert "cluster alpha" in checks["scheduler"].found and "squeue" in checks["calls"].found
    if (BIN / "itwin-worker").exists():
        assert checks["worker"].verdict == ok and "2 node(s)" in checks["worker"].found, checks["worker"]
        assert checks["clock"].verdict == ok
    bad = {c.name: c for c in agent.diagnose(launch=agent.pb.LaunchSettings(launcher="srun --mpi=openmpi"),
                                             slurm=agent.pb.SlurmSettings(partition="nowhere"))}
    assert bad["mpi"].verdict == bad["partitions"].verdict == agent.pb.CHECK_VERDICT_ERROR


def test_the_scheduler_contract(site):
    """tests/contract/scheduler_contract.h against SlurmScheduler, as ada on the login node, and with sbatch losing its answers."""
    binary = pathlib.Path(os.environ.get("ITWIN_BUILD", BIN.parent)) / "tests" / "agent_scheduler_slurm_slurm_scheduler_test"
    # Its jobs are expected to start at once: the last of what the tests before began must have left the nodes.
    site.cluster.run("login", "scancel", "--user=ada", check=False)
    wait_for("an empty queue", lambda: not site.cluster.run("login", "squeue", "-h", "-a").strip())
    root = site.cluster.home() / "contract"
    site.cluster.run("login", "mkdir", "-p", root)
    result = site.cluster.run("login", "env", f"ITWIN_BIN={site.cluster.bin}", f"ITWIN_TEST_SLURM_ROOT={root}", binary, "--gtest_brief=1",
                              check=False, seconds=170)
    queue = site.cluster.run("login", "squeue", "-a", "-t", "all", "-O", "JobID,Name:44,State,Reason:30,NodeList,StartTime", check=False)
    assert result.returncode == 0, result.stdout + result.stderr + queue.stdout


# ---- what was begun at the start ----


@pytest.mark.parametrize("distribution", ["block", "cyclic"])
def test_the_workers_collectives_go_round_a_ring_between_nodes(site, distribution):
    binary = pathlib.Path(os.environ.get("ITWIN_BUILD", BIN.parent)) / "tests" / "worker_dist_mpi_communicator_test"
    for suite in ("Keeps*", "Says*"):
        result = site.cluster.run("login", "srun", "--mpi=pmix", "-N3", "-n6", "-m", distribution, "env", "ITWIN_TEST_RANKS=6",
                                  "OMPI_MCA_mpi_yield_when_idle=1", binary, "--gtest_also_run_disabled_tests",
                                  f"--gtest_filter=MpiRank.DISABLED_{suite}", check=False, seconds=120)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert sorted(line for line in result.stdout.splitlines() if line.startswith("rank ")) == [
        f"rank {rank}: long 1 short 0" for rank in range(6)]


def test_preemption(site, agent):
    status = agent.ends(site.low.attempt)
    assert agent.cause(status) == "PREEMPTED" and list(status.nodes) == ["n3"], status
    assert agent.ends(site.high.attempt).exit_code == 0


def test_sbatch_failed_and_nothing_is_there(site, agent):
    """The agent itself finds out that there is nothing, and submits again."""
    status = agent.ends(site.failed.attempt)
    assert status.starts == 1 and status.exit_code == 0


def test_the_time_limit_comes_from_us_before_slurm(site, agent):
    status = agent.ends(site.limit.attempt, seconds=90)
    assert agent.cause(status) == "TIME_LIMIT", status
    status = agent.ends(site.saving.attempt, seconds=90)
    assert agent.cause(status) == "EXITED" and status.exit_code == 85 and status.checkpoint, status


def test_a_lost_node_is_named(site, agent):
    status = agent.ends(site.lost_node.attempt, seconds=90)
    assert agent.cause(status) == "NODE_FAILED" and list(status.bad_nodes) == ["n4"], status
    assert status.scheduler_state == "NODE_FAIL"


def test_an_end_that_nobody_saw_is_known_by_its_records(site):
    wait_for("SLURM to forget it", lambda: not jobs_of(site, site.unseen.attempt), 60, 0.5)
    site.unseen_agent.connect()
    status = site.unseen_agent.ends(site.unseen.attempt)
    assert site.unseen_agent.cause(status) == "EXITED" and status.exit_code == 5 and status.starts == 1


def test_an_end_that_left_nothing_is_known_by_accounting(site):
    wait_for("SLURM to forget it", lambda: not jobs_of(site, site.unseen_kill.attempt), 60, 0.5)
    status = site.unseen_agent.ends(site.unseen_kill.attempt, seconds=50)
    assert site.unseen_agent.cause(status) == "LOST" and status.starts == 1, status
    assert "SLURM says FAILED, ended by signal 9 (KILL)" in status.reason and "no exit record" in status.reason, status
