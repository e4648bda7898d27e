"""Many jobs, a random fault every few seconds, and then the same checks over all of them.

Run by deploy/soak.sh. The seed decides which jobs there are and which faults come in which order; when exactly they meet is
the machine's. Prints one line per fault as it happens, a table at the end, and ends with 0 only if everything held.
"""
import argparse
import collections
import contextlib
import datetime
import json
import os
import random
import signal
import sys
import time
import traceback

from cluster import Cluster, missing
from world import World, harness, jobs_pb2, state_name, wait_for

CLUSTER = ("--nodes", "3", "--cpus", "16", "--login2", "--slurmd-timeout", "10", "--min-job-age", "20")

# Each prints a hundred points, some over several seconds, and ends as its kind says.
HEAD = """
exec {never}<> <(:)
nap() { read -rt "$1" -u $never || :; }
for step in $(seq 100); do
  printf '{"step":%d,"metrics":{"a":0.%04d,"b":%d}}\\n' $step $step $((step*step)) >>"$ITWIN_METRICS"
  nap PAUSE
done
"""
KINDS = {
    "ends": 'echo x >"$ITWIN_OUTPUTS/model.bin"',
    "fails": "echo bad luck >&2; exit 7",
    "saves": '[ -n "$ITWIN_RESUME" ] || { echo 1 >"$ITWIN_CHECKPOINTS/state"; exit 85; }; echo x >"$ITWIN_OUTPUTS/model.bin"',
    "cancelled": "nap 600",
}


