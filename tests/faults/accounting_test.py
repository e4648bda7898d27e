"""Accounting is there, but late, frozen or dead: it only ever confirms, so nothing waits for it and nothing is concluded from it."""
import signal

import pytest
from world import wait_for

CLUSTER = ("--nodes", "1", "--accounting", "--min-job-age", "10")


def test_accounting_agrees(w):
    job = w.submit(w.program("agrees"))
    w.wait_points(job)
    w.open_gate("agrees")
    w.check_everything(job)


def test_accounting_is_frozen(w):
    """sacct hangs for as long as it likes: jobs begin, run and end without it."""
    with w.cluster.frozen("slurmdbd"):
        job = w.submit(w.program("frozen"))
        w.wait_points(job, seconds=120)
        w.open_gate("frozen")
        w.check_everything(job)


def test_accounting_is_dead_and_the_queue_has_forgotten(w):
    """Neither queue nor accounting know of the job any more: the spool's own records are enough."""
    job = w.submit(w.program("forgotten"))
    w.wait_points(job)
    w.cluster.tool("kill", "slurmdbd")
    w.kill_gateway()
    w.signal_all(w.agents(), signal.SIGKILL)
    w.open_gate("forgotten")
    wait_for("SLURM to forget the job", lambda: not w.cluster.jobs_named(job), 120, interval=0.5)
    w.start()
    w.check_everything(job)


@pytest.mark.slow
def test_a_job_vanishes_without_a_trace(w):
    """Forgotten by the queue, unknown to accounting, no exit record: lost, said so, and started again once that is sure."""
    job = w.submit(w.program("vanishes"))
    w.wait_points(job)
    w.cluster.tool("kill", "slurmdbd")
    w.signal_all(w.supervisors(job), signal.SIGKILL)
    w.wait_points(job, attempt=2, seconds=180)
    w.open_gate("vanishes")
    w.check_everything(job, attempts=2)
