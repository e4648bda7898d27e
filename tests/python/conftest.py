"""Fixtures: a gateway in this process (`fake`, with `gw` connected to it) and the built one (`gateway`)."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

sys.path.insert(0, os.path.dirname(__file__))

import itwin  # noqa: E402
from fake_gateway import TOKEN, FakeGateway, make_certificates  # noqa: E402


def wait_until(condition, seconds=30.0, what="the condition"):
    """Returns the first true value of condition(); fails after the deadline."""
    deadline = time.monotonic() + seconds
    tick = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true within {seconds} s"
        tick.wait(0.02)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("ITWIN_ENDPOINT", "ITWIN_TOKEN", "ITWIN_TOKEN_FILE", "ITWIN_CA_FILE", "ITWIN_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def fake(certificates):
    gateway = FakeGateway(certificates).start()
    yield gateway
    gateway.stop()


@pytest.fixture
def gw(fake, certificates):
    with itwin.connect(fake.endpoint, token=TOKEN, ca=certificates / "ca.pem") as gateway:
        yield gateway


class RealGateway:
    """itwin-gateway with its embedded site, in a directory of its own; kill() and start() keep directory and port."""

    def __init__(self, binaries, directory):
        self._program = binaries / "itwin-gateway"
        self.data = directory / "data"
        self._log_path = directory / "gateway.log"
        self._process = None
        self.endpoint = None
        self._run("init", "--data", self.data)

    def _run(self, *arguments):
        done = subprocess.run([self._program, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"itwin-gateway {arguments[0]} failed: {done.stderr}"
        return done.stdout

    def start(self):
        listen = self.endpoint or "127.0.0.1:0"
        endpoint_file = self.data / "run" / "endpoint"
        if endpoint_file.exists():
            endpoint_file.unlink()
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen([self._program, "serve", "--data", self.data, "--listen", listen,
                                              "--slots", "4"],
                                             stdout=log, stderr=log, start_new_session=True)

        def ready():
            assert self._process.poll() is None, f"the gateway ended:\n{self.log()}"
            return endpoint_file.exists() and endpoint_file.read_text().strip()
        self.endpoint = wait_until(ready, 60, f"{endpoint_file}")
        return self

    def kill(self):
        """As a power cut would: the gateway alone, not its jobs."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self):
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        # The agent outlives its gateway by design.
        subprocess.run([self._program.with_name("itwin-agent"), "stop", "--root", self.data / "sites" / "local"],
                       capture_output=True, timeout=60)

    def log(self):
        return self._log_path.read_text(errors="replace")[-4000:]

    def spools(self, job_id):
        """The spool directories of a job's attempts, first to last."""
        found = [path.parent for path in self.data.rglob("metrics.jsonl") if path.parent.parent.name == job_id]
        return sorted(found, key=lambda path: int(path.name))

    def client_files(self):
        """Paths of the CA and the token that init made for its first user."""
        client = self.data / "client"
        values = dict(line.split(": ", 1) for line in (client / "config.yaml").read_text().splitlines() if ": " in line)
        return {key: client / values[key].strip().strip("'\"") for key in ("ca_file", "token_file")}

    def write_config(self, path):
        """A client configuration file for this gateway, wherever it listens now."""
        path.write_text(f"endpoint: {self.endpoint}\n" +
                        "".join(f"{key}: {value}\n" for key, value in self.client_files().items()))
        return path

    def connect(self):
        """A connected itwin.Gateway."""
        files = self.client_files()
        return itwin.connect(self.endpoint, token=files["token_file"], ca=files["ca_file"])


@pytest.fixture(scope="session")
def binaries():
    directory = pathlib.Path(os.environ.get("ITWIN_BIN", pathlib.Path(__file__).parents[2] / "build" / "bin"))
    if not (directory / "itwin-gateway").exists():
        pytest.skip(f"{directory} has no itwin-gateway; build it or set ITWIN_BIN")
    return directory


@pytest.fixture(scope="module")
def gateway(binaries, tmp_path_factory):
    real = RealGateway(binaries, tmp_path_factory.mktemp("gateway")).start()
    yield real
    real.stop()
