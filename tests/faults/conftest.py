import os
import pathlib
import signal
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import cluster as clusters  # noqa: E402
import world as worlds  # noqa: E402


def pytest_collection_modifyitems(items):
    reason = clusters.missing()
    for item in items:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run by deploy/soak.sh --faults")


@pytest.fixture(scope="module")
def cluster(request):
    """One cluster for all tests of a module; its options are the module's CLUSTER."""
    one = clusters.Cluster(*getattr(request.module, "CLUSTER", ()))
    try:
        yield one.up()
    finally:
        one.close()


class Shared:
    """The gateway for the tests of a module that leave it alive; another one once a test has left it so that it cannot rest."""

    def __init__(self, cluster, options):
        self.cluster, self.options = cluster, options
        self.open()

    def open(self):
        self.world = worlds.World(self.cluster, **self.options)
        self.world.start().ready_site()

    def renew(self):
        self.world.close()
        self.cluster.end_jobs()
        self.open()


@pytest.fixture(scope="module")
def shared(request, cluster):
    one = Shared(cluster, getattr(request.module, "WORLD", {}))
    yield one
    one.world.close()


def failed(request):
    report = getattr(request.node, "rep_call", None)
    return report is not None and report.failed


def put_to_rest(request, cluster, one):
    """Whatever the test did: nothing is broken, nothing runs. One red case must not make the next ones wait for its jobs."""
    cluster.heal()
    one.signal_all(one.agents(), signal.SIGCONT)
    if one.process.poll() is not None:
        one.start()
    one.ready_site()
    one.end_jobs()
    cluster.end_jobs(keep=one.user)
    left = cluster.wait_idle(20)
    cluster.end_jobs()
    assert failed(request) or not left, f"SLURM still has jobs whose attempts are over: {left}"


@pytest.fixture
def w(shared, cluster, request):
    """The shared world, put to rest afterwards."""
    yield shared.world
    if failed(request):
        show(shared.world)
    try:
        put_to_rest(request, cluster, shared.world)
    except Exception:
        shared.renew()
        if not failed(request):
            raise


@pytest.fixture
def world(cluster, request):
    """Worlds of a test's own."""
    made = []

    def make(**options):
        made.append(worlds.World(cluster, **options))
        return made[-1].start().ready_site()

    yield make
    for one in made:
        if failed(request):
            show(one)
        one.close()
    cluster.heal()
    cluster.end_jobs()
    cluster.wait_idle(60)


def show(one):
    print("gateway log:\n", one.gateway_log()[-6000:])
    for log in one.site_root.glob("agent*.log"):
        print(f"{log}:\n", log.read_text(errors="replace")[-4000:])
    print("queue:\n", os.linesep.join(map(str, one.cluster.queue())))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    setattr(item, "rep_" + outcome.get_result().when, outcome.get_result())
