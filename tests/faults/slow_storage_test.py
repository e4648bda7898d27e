"""The spool lies on storage that is slow, or that does not answer at all for a while: a file system in user space (slow_storage.c)
between the nodes and the disk."""
import contextlib
import os
import pathlib
import shutil
import subprocess
import time

import pytest
from world import wait_for

MOUNT = pathlib.Path(f"/var/tmp/itwin-slow-{os.getpid()}")
CLUSTER = ("--nodes", "1", "--bind", str(MOUNT))
WORLD = {"root": MOUNT / "spools" / "alpha"}


class Storage:
    def __init__(self, directory):
        self.control = directory / "delay"
        self.control.write_text("0")
        root = directory / "disk"
        (root / "spools").mkdir(parents=True)
        (root / "spools").chmod(0o1777)
        program = directory / "slow_storage"
        flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=True).stdout.split()
        subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, pathlib.Path(__file__).parent / "slow_storage.c", *flags],
                       check=True)
        MOUNT.mkdir()
        # Many threads, for each call that hangs holds one.
        self.process = subprocess.Popen([program, root, self.control, MOUNT, "-f", "-o",
                                         "allow_other,default_permissions,max_threads=200"], stderr=subprocess.DEVNULL)
        wait_for("the storage to be mounted", lambda: os.path.ismount(MOUNT) and (MOUNT / "spools").exists(), 10)

    @contextlib.contextmanager
    def delayed(self, milliseconds):
        self.control.write_text(str(milliseconds))
        try:
            yield
        finally:
            self.control.write_text("0")

    @contextlib.contextmanager
    def hanging(self):
        self.control.write_text("hang")
        try:
            yield
        finally:
            self.control.write_text("0")

    def close(self):
        self.control.write_text("0")
        subprocess.run(["umount", "-l", MOUNT], check=False)
        self.process.kill()  # whoever still waits for it gets an error
        self.process.wait()
        MOUNT.rmdir()


@pytest.fixture(scope="module", autouse=True)
def storage(tmp_path_factory):
    """Before the cluster, so that its nodes see it."""
    if not os.path.exists("/dev/fuse") or shutil.which("pkg-config") is None \
            or subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode != 0:
        pytest.skip("needs /dev/fuse and the packages libfuse3-dev and pkg-config")
    one = Storage(tmp_path_factory.mktemp("slow"))
    yield one
    one.close()


def seconds_to_write():
    started = time.monotonic()
    path = MOUNT / "spools" / "probe"
    with open(path, "wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    return time.monotonic() - started


def wait_for_silence(w, job, seconds):
    """Until no point has come for so long."""
    last = {"count": -1, "since": 0.0}

    def silent():
        count = len(w.points(job)[1])
        if count != last["count"]:
            last.update(count=count, since=time.monotonic())
        return time.monotonic() - last["since"] > seconds

    wait_for("silence", silent, seconds + 60, interval=0.5)


def test_every_call_takes_a_tenth_of_a_second(w, storage):
    """A file system at the end of its strength: slower, and nothing else."""
    with storage.delayed(100):
        assert seconds_to_write() >= 0.4, "it is not slow: create, write, fsync and unlink each wait"
        job = w.submit(w.program("slow", inputs={"data.bin": os.urandom(100_000)}))
        w.wait_points(job, seconds=120)
        w.open_gate("slow")
        end = w.check_everything(job)
    assert len(w.cluster.jobs_named(w.key(job))) <= 1
    assert end.attempts[0].ended_us > end.attempts[0].started_us


def test_it_hangs_while_a_job_is_handed_over(w, storage):
    """The agent cannot even write the request down: doubt, said so; then it is asked again, and there is one start."""
    with storage.hanging():
        job = w.submit(w.program("handed-over"))
        w.open_gate("handed-over")
        wait_for("the job to be in doubt", lambda: w.state(job) == "SUBMIT_UNKNOWN", 60)
        wait_for(f"somebody to say why ({w.said(job)}; {w.site().reason})", lambda: "file system" in w.said(job), 60)
        assert not w.cluster.jobs_named(job)
    w.check_everything(job, words=("file system", "asking again"))
    assert len(w.cluster.jobs_named(w.key(job))) <= 1


def test_it_hangs_while_a_job_runs(w, storage):
    """Nothing can be read or written for a while: nothing is concluded from that, and every point is there once."""
    job = w.submit(w.program("hangs"))
    w.wait_points(job)
    with storage.hanging():
        wait_for_silence(w, job, 30)
        assert w.state(job) == "RUNNING"
        before = len(w.points(job)[1])
    wait_for("new points", lambda: len(w.points(job)[1]) > before + 20, 120)
    w.open_gate("hangs")
    w.check_everything(job)
    assert len(w.cluster.jobs_named(w.key(job))) <= 1
