"""Cancel at every state: the job ends CANCELLED, nothing of it goes on running, and nothing starts afterwards."""
import grpc
import pytest
from crash_test import STATES, Case
from harness import jobs_pb2, processes, wait_for


def cancel(world, job):
    return world.jobs.CancelJob(jobs_pb2.CancelJobRequest(job=job), timeout=30)


@pytest.mark.parametrize("state", [s for s in STATES if s != "COLLECTING"])
def test_cancel_at_state(world, state):
    w = world()
    case = Case(w, state)
    assert cancel(w, case.job).cancel_requested
    case.blocker_gate.touch()
    w.signal_all(case.frozen, 18)  # SIGCONT
    end = w.wait_final(case.job)
    assert end.state == jobs_pb2.JOB_STATE_CANCELLED, end.reason
    if state != "RUNNING":
        assert sum(w.started(case.job, n) for n in range(1, end.attempt + 1)) <= 1
    wait_for("its processes to be gone", lambda: not processes("run-attempt", case.job), 30)
    w.check_exactly_once(case.job)
    with pytest.raises(grpc.RpcError) as error:
        cancel(w, case.job)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_a_result_wins_over_a_late_cancel(world):
    w = world()
    case = Case(w, "COLLECTING")
    cancel(w, case.job)
    end = w.wait_final(case.job)
    assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED
    w.check_exactly_once(case.job)
