"""The programs under deploy/examples that show the open worker contract, run alone with its variables."""

import json
import os
import pathlib
import subprocess

import pytest

from conftest import wait_until

EXAMPLES = pathlib.Path(__file__).parents[2] / "deploy" / "examples"
CASES = {
    "python": (["/usr/bin/python3", EXAMPLES / "command-python" / "train.py", "--epochs", "50"], "model.json", 50),
    "shell": (["sh", EXAMPLES / "command-shell" / "train.sh", "40"], "pi.txt", 40),
}


class Spool:
    """The variables of one attempt, in a directory of its own."""

    def __init__(self, directory, resume=None):
        self.directory = directory
        for name in ("outputs", "checkpoints", "work"):
            (directory / name).mkdir(parents=True)
        self.environment = {**os.environ, "ITWIN_METRICS": str(directory / "metrics.jsonl"),
                            "ITWIN_OUTPUTS": str(directory / "outputs"), "ITWIN_CHECKPOINTS": str(directory / "checkpoints"),
                            "ITWIN_STOP": str(directory / "stop"), "ITWIN_DEADLINE": "",
                            "ITWIN_RESUME": "" if resume is None else str(resume.directory / "checkpoints")}

    def start(self, argv):
        return subprocess.Popen(argv, cwd=self.directory / "work", env=self.environment)

    def lines(self):
        path = self.directory / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("name", CASES)
def test_stops_when_asked_and_goes_on_to_the_same_end(tmp_path, name):
    argv, output, steps = CASES[name]
    whole = Spool(tmp_path / "whole")
    assert whole.start(argv).wait(60) == 0
    assert [line["step"] for line in whole.lines()] == list(range(1, steps + 1))
    assert whole.lines()[-1]["progress"]["step"] == whole.lines()[-1]["progress"]["steps"] == steps

    first = Spool(tmp_path / "first")
    process = first.start(argv)
    wait_until(lambda: len(first.lines()) >= 3, what="three reports")
    (first.directory / "stop").touch()
    assert process.wait(60) == 85
    assert list((first.directory / "checkpoints").glob("step-*/manifest.json"))
    reported = len(first.lines())
    assert 3 <= reported < steps

    second = Spool(tmp_path / "second", resume=first)
    assert second.start(argv).wait(60) == 0
    assert [line["step"] for line in second.lines()] == list(range(reported + 1, steps + 1))
    assert second.lines()[-1]["metrics"] == whole.lines()[-1]["metrics"]
    assert (second.directory / "outputs" / output).read_bytes() == (whole.directory / "outputs" / output).read_bytes()


def test_the_python_example_saves_before_the_wall_limit_and_learns(tmp_path):
    argv, _, _ = CASES["python"]
    spool = Spool(tmp_path / "late")
    spool.environment["ITWIN_DEADLINE"] = "1000"
    assert spool.start(argv).wait(60) == 85 and not spool.lines()
    again = Spool(tmp_path / "again", resume=spool)
    assert again.start(argv).wait(60) == 0
    assert again.lines()[-1]["metrics"]["test/accuracy"] > 0.95


def test_a_bad_rate_fails_with_a_sentence(tmp_path):
    argv, _, _ = CASES["python"]
    spool = Spool(tmp_path / "bad")
    process = subprocess.run([*argv, "--rate", "nan"], cwd=spool.directory, env=spool.environment, capture_output=True, text=True,
                             timeout=60)
    assert process.returncode == 3 and "lower --rate" in process.stderr
