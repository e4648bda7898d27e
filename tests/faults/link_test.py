"""The link between gateway and site is cut, slow, silent or flapping; the agent moves to another login node; two gateways
meet; clocks disagree; disks are full."""
import os
import pathlib
import shutil
import signal
import subprocess

import pytest
from world import FINISH, BIN, World, harness, sites_pb2, wait_for

CLUSTER = ("--nodes", "1", "--login2", "--home-size", "2500M")


def unreachable(w):
    return w.site().state == sites_pb2.SITE_STATE_UNREACHABLE


def test_cut_for_a_while(w):
    job = w.submit(w.program("cut"))
    w.wait_points(job)
    w.cluster.wan("cut")
    wait_for("the gateway to notice", lambda: unreachable(w), 20)
    waiting = w.submit(w.program("waiting"))
    w.open_gate("cut")
    w.open_gate("waiting")
    wait_for("events to tell", lambda: "cannot be reached" in w.said(job) and "cannot be reached" in w.job(job).reason, 60)
    assert w.state(job) == "RUNNING", "nothing is concluded from silence"
    w.cluster.wan("restore")
    w.check_everything(job, words=("site alpha cannot be reached since", "is back"))
    w.check_everything(waiting)


def test_delayed_by_200_ms(w):
    w.cluster.wan("delay", "200ms")
    job = w.submit(w.program("delay"))
    w.wait_points(job)
    w.open_gate("delay")
    w.check_everything(job)


def test_throttled_to_64_kb_per_second(w):
    w.cluster.wan("throttle", "64K")
    job = w.submit(w.program("throttle", inputs={"data.bin": os.urandom(200_000)}))
    w.wait_points(job)
    w.open_gate("throttle")
    w.check_everything(job)


def test_half_open_is_noticed_within_seconds(w):
    job = w.submit(w.program("half"))
    w.wait_points(job)
    w.cluster.wan("half-open")
    wait_for("the gateway to notice", lambda: unreachable(w), 20)
    w.open_gate("half")
    w.cluster.wan("restore")
    w.check_everything(job)


def test_flapping(w):
    job = w.submit(w.program("flap"))
    w.wait_points(job)
    w.cluster.wan("flap", "1500ms", "500ms", "6")
    wait_for("the flapping to end", lambda: w.cluster.wan("status")["login"]["mode"] == "up", 40)
    before = len(w.points(job)[1])
    wait_for("new points", lambda: len(w.points(job)[1]) > before, 60)
    w.open_gate("flap")
    w.check_everything(job)


