"""SLURM misbehaves, and its administrators act: whatever they do, there is one SLURM job per attempt and one true end."""
import json
import signal

import pytest
from world import harness, jobs_pb2, wait_for

CLUSTER = ("--nodes", "3", "--slurmd-timeout", "5", "--min-job-age", "10", "--preemption", "cancel", "--memory-kill")


def scheduler_jobs(w, job, attempt=1):
    return w.cluster.jobs_named(w.key(job, attempt))


def start_running(w, name, **keywords):
    job = w.submit(w.program(name, **keywords))
    w.wait_points(job)
    return job


# -- the controller -----------------------------------------------------------------------------------------------
def test_frozen_controller_takes_the_job_and_does_not_say_so(w):
    """sbatch ends without an answer although the job exists: looked up and adopted, never submitted twice."""
    w.open_gate("frozen")
    with w.cluster.frozen("slurmctld"):
        job = w.submit(w.program("frozen"))
        wait_for("doubt to be a state", lambda: w.state(job) in ("SUBMIT_UNKNOWN", "SUBMITTING"), 30)
        wait_for("the user to be told", lambda: "submit_unclear" in w.kinds(job), 60, interval=0.1)
    w.check_everything(job)
    assert len(scheduler_jobs(w, job)) <= 1


def test_controller_is_killed_before_its_state_is_safe(w):
    """The job is forgotten and its id given to a stranger: ours is submitted again, the stranger's is left alone."""
    gate = "forgotten"
    job = w.submit(w.program(gate))
    wait_for("the SLURM job", lambda: scheduler_jobs(w, job), 30, interval=0.01)
    w.cluster.tool("kill", "slurmctld")
    w.cluster.tool("start", "slurmctld")
    strangers = [w.cluster.slurm("sbatch", "--parsable", "-J", f"stranger{i}", "-n1", "--mem=16", "-o", "/dev/null",
                                 "--wrap", "exec tail -f /dev/null", user="bob").split(";")[0].strip() for i in range(6)]
    w.wait_points(job, seconds=120)
    w.open_gate(gate)
    w.check_everything(job)
    cancelled = w.submit(w.program("cancelled"))
    w.wait_points(cancelled)
    w.jobs.CancelJob(jobs_pb2.CancelJobRequest(job=cancelled))
    w.check_everything(cancelled, state="CANCELLED", words=("cancelled",))
    states = {row[0]: row[2] for row in w.cluster.queue()}
    assert all(states[number] in ("RUNNING", "PENDING") for number in strangers), "a stranger's job was touched"


def test_controller_is_down_for_a_while(w):
    running = start_running(w, "while-down")
    w.cluster.tool("stop", "slurmctld")
    waiting = w.submit(w.program("submitted-down"))
    w.open_gate("submitted-down")
    before = len(w.points(running)[1])
    wait_for("points to come all the same", lambda: len(w.points(running)[1]) > before + 20, 30)
    wait_for("the waiting job to say why", lambda: "slurm" in w.said(waiting).lower(), 60)
    assert w.state(running) == "RUNNING" and w.state(waiting) in ("SUBMITTING", "SUBMIT_UNKNOWN")
    w.open_gate("while-down")
    w.cluster.tool("start", "slurmctld")
    w.check_everything(running)
    w.check_everything(waiting)


def test_munge_is_stopped(w):
    """No SLURM command works on the login node: nothing is concluded, and it passes."""
    running = start_running(w, "munge")
    w.cluster.tool("kill", "munge", "login")
    before = len(w.points(running)[1])
    wait_for("points to come all the same", lambda: len(w.points(running)[1]) > before + 20, 30)
    assert w.state(running) == "RUNNING"
    w.cluster.tool("start", "munge", "login")
    w.open_gate("munge")
    w.check_everything(running)


def test_the_queue_has_forgotten_it_when_the_gateway_returns(w):
    """Gateway and agent are away for longer than MinJobAge: the spool's own records decide."""
    job = start_running(w, "away")
    w.kill_gateway()
    w.signal_all(w.agents(), signal.SIGKILL)
    w.open_gate("away")
    wait_for("SLURM to forget the job", lambda: not scheduler_jobs(w, job), 120, interval=0.5)
    w.start()
    w.check_everything(job)


# -- administrators -----------------------------------------------------------------------------------------------
def test_admin_holds_and_releases(w):
    blocker = w.submit(w.program("blocker", nodes=3, exclusive=True))
    w.wait_points(blocker)
    job = w.submit(w.program("held"))
    w.wait_state(job, "PENDING")
    number = w.slurm_id(job)
    w.cluster.slurm("scontrol", "hold", number)
    w.wait_state(job, "HELD", seconds=60)
    assert "held" in w.job(job).reason.lower()
    w.cluster.slurm("scontrol", "release", number)
    w.open_gate("blocker")
    w.wait_points(job, seconds=90)
    w.open_gate("held")
    w.check_everything(job, words=("held", "administrator"))
    w.check_everything(blocker)