class Soak:
    def __init__(self, world, options):
        self.w = world
        self.cluster = world.cluster
        self.options = options
        self.random = random.Random(options.seed)
        self.jobs = {}  # id -> kind
        self.faults = collections.Counter()
        self.failed_faults = []
        self.started = time.monotonic()

    def say(self, text):
        print(f"{time.monotonic() - self.started:7.1f} s  {text}", flush=True)

    # -- jobs -------------------------------------------------------------------------------------------------
    def submit_some(self, count):
        for _ in range(count):
            kind = self.random.choices(list(KINDS), weights=(70, 10, 12, 8))[0]
            pause = self.random.choice(("0.01", "0.05", "0.1"))
            spec = self.w.shell(HEAD.replace("PAUSE", pause) + KINDS[kind], name=kind, memory_mib_per_node=16)
            request = f"soak-{self.options.seed}-{len(self.jobs)}"

            def submitted(spec=spec, request=request):
                # As a client does: the same request id until there is an answer.
                with contextlib.suppress(harness.grpc.RpcError):
                    return self.w.submit(spec, request_id=request)
                return None

            self.jobs[wait_for("a submission", submitted, 60, interval=0.2)] = kind

    def cancel_those(self):
        for job, kind in self.jobs.items():
            if kind == "cancelled":
                with contextlib.suppress(harness.grpc.RpcError):
                    self.w.jobs.CancelJob(jobs_pb2.CancelJobRequest(job=job), timeout=10)

    # -- faults: each breaks something and, where it does not heal by itself, heals it after a moment -----------------
    def for_a_moment(self, most=4.0):
        time.sleep(self.random.uniform(0.3, most))  # the length of a fault, not a wait for anything

    def kill_gateway(self):
        self.w.kill_gateway()
        self.for_a_moment(2)
        self.w.start()

    def kill_agent(self):
        self.w.signal_all(self.w.agents(), signal.SIGKILL)

    def kill_sessions(self):
        self.cluster.tool("kill", "sessions", "login")

    def kill_sshd(self):
        self.cluster.tool("kill", "sshd", "login")
        self.for_a_moment()
        self.cluster.tool("start", "sshd", "login")

    def kill_a_script(self):
        running = [job for job in self.jobs if self.w.supervisors(job)]
        if running:
            self.w.signal_all(self.w.supervisors(self.random.choice(running)), signal.SIGKILL)

    def freeze_controller(self):
        with self.cluster.frozen("slurmctld"):
            self.for_a_moment(8)

    def restart_controller(self):
        self.cluster.tool("kill", "slurmctld")
        self.for_a_moment()
        self.cluster.tool("start", "slurmctld")

    def stop_munge(self):
        self.cluster.tool("kill", "munge", "login")
        self.for_a_moment()
        self.cluster.tool("start", "munge", "login")

    def cut_link(self):
        self.cluster.wan("cut")
        self.for_a_moment()
        self.cluster.wan("restore")

    def half_open_link(self):
        self.cluster.wan("half-open")
        self.for_a_moment(8)
        self.cluster.wan("restore")

    def flap_link(self):
        self.cluster.wan("flap", "500ms", "300ms", "4")

    def slow_link(self):
        self.cluster.wan("delay", "200ms")
        self.for_a_moment()
        self.cluster.wan("restore")

    def kill_node(self):
        name = f"n{self.random.randint(1, 3)}"
        self.cluster.tool("kill", "node", name)
        self.for_a_moment()
        self.cluster.tool("start", "node", name)

    def drain_node(self):
        name = f"n{self.random.randint(1, 3)}"
        self.cluster.tool("drain", name)
        self.for_a_moment()
        self.cluster.tool("resume", name)

    def admin_cancels(self):
        mine = [row for row in self.cluster.queue() if row[3] == "ada" and row[2] in ("RUNNING", "PENDING")]
        if mine:
            self.cluster.slurm("scancel", self.random.choice(mine)[0], check=False)

    def hold_and_release(self):
        pending = [row for row in self.cluster.queue() if row[3] == "ada" and row[2] == "PENDING"]
        if pending:
            number = self.random.choice(pending)[0]
            self.cluster.slurm("scontrol", "hold", number, check=False)
            self.for_a_moment()
            self.cluster.slurm("scontrol", "release", number, check=False)

    FAULTS = (kill_gateway, kill_agent, kill_sessions, kill_sshd, kill_a_script, freeze_controller, restart_controller,
              stop_munge, cut_link, half_open_link, flap_link, slow_link, kill_node, drain_node, admin_cancels,
              hold_and_release)

    # -- the run ----------------------------------------------------------------------------------------------
    def run(self):
        end = self.started + self.options.minutes * 60
        batch = max(1, self.options.jobs // 20)
        while time.monotonic() < end:
            if len(self.jobs) < self.options.jobs:
                self.submit_some(min(batch, self.options.jobs - len(self.jobs)))
                self.cancel_those()
            fault = self.random.choice(self.FAULTS)
            self.say(f"{fault.__name__.replace('_', ' ')}  ({len(self.jobs)} jobs)")
            self.faults[fault.__name__] += 1
            try:
                fault(self)
            except AssertionError as error:  # the tool could not do it now: not a verdict about us
                self.failed_faults.append(f"{fault.__name__}: {str(error)[:200]}")
            time.sleep(self.random.uniform(0.5, 4))
        self.say("all is healed; the jobs come to their ends")
        self.cluster.heal()
        if self.w.process.poll() is not None:
            self.w.start()
        self.submit_some(max(0, self.options.jobs - len(self.jobs)))
        self.cancel_those()

    # What may become of a job, whatever happened to it. An administrator's scancel and a killed node are ends that the job
    # itself cannot help; how often it may be started again is a budget.
    ALLOWED = {
        "ends": {"SUCCEEDED", "FAILED"},
        "fails": {"FAILED"},
        "saves": {"SUCCEEDED", "FAILED"},
        "cancelled": {"CANCELLED", "FAILED"},
    }
    EXCUSES = ("cancelled it at the site", "was started again 3 times", "SIGKILL")

    def check(self):
        wrong, ends, attempts = {}, collections.Counter(), 0
        deadline = time.monotonic() + 900
        for job, kind in self.jobs.items():
            try:
                now = self.w.wait_final(job, seconds=max(1, deadline - time.monotonic()))
                state = state_name(now.state)
                ends[kind, state] += 1
                attempts += now.attempt
                assert state in self.ALLOWED[kind], f"a job that {kind} became {state}: {now.reason}"
                if state == "FAILED" and kind != "fails":
                    assert any(words in now.reason for words in self.EXCUSES), f"a job that {kind} failed: {now.reason}"
                if state == "FAILED" and kind == "fails":
                    assert "exit code 7" in now.reason or any(words in now.reason for words in self.EXCUSES), now.reason
                assert now.reason, "it says nothing"
                self.w.check_everything(job, state=state, attempts=None, output=False)
            except AssertionError as error:
                wrong[job] = f"{kind}: {error}"
            except Exception:  # pylint: disable=broad-except
                wrong[job] = traceback.format_exc()
        names = collections.Counter(row[1] for row in self.cluster.queue() if row[1].startswith("itwin-"))
        for name, count in names.items():
            if count > 1:
                wrong[name] = f"{count} SLURM jobs with one name"
        return wrong, ends, attempts


def table(rows):
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def main():
    parser = argparse.ArgumentParser(prog="deploy/soak.sh")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 31)
    if missing():
        print(f"soak: {missing()}", file=sys.stderr)
        return 2
    print(f"seed {options.seed}: {options.jobs} jobs, {options.minutes:g} minutes of faults", flush=True)
    cluster = Cluster(*CLUSTER)
    world = None
    try:
        world = World(cluster.up()).start().ready_site()
        soak = Soak(world, options)
        soak.run()
        wrong, ends, attempts = soak.check()
        if wrong:
            print("gateway log:\n", world.gateway_log()[-20000:])
            for log in world.site_root.glob("agent*.log"):
                print(f"{log}:\n", log.read_text(errors="replace")[-10000:])
            for job, why in wrong.items():
                print(f"WRONG {job}: {why}")
        print(f"\nsoak of {datetime.date.today()}, seed {options.seed}")
        table([("jobs", len(soak.jobs)), ("attempts", attempts)] +
              [(f"  {kind} -> {state}", count) for (kind, state), count in sorted(ends.items())] +
              [("faults", sum(soak.faults.values()))] +
              [(f"  {name.replace('_', ' ')}", count) for name, count in sorted(soak.faults.items())] +
              [("faults that could not be made", len(soak.failed_faults)), ("jobs that are wrong", len(wrong)),
               ("seconds", int(time.monotonic() - soak.started))])
        for text in soak.failed_faults:
            print(f"    {text}")
        print(json.dumps({"seed": options.seed, "jobs": len(soak.jobs), "attempts": attempts,
                          "faults": sum(soak.faults.values()), "wrong": len(wrong)}))
        return 1 if wrong else 0
    finally:
        if world:
            world.close()
        cluster.close()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
