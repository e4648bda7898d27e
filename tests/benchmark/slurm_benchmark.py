#!/usr/bin/python3
"""Figures of the agent on a real SLURM cluster (deploy/testcluster); needs root; run by deploy/bench.sh slurm.

  dispatch   attempts per second through the agent against a plain loop of local `sbatch`, and the ratio (aim 0.8)
  calls      calls of SLURM's commands per minute with 0, 10 and N live attempts (aim: does not grow),
             and CPU of the agent, in per cent of a core, and its memory
  latency    from the end of a program on a compute node to the agent's status, p50 and p99
"""
import argparse
import concurrent.futures
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "e2e"))
from figures import figure  # noqa: E402
from slurm_site import Agent, Cluster, missing, wait_for  # noqa: E402

LOOP = """
import subprocess, sys, time
open("plain.sh", "w").write("#!/bin/sh\\ntrue\\n")
start = time.monotonic()
for i in range(int(sys.argv[1])):
    subprocess.run(["sbatch", "--parsable", "--hold", "-J", f"plain-{i}", "plain.sh"], check=True, stdout=subprocess.DEVNULL)
print(int(sys.argv[1]) / (time.monotonic() - start))
"""
COUNTER = '#!/bin/bash\necho x >> "$ITWIN_COUNTS/{name}"\nexec /usr/bin/{name} "$@"\n'
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacct", "srun")


class Bench:
    def __init__(self, cluster, count):
        self.cluster, self.count = cluster, count
        self.counts = cluster.home() / "counts"
        cluster.run("login", "mkdir", "-p", self.counts)
        for name in COMMANDS:
            path = self.counts / ("bin-" + name)
            path.write_text(COUNTER.format(name=name))
        cluster.run("login", "sh", "-c", f"mkdir -p {self.counts}/bin")
        for name in COMMANDS:
            (self.counts / ("bin-" + name)).rename(self.counts / "bin" / name)
            (self.counts / "bin" / name).chmod(0o755)

    def agent(self, counting):
        flags = [f"ITWIN_COUNTS={self.counts}", f"PATH={self.counts}/bin:/usr/bin:/bin"] if counting else []
        return Agent(self.cluster, environment=flags)

    def calls(self):
        return sum(len(path.read_bytes()) // 2 for path in self.counts.iterdir() if path.is_file())

    def held(self, agent, number):
        requests = [agent.request("true") for _ in range(number)]
        for request in requests:
            request.slurm.options.append("--begin=now+36000")
        return requests

    def start_all(self, agent, requests, threads=16):
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(agent.start, requests))

    def cancel_all(self, agent, requests):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda r: agent.cancel(r.attempt), requests))

    def cpu_seconds(self, agent):
        # As the login node counts: utime and stime of the daemon and of what it has waited for.
        text = self.cluster.run("login", "cat", f"/proc/{agent.pid()}/stat").rsplit(")", 1)[1].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return sum(map(int, text[11:13])) / ticks, sum(map(int, text[13:15])) / ticks

    def dispatch(self):
        plain = []
        ours = []
        for _ in range(3):
            plain.append(float(self.cluster.run("login", "python3", "-c", LOOP, str(self.count), seconds=600)))
            self.cluster.admin("scancel", "-u", "ada")
            agent = self.agent(counting=False)
            try:
                agent.hello()
                agent.start(self.held(agent, 1)[0])  # facts and preflight are there, as at a site in use
                requests = self.held(agent, self.count)
                begin = time.monotonic()
                self.start_all(agent, requests)
                ours.append(self.count / (time.monotonic() - begin))
            finally:
                self.cluster.admin("scancel", "-u", "ada")
                agent.close()
        figure("slurm/dispatch_per_second", statistics.median(ours), "/s", statistics.median(plain), runs=len(ours))

    def calls_and_cpu(self, seconds):
        agent = self.agent(counting=True)
        try:
            agent.hello()
            for number in (0, 10, self.count):
                requests = self.held(agent, number)
                self.start_all(agent, requests)
                if requests:
                    wait_for("all to be known", lambda keys=[r.attempt for r in requests]: all(s.scheduler_state for s in agent.statuses(keys)), 120)
                calm = time.monotonic() + 30  # the interval grows to its longest
                wait_for("calm", lambda at=calm: time.monotonic() > at, 60)
                calls, (own, children), begin = self.calls(), self.cpu_seconds(agent), time.monotonic()
                wait_for("the time", lambda at=begin: time.monotonic() - at >= seconds, seconds + 30)
                passed = time.monotonic() - begin
                after = self.cpu_seconds(agent)
                rss = [line for line in self.cluster.run("login", "cat", f"/proc/{agent.pid()}/status").splitlines() if line.startswith("VmRSS")]
                name = f"slurm/{number}_live"
                figure(f"{name}/calls_per_minute", (self.calls() - calls) * 60 / passed, "calls")
                figure(f"{name}/agent_cpu", (after[0] - own) * 100 / passed, "%")
                figure(f"{name}/commands_cpu", (after[1] - children) * 100 / passed, "%")
                figure(f"{name}/agent_memory", int(rss[0].split()[1]) / 1024, "MiB")
                self.cancel_all(agent, requests)
                for request in requests:
                    agent.ends(request.attempt, seconds=300)
        finally:
            agent.close()

    def latency(self, number=60):
        agent = self.agent(counting=False)
        delays, starts = [], []
        try:
            agent.hello()
            for _ in range(number):
                request = agent.request("true")
                begin = time.time()
                agent.start(request)
                status = agent.ends(request.attempt)
                delays.append(time.time() - status.ended_us / 1e6)
                starts.append(status.started_us / 1e6 - begin)
        finally:
            agent.close()
        delays.sort()
        figure("slurm/end_to_status_p50", delays[len(delays) // 2] * 1e3, "ms", runs=number)
        figure("slurm/end_to_status_p99", delays[int(len(delays) * 0.99)] * 1e3, "ms", runs=number)
        figure("slurm/start_to_program_p50", statistics.median(starts) * 1e3, "ms", runs=number)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="attempts at once (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="how long calls and CPU are watched (default %(default)s)")
    parser.add_argument("what", nargs="*", help="dispatch, calls, latency (default: all)")
    arguments = parser.parse_args()
    if missing():
        print("slurm: left out, " + missing())
        return
    wanted = set(arguments.what or ("dispatch", "calls", "latency"))
    cluster = Cluster("--min-job-age", "300", "--nodes", "3").up()
    try:
        bench = Bench(cluster, arguments.count)
        if "dispatch" in wanted:
            bench.dispatch()
        if "latency" in wanted:
            bench.latency()
        if "calls" in wanted:
            bench.calls_and_cpu(arguments.seconds)
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