def test_admin_cancels(w):
    job = start_running(w, "scancel")
    w.cluster.slurm("scancel", w.slurm_id(job))
    end = w.check_everything(job, state="FAILED", words=("somebody cancelled it",))
    assert end.failure == jobs_pb2.FAILURE_CLASS_UNKNOWN


def test_admin_cancels_while_it_waits(w):
    blocker = w.submit(w.program("blocker2", nodes=3, exclusive=True))
    w.wait_points(blocker)
    job = w.submit(w.program("scancel2"))
    w.wait_state(job, "PENDING")
    w.cluster.slurm("scancel", w.slurm_id(job))
    w.check_everything(job, state="FAILED", words=("somebody cancelled it",))
    w.open_gate("blocker2")
    w.check_everything(blocker)


def test_admin_requeues(w):
    """--no-requeue is ours; an administrator who requeues all the same does not get a second start."""
    job = start_running(w, "requeue")
    result = w.cluster.tool("exec", "--root", "login", "--", "scontrol", "requeue", w.slurm_id(job), check=False)
    if result.returncode == 0:
        wait_for("the first life to be over", lambda: not w.ranks(job), 60)
    w.open_gate("requeue")
    w.wait_final(job, seconds=240)
    w.check_everything(job, attempts=None)


def test_admin_drains_the_node(w):
    """A draining node lets its job finish; a job that waits says why."""
    job = start_running(w, "drain")
    node = scheduler_jobs(w, job)[0][4]
    w.cluster.tool("drain", node, "--reason", "maintenance")
    all_nodes = w.submit(w.program("drain-all", nodes=3))
    w.wait_state(all_nodes, "PENDING", "HELD")
    wait_for("the reason", lambda: "node" in w.job(all_nodes).reason.lower(), 60)
    w.open_gate("drain")
    w.open_gate("drain-all")
    w.check_everything(job)
    w.cluster.tool("resume", node)
    w.check_everything(all_nodes)


def test_node_dies(w):
    """NODE_FAIL: another attempt, away from that node, and events name it."""
    job = start_running(w, "node")
    node = scheduler_jobs(w, job)[0][4]
    w.cluster.tool("kill", "node", node)
    w.wait_points(job, attempt=2, seconds=120)
    assert scheduler_jobs(w, job, 2)[0][4] != node
    w.open_gate("node")
    end = w.check_everything(job, attempts=2, words=("node", f"away from {node}"))
    assert list(end.attempts[0].bad_nodes) == [node] and end.attempts[0].failure == jobs_pb2.FAILURE_CLASS_INFRA


def test_preempted(w):
    """Taken off the nodes by a job in `high`: again, from the budget of preemption only."""
    spec = w.program("preempted", nodes=3, exclusive=True)
    spec.resources.partition = "low"
    job = w.submit(spec)
    w.wait_points(job)
    w.cluster.slurm("sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3", user="bob")
    w.wait_points(job, attempt=2, seconds=120)
    w.open_gate("preempted")
    end = w.check_everything(job, attempts=2, words=("took the nodes",))
    assert end.attempts[0].failure == jobs_pb2.FAILURE_CLASS_PREEMPTED


@pytest.mark.slow
def test_out_of_memory(w):
    """More memory than asked for: said so, and not tried again blindly."""
    tail = "python3 -c 'x = bytearray(600 << 20); import time; time.sleep(100)'"
    job = w.submit(w.program("memory", tail=tail, memory_mib_per_node=100))
    w.open_gate("memory")
    end = w.wait_final(job, seconds=120)
    w.check_everything(job, state="FAILED", words=("memory",))
    assert end.attempt == 1


def test_refused_in_its_own_words(w):
    """What sbatch says reaches the user as it was said, at once."""
    spec = w.program("refused")
    spec.resources.constraint = "nonesuch"
    job = w.submit(spec)
    w.check_everything(job, state="FAILED", words=("invalid feature specification",))
    assert not scheduler_jobs(w, job)


def test_cancel_wins_over_retry_and_a_result_over_cancel(w):
    job = start_running(w, "cancel-race")
    with w.cluster.frozen("slurmctld"):
        w.jobs.CancelJob(jobs_pb2.CancelJobRequest(job=job))
        w.open_gate("cancel-race")
        wait_for("the program to end", lambda: not w.ranks(job), 30)
    end = w.wait_final(job, seconds=120)
    assert harness.state_name(end.state) in ("SUCCEEDED", "CANCELLED")
    w.check_everything(job, state=harness.state_name(end.state), output=False,
                       words=("its result stands",) if end.state == jobs_pb2.JOB_STATE_SUCCEEDED else ("cancelled",))


