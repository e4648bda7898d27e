"""kill -9 of everything, at every state of a job.

Each case brings a job to a state, kills a victim there, lets the system recover, and then asks for the same things:
one start per attempt, one terminal event of the right kind, every point of the spool in the database exactly once.
"""
import os
import signal

import pytest
from harness import jobs_pb2, wait_for

# Prints points steadily so that there is something to lose or double at every moment, waits at a gate that the test
# opens, and leaves an output.
PROGRAM = """
step=0
emit() { step=$((step+1)); printf '{"step":%d,"metrics":{"train/loss":0.%04d,"lr":1e-3}}\\n' $step $step >>"$ITWIN_METRICS"; }
for i in $(seq 50); do emit; done
echo running
until [ -e GATE ]; do emit; read -t 0.02 <>/dev/zero || true; sleep 0.02; done
for i in $(seq 50); do emit; done
head -c SIZE /dev/zero | tr '\\0' 'x' >"$ITWIN_OUTPUTS/model.bin"
echo done
"""
BLOCKER = "touch STARTED; until [ -e GATE ]; do sleep 0.05; done"


class Case:
    """A job on its way to a state, with the gates that keep it there."""

    def __init__(self, world, state):
        self.world = world
        self.gate = world.directory / "gate"
        self.blocker_gate = world.directory / "blocker"
        self.blockers = []
        self.frozen = []
        size = 300_000_000 if state == "COLLECTING" else 1000
        script = PROGRAM.replace("GATE", str(self.gate)).replace("SIZE", str(size))
        if state in ("PENDING", "QUEUED"):
            self.block()
        inputs = {"data.bin": os.urandom(100_000)} if state == "STAGING" else None
        spec = world.shell(script, inputs=inputs)
        if state in ("STAGING", "SUBMITTING", "SUBMIT_UNKNOWN"):
            self.frozen = world.agents()
            assert self.frozen
            world.signal_all(self.frozen, signal.SIGSTOP)
        if state == "COLLECTING":
            self.gate.touch()
        self.job = world.submit(spec)
        if state == "QUEUED":
            return  # behind the blockers, or at once on its way: both are fine, the kill comes right after the commit
        world.wait_state(self.job, state, seconds=90)
        if state == "RUNNING":
            wait_for("points to arrive", lambda: world.points(self.job).get(1), 30)

    def block(self):
        script = BLOCKER.replace("GATE", str(self.blocker_gate)).replace("STARTED", str(self.world.directory / "started"))
        self.blockers.append(self.world.submit(self.world.shell(script, name="blocker", ranks_per_node=4)))
        wait_for("the blocker to run", (self.world.directory / "started").exists, 30)

    def release(self):
        self.world.signal_all(self.frozen, signal.SIGCONT)
        self.gate.touch()
        self.blocker_gate.touch()


STATES = ["QUEUED", "STAGING", "SUBMITTING", "SUBMIT_UNKNOWN", "PENDING", "RUNNING", "COLLECTING"]


def recover(world, victim):
    if victim == "gateway":
        world.start()


def kill(world, case, victim):
    if victim == "gateway":
        world.kill_gateway()
    elif victim == "agent":
        pids = world.agents()
        assert pids
        world.signal_all(pids, signal.SIGKILL)
    elif victim == "connection":
        pids = world.connections()
        assert pids
        world.signal_all(pids, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["gateway", "agent", "connection"])
@pytest.mark.parametrize("state", STATES)
def test_kill_at_state(world, state, victim):
    w = world()
    case = Case(w, state)
    kill(w, case, victim)
    recover(w, victim)
    case.release()
    end = w.wait_final(case.job)
    assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED, end.reason
    assert end.attempt == 1
    assert w.started(case.job, 1) == 1
    w.check_exactly_once(case.job)
    outputs = w.jobs.ListOutputs(jobs_pb2.ListOutputsRequest(job=case.job)).outputs
    assert [o.path for o in outputs] == ["model.bin"]
    assert w.log(case.job).splitlines() == ["running", "done"]


def test_gateway_killed_again_and_again(world):
    """Ten kills of the gateway while a job prints points."""
    w = world()
    case = Case(w, "RUNNING")
    for _ in range(10):
        before = len(w.points(case.job)[1])
        wait_for("new points", lambda: len(w.points(case.job)[1]) > before, 30)
        w.kill_gateway()
        w.start()
    case.release()
    assert w.wait_final(case.job).state == jobs_pb2.JOB_STATE_SUCCEEDED
    w.check_exactly_once(case.job)


def test_supervisor_killed_means_a_new_attempt(world):
    """The script of an attempt dies without a word: infrastructure failure, documented, and a second attempt runs."""
    w = world()
    case = Case(w, "RUNNING")
    pids = w.supervisors(case.job)
    assert pids
    w.signal_all(pids, signal.SIGKILL)
    wait_for("a second attempt", lambda: w.job(case.job).attempt == 2, 60)
    wait_for("it to run", lambda: w.started(case.job, 2) == 1, 60)
    case.release()
    end = w.wait_final(case.job)
    assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED, end.reason
    requeued = [e for e in w.events(case.job) if e.kind == "requeued"]
    assert len(requeued) == 1 and requeued[0].failure == jobs_pb2.FAILURE_CLASS_INFRA
    w.check_exactly_once(case.job)


def test_gateway_and_agent_both_killed(world):
    w = world()
    case = Case(w, "RUNNING")
    w.kill_gateway()
    w.signal_all(w.agents(), signal.SIGKILL)
    case.gate.touch()
    directory = w.attempt_directory(case.job, 1)
    wait_for("the program to end on its own", lambda: "exited" in (directory / "lifecycle.jsonl").read_text(), 60)
    w.start()
    end = w.wait_final(case.job)
    assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED, end.reason
    w.check_exactly_once(case.job)
