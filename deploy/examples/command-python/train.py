#!/usr/bin/env python3
"""A training program of its own kind, as a job: a small neural network in plain Python that tells two moons apart.

What makes it a good job are the few lines marked CONTRACT: it reports points and progress, saves when it is asked to or when the
wall limit comes near, goes on from what it saved (with the same result as an uninterrupted run), and leaves its model where it is
collected. Without the ITWIN_ variables it runs just as well, in the current directory.
"""
import argparse
import json
import math
import os
import pathlib
import random
import shutil
import sys
import time

HIDDEN = 12
SAVE_MARGIN_SECONDS = 20  # before the wall limit

# CONTRACT: where things go.
METRICS = os.environ.get("ITWIN_METRICS", "metrics.jsonl")
OUTPUTS = pathlib.Path(os.environ.get("ITWIN_OUTPUTS", "outputs"))
CHECKPOINTS = pathlib.Path(os.environ.get("ITWIN_CHECKPOINTS", "checkpoints"))
RESUME = os.environ.get("ITWIN_RESUME", "")
STOP = os.environ.get("ITWIN_STOP", "stop")
DEADLINE = float(os.environ.get("ITWIN_DEADLINE") or "inf")
SAVED_CONTINUE_ME = 85


def report(metrics_file, step, metrics, **progress):
    """CONTRACT: one line, flushed at once; a line counts when its newline is there."""
    line = {"t": time.time(), "step": step, "metrics": metrics, "progress": {"step": step, **progress}}
    metrics_file.write(json.dumps(line) + "\n")
    metrics_file.flush()


def save(state, epoch):
    """CONTRACT: a checkpoint is a directory step-<n>; its manifest.json, written last, says that it is whole."""
    target = CHECKPOINTS / f"step-{epoch}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name, content in (("state.json", state), ("manifest.json", {"format": 1, "step": epoch, "files": ["state.json"]})):
        with open(target / f"{name}.partial", "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(target / f"{name}.partial", target / name)


def newest_checkpoint(directory):
    """The state to go on from, or None."""
    whole = [path.parent for path in pathlib.Path(directory).glob("step-*/manifest.json")] if directory else []
    if not whole:
        return None
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]))
    return json.loads((newest / "state.json").read_text())


def moons(dice, count):
    """Points of two interleaved half circles, with their class."""
    samples = []
    for i in range(count):
        kind, angle = i % 2, dice.random() * math.pi
        x, y = math.cos(angle), math.sin(angle)
        if kind:
            x, y = 1 - x, 0.5 - y
        samples.append((x + dice.gauss(0, 0.1), y + dice.gauss(0, 0.1), kind))
    return samples


def forward(w, x, y):
    hidden = [math.tanh(a * x + b * y + c) for a, b, c in w["hidden"]]
    score = sum(v * h for v, h in zip(w["out"], hidden)) + w["bias"]
    return hidden, 1 / (1 + math.exp(-max(-60.0, min(60.0, score))))


def train_epoch(w, samples, rate):
    """One pass of stochastic gradient descent; returns the mean cross entropy."""
    total = 0.0
    for x, y, kind in samples:
        hidden, p = forward(w, x, y)
        total -= math.log(max(1e-12, p if kind else 1 - p))
        error = p - kind
        for j, h in enumerate(hidden):
            back = error * w["out"][j] * (1 - h * h)
            w["out"][j] -= rate * error * h
            a, b, c = w["hidden"][j]
            w["hidden"][j] = [a - rate * back * x, b - rate * back * y, c - rate * back]
        w["bias"] -= rate * error
    return total / len(samples)


def accuracy(w, samples):
    return sum((forward(w, x, y)[1] > 0.5) == bool(kind) for x, y, kind in samples) / len(samples)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--epochs", type=int, default=60)
    arguments.add_argument("--rate", type=float, default=0.05)
    options = arguments.parse_args()

    dice = random.Random(1)
    training, test = moons(dice, 600), moons(dice, 300)
    state = newest_checkpoint(RESUME)
    if state is None:
        state = {"epoch": 0, "weights": {"hidden": [[dice.gauss(0, 1) for _ in range(3)] for _ in range(HIDDEN)],
                                         "out": [dice.gauss(0, 0.3) for _ in range(HIDDEN)], "bias": 0.0}}
    else:
        print(f"going on after epoch {state['epoch']}", flush=True)
    weights = state["weights"]
    OUTPUTS.mkdir(parents=True, exist_ok=True)

    with open(METRICS, "a") as metrics_file:
        while state["epoch"] < options.epochs:
            if os.path.exists(STOP) or time.time() > DEADLINE - SAVE_MARGIN_SECONDS:
                save(state, state["epoch"])
                print(f"saved after epoch {state['epoch']}", flush=True)
                return SAVED_CONTINUE_ME
            started = time.time()
            order = training[:]
            random.Random(state["epoch"]).shuffle(order)  # of the epoch alone, so that a resumed run is the same run
            loss = train_epoch(weights, order, options.rate)
            if not math.isfinite(loss + weights["bias"]):
                print(f"the weights are no longer finite in epoch {state['epoch'] + 1}; lower --rate", file=sys.stderr)
                return 3
            state["epoch"] += 1
            seconds = time.time() - started
            report(metrics_file, state["epoch"], {"train/loss": loss, "test/accuracy": accuracy(weights, test)},
                   steps=options.epochs, epoch=state["epoch"], epochs=options.epochs,
                   samples_per_second=len(training) / max(seconds, 1e-9),
                   seconds_left=seconds * (options.epochs - state["epoch"]))
            if state["epoch"] % 20 == 0:
                save(state, state["epoch"])
    with open(OUTPUTS / "model.json", "w") as file:
        json.dump(weights, file)
    print(f"test accuracy {accuracy(weights, test):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
