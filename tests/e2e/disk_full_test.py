"""A full disk under the gateway and under the spool: said clearly, nothing half-done, and all goes on once there is room."""
import os
import pathlib
import subprocess

import grpc
import pytest
from harness import World, jobs_pb2, wait_for


def mount_small(path, size):
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "itwin-test", path], capture_output=True)
    if done.returncode != 0:
        pytest.skip("this machine does not let the test mount a small file system: " + done.stderr.decode())


def fill(path):
    ballast = path / "ballast"
    with open(ballast, "wb", buffering=0) as out:
        try:
            while True:
                out.write(b"x" * 65536)
        except OSError:
            pass
    return ballast


@pytest.fixture
def small_world():
    mounts = []
    worlds = []

    def make(where):
        w = World()
        worlds.append(w)
        path = w.data if where == "gateway" else w.site_root
        if where == "gateway":
            keep = subprocess.run(["cp", "-a", w.data, w.directory / "copy"], check=True)
            assert keep.returncode == 0
            mount_small(path, "96m")
            mounts.append(path)
            subprocess.run(f"cp -a {w.directory}/copy/. {path}/", shell=True, check=True)
            mount_small(w.site_root, "64m")  # so that only the gateway's own disk fills up
            mounts.append(w.site_root)
        else:
            mount_small(path, "64m")
            mounts.append(path)
        os.chmod(path, 0o700)
        return w.start().ready_site(), path

    yield make
    for w in worlds:
        for path in mounts:
            for ballast in pathlib.Path(path).glob("ballast"):
                ballast.unlink()
        w.close()
    for path in reversed(mounts):
        subprocess.run(["umount", "-l", path])
    for w in worlds:
        subprocess.run(["rm", "-rf", w.directory])


def test_gateway_disk_full(small_world):
    w, path = small_world("gateway")
    first = w.submit(w.shell("true"))
    assert w.wait_final(first).state == jobs_pb2.JOB_STATE_SUCCEEDED
    ballast = fill(path)
    with pytest.raises(grpc.RpcError) as error:
        w.upload(os.urandom(4 << 20))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    refused = None
    for number in range(200):  # the write-ahead log may have room for some
        try:
            w.submit(w.shell("true", name=f"n{number}" + "x" * 100), f"request-{number}")
        except grpc.RpcError as problem:
            refused = problem, number
            break
    assert refused and refused[0].code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    assert w.job(first).id == first  # reading goes on
    ballast.unlink()
    retried = wait_for("room to be used again", lambda: try_submit(w, f"request-{refused[1]}", refused[1]), 30)
    assert w.wait_final(retried).state == jobs_pb2.JOB_STATE_SUCCEEDED
    jobs = w.jobs.ListJobs(jobs_pb2.ListJobsRequest(page_size=1000)).jobs
    assert len({j.id for j in jobs}) == len(jobs) == refused[1] + 2
    for job in jobs:
        assert w.wait_final(job.id).state == jobs_pb2.JOB_STATE_SUCCEEDED
        w.check_exactly_once(job.id)


def try_submit(w, request, number):
    try:
        return w.submit(w.shell("true", name=f"n{number}" + "x" * 100), request)
    except grpc.RpcError:
        return None


def test_spool_disk_full(small_world):
    w, path = small_world("spool")
    ballast = fill(path)
    job = w.submit(w.shell("true", inputs={"data.bin": os.urandom(2 << 20)}))
    wait_for("the reason to be told", lambda: any(
        word in w.job(job).reason.lower() for word in ("space", "disk", "full")), 60)
    assert w.state(job) not in ("SUCCEEDED", "FAILED", "CANCELLED")
    ballast.unlink()
    assert w.wait_final(job).state == jobs_pb2.JOB_STATE_SUCCEEDED
    w.check_exactly_once(job)


def test_a_program_that_fills_the_spool(small_world):
    w, path = small_world("spool")
    job = w.submit(w.shell('head -c 200M /dev/zero >"$ITWIN_OUTPUTS/big" || { echo no room >&2; exit 4; }'))
    end = w.wait_final(job)
    assert end.state == jobs_pb2.JOB_STATE_FAILED
    assert end.failure == jobs_pb2.FAILURE_CLASS_RESOURCE, end