@pytest.mark.parametrize("size", [256 << 20, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_large_input_goes_on_where_it_was_cut(w, size):
    """Cut in the middle, twice: less than half of it travels again, and it arrives whole."""
    path = w.directory / "large.bin"
    with open(path, "wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    digest = w.upload_file(path)
    spec = w.shell("sha256sum data.bin; exit 0")
    spec.inputs.add(path="data.bin", sha256=digest)
    before = sent(w)
    job = w.submit(spec)
    for share in (0.3, 0.6):
        wait_for("a part to be sent", lambda: sent(w) - before > share * size, 120)
        w.cluster.wan("cut")
        wait_for("the gateway to notice", lambda: unreachable(w), 20)
        w.cluster.wan("restore")
    w.check_everything(job, output=False)
    assert w.log(job).split()[0] == digest
    travelled = sent(w) - before
    assert size <= travelled < 1.5 * size, f"{travelled / size:.2f} times its size"
    path.unlink()


def sent(w):
    return w.cluster.wan("status")["login"]["bytes_up"]


def test_a_full_home_makes_inputs_wait_and_fails_nothing(w):
    """The site's quota is full before staging: the job says so and waits; then it runs."""
    block = w.home / "block"
    size = shutil.disk_usage(w.home).free - (8 << 20)
    subprocess.run(["fallocate", "-l", str(size), block], check=True)
    try:
        job = w.submit(w.program("full", inputs={"data.bin": os.urandom(30 << 20)}))
        w.open_gate("full")
        wait_for("the job to say so", lambda: "no space" in w.said(job).lower(), 60)
        assert w.state(job) in ("QUEUED", "STAGING")
    finally:
        block.unlink()
    # The try that found no room is an attempt that never reached the site.
    w.check_everything(job, attempts=None, words=("no space", "make room"))


def test_a_full_home_while_it_runs_loses_no_point(w):
    """Nothing can be written for a while: the program fails to, the agent stays, and what was written is there once."""
    job = w.submit(w.program("running-full"))
    w.wait_points(job)
    block = w.home / "block"
    subprocess.run(["fallocate", "-l", str(shutil.disk_usage(w.home).free), block], check=False)
    try:
        before = len(w.points(job)[1])
    finally:
        block.unlink(missing_ok=True)
    wait_for("new points", lambda: len(w.points(job)[1]) > before, 60)
    w.open_gate("running-full")
    w.check_everything(job)


@pytest.mark.parametrize("skew", ["+3600", "-3600"])
def test_clocks_an_hour_apart(cluster, world, skew):
    """Neither deadlines nor leases nor shown times compare the gateway's clock with the site's."""
    library = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
    if not os.path.exists(library):
        pytest.skip("needs the package faketime")
    w = world(environment={"LD_PRELOAD": library, "FAKETIME": skew, "FAKETIME_DONT_FAKE_MONOTONIC": "1"})
    tail = 'echo "left $((${ITWIN_DEADLINE%.*} - $(date +%s)))" >&2; ' + FINISH
    job = w.submit(w.limited(w.program("skew", tail=tail), 300))
    w.wait_points(job)
    w.open_gate("skew")
    end = w.check_everything(job)
    left = int(w.log(job, harness.jobs_pb2.LOG_STREAM_STDERR).split()[-1])
    assert 0 < left <= 300, "its own clock and its own limit"
    attempt = end.attempts[0]
    times = [end.created_us, attempt.started_us, attempt.ended_us, end.finished_us]
    assert all(late - early > -3e6 for early, late in zip(times, times[1:])), f"in order by the gateway's clock: {times}"
    assert end.finished_us - end.created_us < 600e6


def test_a_copied_data_directory_is_fenced(cluster, world):
    """Two gateways by mistake: the second is kept out and says why; the first is not disturbed."""
    w = world()
    job = w.submit(w.program("fence"))
    w.wait_points(job)
    copy = World(cluster, root=w.site_root)
    shutil.rmtree(copy.data)
    shutil.copytree(w.data, copy.data, ignore=shutil.ignore_patterns("run", "lock"))
    (copy.data / "run").mkdir(exist_ok=True)
    try:
        copy.start()
        wait_for("the copy to be fenced", lambda: "fenced" in copy.site().reason, 30)
        assert str(w.data) in copy.site().reason and str(copy.data) in copy.site().reason, copy.site().reason
        wait_for("the copy's job to say so", lambda: "fenced" in copy.said(job), 60)
        assert copy.state(job) == "RUNNING"
        assert w.site().state == sites_pb2.SITE_STATE_READY
        w.open_gate("fence")
        w.check_everything(job)
        assert copy.state(job) == "RUNNING", "the copy concludes nothing"
    finally:
        copy.gates.rmdir()
        copy.process.kill()
        copy.process.wait()
        shutil.rmtree(copy.directory)


def test_two_gateways_of_their_own_share_a_spool(cluster, world):
    """By design: identities differ, job ids are random."""
    one = world()
    two = world(root=one.site_root)
    jobs = [(w, w.submit(w.program(f"share{i}"))) for i, w in enumerate((one, two))]
    for w, job in jobs:
        w.wait_points(job)
    for i, (w, job) in enumerate(jobs):
        w.open_gate(f"share{i}")
        w.check_everything(job)


def test_a_data_directory_is_served_by_one_gateway_only(w):
    second = subprocess.run([BIN / "itwin-gateway", "serve", "--data", w.data, "--listen", "127.0.0.1:0"],
                            capture_output=True, text=True, check=False, timeout=30)
    assert second.returncode != 0 and "another itwin-gateway" in second.stderr
    assert pathlib.Path(w.data / "run" / "endpoint").exists()


def test_second_login_node_takes_over(cluster, world):
    """The agent's login node goes silent; the gateway comes in by the other one, whose agent waits out the first one's lease
    and takes the spool over."""
    w = world()
    job = w.submit(w.program("takeover"))
    w.wait_points(job)
    frozen = w.agents()
    w.signal_all(frozen, signal.SIGSTOP)
    w.stop_gateway()
    w.login = "login2"
    w.write_config()
    w.start()
    w.ready_site(seconds=240)
    w.open_gate("takeover")
    w.check_everything(job)
    # The first one wakes up and finds that it has been followed.
    w.signal_all(frozen, signal.SIGCONT)
    wait_for("the first agent to end", lambda: not set(frozen) & set(w.agents()), 120)
    again = w.submit(w.program("takeover"))
    w.check_everything(again)
