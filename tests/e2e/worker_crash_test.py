"""A rank of a real training run dies: the job fails or goes on with a documented attempt, and its numbers stay right."""
import pytest
import signal

from bad_input_test import submit_training, train
from harness import jobs_pb2, processes, wait_for


def long_training(w, **changes):
    document = train(epochs=100000, checkpoint={"every_epochs": 50}, **changes)
    job = submit_training(w, document)
    wait_for("points", lambda: len(w.points(job).get(1, [])) > 100, 60)
    return job


def ranks(job):
    return processes("itwin-worker", job)


def checkpoint(w, job):
    return list(w.attempt_directory(job, 1).glob("checkpoints/step-*[0-9]/manifest.json"))


# What a run is doing when one of its ranks dies; each waits for its moment and may return at once.
MOMENTS = {
    "starting": lambda w, job: True,  # before MPI_Init or in it, reading data
    "training": lambda w, job: len(w.points(job).get(1, [])) > 100,
    "saving": lambda w, job: list(w.attempt_directory(job, 1).glob("checkpoints/*")),  # some part of the first one lies there
    "saved": lambda w, job: checkpoint(w, job),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", ["first", "last"])
def test_one_rank_killed(world, moment, victim):
    w = world()
    job = submit_training(w, train(epochs=100000, checkpoint={"every_epochs": 50}))
    pids = wait_for("both ranks", lambda: (lambda found: found if len(found) == 2 else None)(
        sorted(p for p in ranks(job) if not processes_mpirun(p))), 60, interval=0.001)
    wait_for(moment, lambda: MOMENTS[moment](w, job), 60, interval=0.001)
    w.signal_all([pids[0 if victim == "first" else -1]], signal.SIGKILL)
    end = w.wait_final(job)
    assert end.state == jobs_pb2.JOB_STATE_FAILED
    assert end.failure in (jobs_pb2.FAILURE_CLASS_APP, jobs_pb2.FAILURE_CLASS_RESOURCE), end
    assert "signal" in end.reason.lower() or "kill" in end.reason.lower(), end.reason
    wait_for("the other rank to be gone", lambda: not ranks(job), 30)
    w.check_exactly_once(job)


def processes_mpirun(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as line:
        return line.read().split(b"\0")[0].endswith((b"mpirun", b"prterun", b"itwin-agent"))  # Open MPI 5: prterun


def test_retry_goes_on_from_the_checkpoint(world):
    w = world()
    job = long_training(w)
    wait_for("a checkpoint", lambda: checkpoint(w, job), 60)
    pids = sorted(p for p in ranks(job) if not processes_mpirun(p))
    w.signal_all(pids[:1], signal.SIGKILL)
    w.wait_final(job)
    again = w.jobs.RetryJob(jobs_pb2.RetryJobRequest(job=job, request_id="again"), timeout=30).job.id
    wait_for("points of the retry", lambda: w.points(again).get(1), 60)
    first = min(step for _, step, _ in w.points(again)[1])
    assert first > 50, "it began anew instead of going on"
    w.jobs.CancelJob(jobs_pb2.CancelJobRequest(job=again))
    assert w.wait_final(again).state == jobs_pb2.JOB_STATE_CANCELLED
    w.check_exactly_once(again)


def test_wall_limit_saves_and_goes_on(world):
    """Longer than its wall limit, and the weights are those of one long run."""
    w = world()
    document = train(epochs=3000, batch=4)
    one = submit_training(w, document)
    end_one = w.wait_final(one, 300)
    took = (end_one.attempts[0].ended_us - end_one.attempts[0].started_us) / 1e6
    # About half of it per attempt, however fast this machine is now: some 7 s are kept in hand for the save, and the start takes 1 or 2.
    limited = dict(document, resources={"ranks_per_node": 2, "time": f"{int(took / 2) + 9}s"})
    chain = submit_training(w, limited)
    end_chain = w.wait_final(chain, 300)
    assert end_one.state == end_chain.state == jobs_pb2.JOB_STATE_SUCCEEDED, end_chain.reason
    assert end_one.attempt == 1 and end_chain.attempt >= 2
    assert end_one.summary["test/rmse"] == end_chain.summary["test/rmse"]
    w.check_exactly_once(chain)
    outputs = [{o.path: o.sha256 for o in w.jobs.ListOutputs(jobs_pb2.ListOutputsRequest(job=j)).outputs}
               for j in (one, chain)]
    assert outputs[0]["weights.safetensors"] == outputs[1]["weights.safetensors"]
