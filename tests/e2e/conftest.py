import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import harness  # noqa: E402


@pytest.fixture
def world(request):
    made = []

    def make(**options):
        made.append(harness.World(**options))
        return made[-1].start().ready_site()

    yield make
    for one in made:
        if request.node.rep_call.failed if hasattr(request.node, "rep_call") else False:
            print("gateway log:\n", one.gateway_log()[-6000:])
            for log in one.site_root.glob("**/agent.log"):
                print("agent log:\n", log.read_text(errors="replace")[-3000:])
        one.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    setattr(item, "rep_" + outcome.get_result().when, outcome.get_result())


@pytest.fixture(scope="module")
def world_shared():
    """One world for tests that do not harm it."""
    one = harness.World().start().ready_site()
    yield one
    one.close()
