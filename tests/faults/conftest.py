import os
import pathlib
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


@pytest.fixture(scope="module")
def shared(request, cluster):
    """One gateway for the tests of a module that leave it alive."""
    options = getattr(request.module, "WORLD", {})
    one = worlds.World(cluster, **options).start().ready_site()
    yield one
    one.close()


@pytest.fixture
def w(shared, cluster, request):
    """The shared world, healed afterwards whatever the test did."""
    yield shared
    report = getattr(request.node, "rep_call", None)
    if report is not None and report.failed:
        show(shared)
    cluster.heal()
    if shared.process.poll() is not None:
        shared.start()
    shared.ready_site()


@pytest.fixture
def world(cluster, request):
    """Worlds of a test's own."""
    made = []

    def make(**options):
        made.append(worlds.World(cluster, **options))
        return made[-1].start().ready_site()

    yield make
    for one in made:
        report = getattr(request.node, "rep_call", None)
        if report is not None and report.failed:
            show(one)
        one.close()
    cluster.heal()


def show(one):
    print("gateway log:\n", one.gateway_log()[-6000:])
    for log in one.site_root.glob("agent*.log"):
        print(f"{log}:\n", log.read_text(errors="replace")[-4000:])
    print("queue:\n", os.linesep.join(map(str, one.cluster.queue())))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    setattr(item, "rep_" + outcome.get_result().when, outcome.get_result())
