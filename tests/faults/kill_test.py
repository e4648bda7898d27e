"""kill -9 of each part with jobs in every state at once: whatever dies, each job comes to its right end, started once."""
import os
import signal

import pytest
from world import FINISH, harness, wait_for

CLUSTER = ("--nodes", "2")
# Never the same twice: what the gateway has already does not travel again.
LARGE = FINISH.replace("1000", "200000000") + '; echo $RANDOM$RANDOM$RANDOM >>"$ITWIN_OUTPUTS/model.bin"'


class Everywhere:
    """One job in each state, and the gates that keep them there."""

    def __init__(self, world):
        self.world = world
        self.jobs = {}
        w = world
        self.add("RUNNING", w.program("running"))
        w.wait_points(self.jobs["RUNNING"])
        # Outputs that take a while to come back.
        w.cluster.wan("--direction", "down", "throttle", "30M")
        w.open_gate("collecting")
        self.add("COLLECTING", w.program("collecting", tail=LARGE))
        w.wait_state(self.jobs["COLLECTING"], "COLLECTING", seconds=90)
        # More than there is: it waits for as long as anything runs. Only now, for it would not let others overtake it.
        self.add("PENDING", w.program("pending", nodes=2, exclusive=True) if w.scheduler == "slurm"
                 else w.program("pending", ranks_per_node=4))
        w.wait_state(self.jobs["PENDING"], "PENDING")
        # With the agent's process stopped, new jobs get as far as their next word from it.
        self.frozen = w.agents()
        assert self.frozen
        w.signal_all(self.frozen, signal.SIGSTOP)
        self.add("STAGING", w.shell("exit 0", inputs={"data.bin": os.urandom(300_000)}))
        self.add("SUBMITTING", w.shell("exit 0"))
        self.add("QUEUED", w.shell("exit 0"))

    def add(self, state, spec):
        self.jobs[state] = self.world.submit(spec)

    def go_on(self):
        self.world.cluster.wan("restore")
        self.world.signal_all(self.frozen, signal.SIGCONT)
        self.world.open_gate("running")
        self.world.open_gate("pending")

    def check(self, words=()):
        for state, job in self.jobs.items():
            print("checking the job that was", state)
            self.world.check_everything(job, words=words, output=state in ("RUNNING", "PENDING", "COLLECTING"))


def kill(w, pids):
    assert pids, "nothing to kill"
    w.signal_all(pids, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["gateway", "agent", "tunnel", "session", "gateway_and_agent"])
def test_kill_with_jobs_in_every_state(w, victim):
    case = Everywhere(w)
    if victim in ("gateway", "gateway_and_agent"):
        w.kill_gateway()
    if victim in ("agent", "gateway_and_agent"):
        kill(w, w.agents())
    if victim == "tunnel":
        kill(w, w.tunnels())
    if victim == "session":
        w.cluster.tool("kill", "sessions", "login")
    if w.process.poll() is not None:
        w.start()
    case.go_on()
    case.check()


def test_sshd_is_killed_and_comes_back(w):
    job = w.submit(w.program("sshd"))
    w.wait_points(job)
    w.cluster.tool("kill", "sshd", "login")
    w.cluster.tool("kill", "sessions", "login")
    wait_for("the gateway to notice", lambda: w.site().state == harness.sites_pb2.SITE_STATE_UNREACHABLE, 30)
    w.open_gate("sshd")
    w.cluster.tool("start", "sshd", "login")
    w.check_everything(job)


def test_wrapper_script_is_killed(w):
    """The script of an attempt dies without a word: infrastructure failure, said so, and a second attempt."""
    job = w.submit(w.program("wrapper"))
    w.wait_points(job)
    kill(w, w.supervisors(job))
    w.wait_points(job, attempt=2, seconds=90)
    w.open_gate("wrapper")
    end = w.check_everything(job, attempts=2, words=("vanished" if w.scheduler == "process" else "started again",))
    assert end.attempts[0].failure == harness.jobs_pb2.FAILURE_CLASS_INFRA


def test_one_rank_is_killed(w):
    """The program's own death is the program's failure: no blind second try, and the signal is named."""
    job = w.submit(w.program("rank"))
    w.wait_points(job)
    kill(w, w.ranks(job))
    end = w.check_everything(job, state="FAILED", words=("SIGKILL", "memory"))
    assert end.failure == harness.jobs_pb2.FAILURE_CLASS_APP


def test_everything_is_killed_again_and_again(w):
    """Five rounds of gateway, agent and sessions while one job prints."""
    job = w.submit(w.program("again"))
    w.wait_points(job)
    for turn in range(5):
        before = len(w.points(job)[1])
        victim = ("gateway", "agent", "sessions")[turn % 3]
        if victim == "gateway":
            w.kill_gateway()
            w.start()
        elif victim == "agent":
            kill(w, w.agents())
        else:
            w.cluster.tool("kill", "sessions", "login")
        wait_for("new points", lambda: len(w.points(job)[1]) > before, 60, interval=0.05)
    w.open_gate("again")
    w.check_everything(job)
