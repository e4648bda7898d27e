#!/usr/bin/python3
"""Times on a real SLURM cluster on this machine, each beside the same thing done by hand. Needs root; run by deploy/bench.sh cluster.

  cluster:start    SubmitJob to the first line of the user's program, against `ssh login sbatch` over an open connection
  cluster:events   a state change on the compute node to its event at the client
  cluster:calls    calls to SLURM's controller per minute with 0, 10 and 100 live jobs
  cluster:cut      a cut and a silent link: how long until it is noticed, how long until points come again
"""
import json
import pathlib
import re
import statistics
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "faults"))
from cluster import Cluster, missing  # noqa: E402
from figures import figure  # noqa: E402
from world import World, jobs_pb2, sites_pb2, wait_for  # noqa: E402

TURNS = 30
STAMP = "date +%s.%N"


def quantile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def stamp_of(path):
    """The time that a program wrote as its first line."""
    return float(wait_for(f"the first line in {path}", lambda: path.exists() and path.read_text().strip(), 60, interval=0.002))


def measure_start(w):
    """In turns, so that both meet the same machine."""
    w.gates.chmod(0o777)  # the jobs write there
    master = w.directory / "master"
    ssh = ["ssh", "-F", w.cluster.status["ssh_config"], "-o", f"ControlPath={master}"]
    subprocess.run([*ssh, "-M", "-N", "-f", "-o", "ControlPersist=yes", "login"], check=True, stdin=subprocess.DEVNULL)
    ours, by_hand = [], []
    try:
        for turn in range(TURNS):
            path = w.gates / f"hand{turn}"
            begun = time.time()
            subprocess.run([*ssh, "login", f"sbatch -n1 --mem=16 -o {path} --wrap '{STAMP}'"], check=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            by_hand.append(stamp_of(path) - begun)
            path = w.gates / f"ours{turn}"
            spec = w.shell(f"{STAMP} >{path}", memory_mib_per_node=16)
            begun = time.time()
            job = w.submit(spec)
            ours.append(stamp_of(path) - begun)
            w.wait_final(job)
            wait_for("an idle cluster", lambda: not any(row[2] in ("RUNNING", "COMPLETING", "PENDING")
                                                        for row in w.cluster.queue()), 60)
    finally:
        subprocess.run([*ssh, "-O", "exit", "login"], check=False, stderr=subprocess.DEVNULL)
    figure("cluster/submit_to_first_line_p50", statistics.median(ours) * 1e3, "ms", statistics.median(by_hand) * 1e3, runs=TURNS)
    figure("cluster/more_than_by_hand_p50", statistics.median(a - b for a, b in zip(ours, by_hand)) * 1e3, "ms", runs=TURNS)


def measure_events(w):
    """From the records that the script appends on the compute node to the events that a watcher receives."""
    late = []
    for _ in range(TURNS):
        arrived = {}
        job = w.submit(w.shell("exit 0", memory_mib_per_node=16))

        def watch(job=job, arrived=arrived):
            for update in w.jobs.WatchJob(jobs_pb2.WatchJobRequest(job=job), timeout=120):
                for event in update.events:
                    arrived.setdefault(event.kind, time.time())

        watcher = threading.Thread(target=watch)
        watcher.start()
        w.wait_final(job)
        watcher.join()
        lines = (w.attempt_directory(job, 1) / "lifecycle.jsonl").read_text().splitlines()
        happened = {record["event"]: record["t"] for record in map(json.loads, lines)}
        late += [arrived["started"] - happened["started"], arrived["ended"] - happened["exited"]]
    figure("cluster/state_change_to_event_p50", quantile(late, 0.5) * 1e3, "ms", runs=len(late))
    figure("cluster/state_change_to_event_p99", quantile(late, 0.99) * 1e3, "ms", runs=len(late))


def controller_calls(w):
    """All calls of the agent's user that the controller has counted."""
    text = w.cluster.slurm("sdiag")
    user = re.search(rf"{w.user}\s*\(\s*{w.owner[0]}\)\s*count:(\d+)", text)
    by_number = re.search(rf"\(\s*{w.owner[0]}\)\s*count:(\d+)", text)
    found = user or by_number
    return int(found.group(1)) if found else 0


def measure_calls(w):
    for live in (0, 10, 100):
        jobs = [w.submit(w.program("calls", memory_mib_per_node=16)) for _ in range(live)]
        for job in jobs[:10]:
            w.wait_points(job)
        before, begun = controller_calls(w), time.monotonic()
        time.sleep(60)
        calls = (controller_calls(w) - before) / (time.monotonic() - begun) * 60
        figure(f"cluster/controller_calls_per_minute_{live}_jobs", calls, "calls", runs=1)
        w.open_gate("calls")
        for job in jobs:
            w.wait_final(job)
        w.gate("calls").unlink()


def measure_cut(w):
    job = w.submit(w.program("cut"))
    w.wait_points(job)
    for harm in ("cut", "half-open"):
        noticed, recovered = [], []
        for _ in range(5):
            begun = time.monotonic()
            w.cluster.wan(harm)
            wait_for("the gateway to notice", lambda: w.site().state == sites_pb2.SITE_STATE_UNREACHABLE, 60, interval=0.01)
            noticed.append(time.monotonic() - begun)
            before = len(w.points(job)[1])
            begun = time.monotonic()
            w.cluster.wan("restore")
            wait_for("points to come again", lambda before=before: len(w.points(job)[1]) > before, 60, interval=0.01)
            recovered.append(time.monotonic() - begun)
        name = harm.replace("-", "_")
        figure(f"cluster/{name}_noticed_p50", statistics.median(noticed) * 1e3, "ms", runs=5)
        figure(f"cluster/{name}_recovered_p50", statistics.median(recovered) * 1e3, "ms", runs=5)
    w.open_gate("cut")
    w.wait_final(job)


PARTS = {"start": measure_start, "events": measure_events, "calls": measure_calls, "cut": measure_cut}


def main():
    if missing():
        print(f"cluster: left out, {missing()}")
        return 0
    cluster = Cluster("--nodes", "2", "--cpus", "64")
    world = None
    try:
        world = World(cluster.up()).start().ready_site()
        for name in sys.argv[1:] or PARTS:
            PARTS[name](world)
    finally:
        if world:
            world.close()
        cluster.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