# -- the wall limit -------------------------------------------------------------------------------------------------
COUNT_ON = """
[ -z "$ITWIN_RESUME" ] || cp "$ITWIN_RESUME/count" "$ITWIN_CHECKPOINTS/count"
count=$(cat "$ITWIN_CHECKPOINTS/count" 2>/dev/null || echo 0)
until [ "$count" -ge GOAL ]; do
  count=$((count+1)); printf '{"step":%d,"metrics":{"count":%d}}\\n' $count $count >>"$ITWIN_METRICS"
  echo $count >"$ITWIN_CHECKPOINTS/count.tmp"; mv "$ITWIN_CHECKPOINTS/count.tmp" "$ITWIN_CHECKPOINTS/count"
  [ $((count % SHARE)) -ne 0 ] || [ "$count" -ge GOAL ] || exit 85
done
head -c 1000 /dev/zero | tr '\\0' x >"$ITWIN_OUTPUTS/model.bin"
"""


def test_a_command_that_exits_85_goes_on_from_its_checkpoint(w):
    """Ten attempts, each from the checkpoint of the one before, to the end."""
    job = w.submit(w.shell(COUNT_ON.replace("GOAL", "100").replace("SHARE", "10"), memory_mib_per_node=64))
    w.check_everything(job, attempts=10, words=("goes on from its checkpoint",))
    steps = sorted(step for points in w.points(job).values() for _, step, _ in points)
    assert steps == list(range(1, 101)), "every step once over all attempts"


def test_a_chain_that_does_not_move_stops(w):
    job = w.submit(w.shell("exit 85", memory_mib_per_node=64))
    end = w.check_everything(job, state="FAILED", attempts=2, words=("two attempts in a row made no progress",))
    assert end.failure == jobs_pb2.FAILURE_CLASS_LIMIT


@pytest.mark.slow
def test_the_time_limit_without_a_checkpoint(w):
    """TIMEOUT after a minute and a bit: said so, with what to do."""
    spec = w.limited(w.program("limit"), 60)
    spec.resources.partition = "short"
    job = w.submit(spec)
    end = w.check_everything(job, state="FAILED", words=("time limit", "no checkpoint", "resources.time"))
    assert end.failure == jobs_pb2.FAILURE_CLASS_LIMIT


@pytest.mark.slow
def test_a_training_of_ten_limits_ends_as_one_long_run_does(w):
    """The same final weights, bit for bit, whether a training ran at once or in a chain of attempts."""
    def run(spec, seconds):
        job = w.submit(spec)
        end = w.wait_final(job, seconds=seconds)
        assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED, w.said(job)
        return job, end

    def took(end):
        return (end.attempts[0].ended_us - end.attempts[0].started_us) / 1e6

    # As many steps as this machine makes in 170 s now, under a limit of a tenth of what they took.
    probes = [took(run(training(steps), 300)[1]) for steps in (100, 2100)]
    steps = int(170 * 2000 / max(1, probes[1] - probes[0]))
    long_run, end = run(training(steps), 900)
    # Of each limit some 7 s are kept in hand for the save, and the start takes 2 or 3: more than ten attempts.
    chain, chained = run(w.limited(training(steps), max(15, int(took(end) / 10))), 3000)
    assert chained.attempt >= 10, f"{chained.attempt} attempts are no chain of ten limits"
    w.check_exactly_once(chain)
    assert weights(w, chain) == weights(w, long_run)


def training(steps):
    spec = harness.spec_pb2.JobSpec(name="chain")
    spec.train.model.builtin = "mlp"
    spec.train.model.options.update({"hidden": [512, 512]})
    spec.train.data.synthetic.samples = 8192
    spec.train.data.synthetic.input_shape.append(256)
    spec.train.data.synthetic.target_shape.append(16)
    spec.train.loss = "mse"
    spec.train.optimizer.adam.lr = 1e-3
    spec.train.batch = 64
    spec.train.epochs = 100000
    spec.train.steps = steps
    spec.resources.memory_mib_per_node = 1024
    spec.resources.cpus_per_rank = 1
    return spec


def weights(w, job):
    """The hash of the final weights, by the result record of the newest attempt."""
    directory = w.attempt_directory(job, w.job(job).attempt)
    return json.loads((directory / "result.json").read_text())["info"]["weights_sha256"]
