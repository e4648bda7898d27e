#!/usr/bin/python3
"""Collectives and training between nodes with a network between them that limits: nodes of the test cluster whose links send
400 Mbit/s, so that two cores can stand for four nodes. Needs root; run by deploy/bench.sh network.

  network:model    the communicator's collectives against Open MPI's on 2 to 4 nodes; an alpha-beta model of the all-reduce,
                   fitted to 2 nodes, beside what 3 and 4 nodes take, and for up to 512 nodes
  network:train    ddp on 3 and 4 nodes with the communicator's collectives, against Open MPI's (ITWIN_COLLECTIVES=mpi)
"""
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "e2e"))
from figures import figure  # noqa: E402
from testcluster import Cluster, missing  # noqa: E402

ROUNDS = 5
RATE = "400mbit"
PROGRAM = pathlib.Path(os.environ["ITWIN_BIN"]).parent / "benchmark" / "strategies_benchmark"
WORKER = pathlib.Path(os.environ["ITWIN_BIN"]) / "itwin-worker"


def shape(cluster):
    for name, node in cluster.status["nodes"].items():
        if node["kind"] == "compute":
            subprocess.run(["nsenter", "-t", str(node["process_1"]["pid"]), "-n", "tc", "qdisc", "replace", "dev", "eth0", "root",
                            "tbf", "rate", RATE, "burst", "64kb", "latency", "2s"], check=True)


def run(cluster, nodes, *argv, **environment):
    """A rank on each of so many nodes; what rank 0 printed."""
    variables = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **environment}
    return cluster.tool("exec", "--user", "ada", "login", "--", "env", *(f"{k}={v}" for k, v in variables.items()),
                        "srun", "-N", str(nodes), "-n", str(nodes), "--mpi=pmix", *map(str, argv), seconds=600).stdout


class AlphaBeta:
    """Long buffers go round a ring: T(p, S) = 2 (p - 1) alpha + 2 (p - 1) / p S beta. Alpha is what two nodes need to exchange a
    short message, beta follows from long ones between two nodes, {bytes: seconds}, by least squares of relative residuals."""

    def __init__(self, alpha, times):
        self.alpha = alpha
        weights = {size: 1 / seconds ** 2 for size, seconds in times.items()}
        self.beta = (sum(weights[size] * size * (seconds - 2 * alpha) for size, seconds in times.items())
                     / sum(weights[size] * size ** 2 for size in times))

    def predict(self, nodes, size):
        return 2 * (nodes - 1) * self.alpha + 2 * (nodes - 1) / nodes * size * self.beta


def model(cluster):
    times = {}  # (operation, nodes, bytes) -> ([ours], [plain])
    for _ in range(ROUNDS):
        for nodes in (2, 3, 4):
            for line in run(cluster, nodes, PROGRAM, "collectives-rank").splitlines():
                operation, size, ours, plain = line.split()
                pair = times.setdefault((operation, nodes, int(size)), ([], []))
                pair[0].append(float(ours))
                pair[1].append(float(plain))
    largest = max(size for _, _, size in times)
    for (operation, nodes, size), (ours, plain) in sorted(times.items()):
        ratio = statistics.median(b / a for a, b in zip(ours, plain))
        print(f"{operation:15} {nodes} nodes {size:9} B  {statistics.median(ours) * 1e3:9.3f} ms, Open MPI "
              f"{statistics.median(plain) * 1e3:9.3f} ms: {ratio:.2f} times as fast", flush=True)
        if size == largest:
            figure(f"network/{operation.replace('-', '_')}_{size >> 20}mb_{nodes}_nodes", size / statistics.median(ours) / 1e6, "MB/s",
                   size / statistics.median(plain) / 1e6, ROUNDS)
    measured = {nodes: {size: statistics.median(pair[0]) for (operation, n, size), pair in times.items()
                        if operation == "all-reduce" and n == nodes and size >= 1 << 18} for nodes in (2, 3, 4)}
    shortest = min(size for _, _, size in times)
    fitted = AlphaBeta(statistics.median(times["all-reduce", 2, shortest][1]), measured[2])
    print(f"alpha {fitted.alpha * 1e6:.0f} us, 1 / beta {1e-6 / fitted.beta:.1f} MB/s, from {len(measured[2])} sizes on 2 nodes")
    worst = 0.0
    for nodes in (3, 4):
        for size, seconds in measured[nodes].items():
            predicted = fitted.predict(nodes, size)
            worst = max(worst, abs(predicted / seconds - 1))
            figure(f"network/model_{size >> 10}kb_{nodes}_nodes", predicted * 1e3, "ms", seconds * 1e3, ROUNDS)
    for power in range(1, 10):
        predicted = fitted.predict(2 ** power, 32 << 20)
        print(f"{2 ** power:4} nodes, a bucket of 32 MiB: {predicted * 1e3:7.0f} ms, "
              f"{predicted * (1 - worst) * 1e3:.0f} to {predicted * (1 + worst) * 1e3:.0f} with the largest residual above")


def train(cluster):
    home = cluster.home()
    job = {"name": "network", "resources": {"cpus_per_rank": 1}, "train": {
        "model": {"builtin": "mlp", "options": {"hidden": [1024, 1024]}},
        "data": {"synthetic": {"samples": 1536, "input_shape": [256], "classes": 10}},
        "loss": "cross_entropy", "optimizer": {"sgd": {"lr": 1e-3}}, "batch": 384, "epochs": 3, "check_every": 0}}
    (home / "job.json").write_text(json.dumps(job))

    def rate(nodes, collectives):
        spool = home / "spool"
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir()
        os.chmod(spool, 0o777)
        run(cluster, nodes, WORKER, "--spec", home / "job.json", "--spool", spool, ITWIN_COLLECTIVES=collectives)
        lines = [json.loads(line) for line in (spool / "metrics.jsonl").read_text().splitlines()]
        rates = [line["metrics"]["perf/samples_per_second"] for line in lines
                 if "perf/samples_per_second" in line.get("metrics", {})]
        return statistics.median(rates[1:])

    for nodes in (3, 4):
        ours, plain = [], []
        for turn in range(ROUNDS):  # in turns, so that both meet the same machine
            for collectives in ("auto", "mpi") if turn % 2 else ("mpi", "auto"):
                (ours if collectives == "auto" else plain).append(rate(nodes, collectives))
        figure(f"network/ddp_{nodes}_nodes", statistics.median(ours), "samples/s", statistics.median(plain), ROUNDS)


def main():
    wanted = sys.argv[1:]
    parts = {"model": model, "train": train}
    if why := missing():
        print(f"network: not run, as it {why}", file=sys.stderr)
        return
    cluster = Cluster("--nodes", "4")
    try:
        cluster.up()
        shape(cluster)
        for name, part in parts.items():
            if not wanted or name in wanted:
                part(cluster)
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
