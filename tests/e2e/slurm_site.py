"""A real SLURM cluster (deploy/testcluster) and the agent of one of its users, driven through its gRPC service."""
import importlib
import json
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import grpc
import testcluster
import waiting
from testcluster import ROOT, TOOL, missing  # noqa: F401

BIN = pathlib.Path(os.environ.get("ITWIN_BIN", ROOT / "build" / "bin"))


def wait_for(what, predicate, seconds=40, interval=0.05):
    return waiting.wait_for(what, predicate, seconds, interval)


class Cluster(testcluster.Cluster):
    """With what was built where every node and user can read it."""

    def up(self):
        super().up()
        self.bin = self.directory / "bin"
        self.bin.mkdir()
        for name in ("itwin-agent", "itwin-worker"):
            if (BIN / name).exists():
                shutil.copy(BIN / name, self.bin / name)
                os.chmod(self.bin / name, 0o755)
        os.chmod(self.bin, 0o755)
        return self

    def exec_argv(self, node, *words, user="ada"):
        return [str(TOOL), "exec", "--dir", str(self.directory), node, "--user", user, "--", *map(str, words)]

    def run(self, node, *words, check=True, seconds=60, **keywords):
        result = subprocess.run(self.exec_argv(node, *words), capture_output=True, text=True, timeout=seconds, check=False,
                                stdin=subprocess.DEVNULL, **keywords)
        assert not check or result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        return result.stdout if check else result


def agent_messages(directory):
    """The contract's Python classes, made for this run."""
    target = pathlib.Path(directory) / "py"
    if not target.exists():
        target.mkdir(parents=True)
        sources = [str(p.relative_to(ROOT / "proto")) for p in sorted((ROOT / "proto").glob("itwin/**/*.proto"))]
        subprocess.run(["protoc", "-I", str(ROOT / "proto"), f"--python_out={target}", *sources], check=True, cwd=ROOT / "proto")
        for package in ("itwin", "itwin/v1", "itwin/agent", "itwin/agent/v1"):  # else a package `itwin` elsewhere on the path wins
            (target / package / "__init__.py").touch()
    # A package of that name may be loaded already (the client's).
    for name in [n for n in sys.modules if n == "itwin" or n.startswith("itwin.")]:
        del sys.modules[name]
    sys.path.insert(0, str(target))
    try:
        return importlib.import_module("itwin.agent.v1.agent_pb2")
    finally:
        sys.path.remove(str(target))


class Agent:
    """Calls to the agent over `itwin-agent connect` on a login node, as a gateway would make them."""

    SERVICE = "/itwin.agent.v1.Agent/"

    def __init__(self, cluster, node="login", root=None, flags=(), environment=()):
        self.cluster, self.node = cluster, node
        self.root = pathlib.Path(root or cluster.home() / ("site-" + secrets.token_hex(4)))
        self.pb = agent_messages(cluster.directory)
        self.flags = ["--scheduler", "slurm", "--worker", str(cluster.bin / "itwin-worker"), *flags]
        self.environment = list(environment)
        self.private = tempfile.mkdtemp(prefix="itwin-relay-")
        self.relays = []
        self.channel = self.listener = None
        self.connect()

    def command(self, *words):
        return ["env", *self.environment, str(self.cluster.bin / "itwin-agent"), *words]

    def connect(self):
        self.disconnect()
        path = os.path.join(self.private, secrets.token_hex(4))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if self.listener is not listener:  # disconnected meanwhile
                    connection.close()
                    return
                argv = self.cluster.exec_argv(self.node, *self.command("connect", "--root", str(self.root), *self.flags))
                self.relays.append(subprocess.Popen(argv, stdin=connection, stdout=connection,
                                                    stderr=open(self.private + "/stderr", "ab")))
                connection.close()

        self.listener = listener
        threading.Thread(target=serve, daemon=True).start()
        self.channel = grpc.insecure_channel("unix:" + path, options=[("grpc.enable_retries", 0)])

    def disconnect(self):
        if self.channel is not None:
            self.channel.close()
            listener, self.listener = self.listener, None
            listener.close()
        for relay in self.relays:
            relay.kill()
            relay.wait()
        self.relays = []

    def close(self):
        self.disconnect()
        self.cluster.run(self.node, *self.command("stop", "--root", str(self.root)), check=False)
        shutil.rmtree(self.private, ignore_errors=True)

    def stderr(self):
        return pathlib.Path(self.private + "/stderr").read_text(errors="replace")

    def log(self):
        path = self.root / "agent.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def pid(self):
        return json.loads((self.root / "agent.json").read_text())["pid"]

    def kill(self):
        """kill -9, as a site's reaper does."""
        self.cluster.run(self.node, "kill", "-9", str(self.pid()))

    # ---- calls ----

    def call(self, method, request, response, seconds=60):
        stub = self.channel.unary_unary(self.SERVICE + method, request_serializer=type(request).SerializeToString,
                                        response_deserializer=response.FromString)
        return stub(request, timeout=seconds, wait_for_ready=True)

    def hello(self, seconds=60, **fields):
        return self.call("Hello", self.pb.HelloRequest(protocol=1, gateway_version="test", gateway_id="test", **fields),
                         self.pb.HelloResponse, seconds)

    def request(self, program=None, argv=None, key=None, minutes=5, **fields):
        key = key or secrets.token_hex(8) + "-1"
        request = self.pb.StartAttemptRequest(attempt=key, spec_json="{}", nodes=fields.pop("nodes", 1),
                                              ranks_per_node=fields.pop("ranks_per_node", 1),
                                              argv=argv or ["/bin/sh", "-c", program], **fields)
        request.time.seconds = int(minutes * 60)
        return request

    def start(self, request, seconds=60):
        return self.call("StartAttempt", request, self.pb.AttemptStatus, seconds)

    def start_until_clear(self, request, seconds=60):
        """As the gateway does: while the outcome is not known, the same call again."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.start(request)
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), error
                assert time.monotonic() < deadline, error.details()

    def cancel(self, key, seconds=60):
        return self.call("CancelAttempt", self.pb.CancelAttemptRequest(attempt=key, reason="by a test"), self.pb.AttemptStatus, seconds)

    def remove(self, key):
        return self.call("RemoveAttempt", self.pb.RemoveAttemptRequest(attempt=key), self.pb.RemoveAttemptResponse)

    def statuses(self, keys, seconds=60):
        return list(self.call("ListAttempts", self.pb.ListAttemptsRequest(attempts=keys), self.pb.ListAttemptsResponse,
                              seconds).attempts)

    def status_of(self, key):
        return self.statuses([key])[0]

    def diagnose(self, seconds=180, **fields):
        stub = self.channel.unary_stream(self.SERVICE + "Diagnose", request_serializer=self.pb.DiagnoseRequest.SerializeToString,
                                         response_deserializer=self.pb.CheckResult.FromString)
        return list(stub(self.pb.DiagnoseRequest(**fields), timeout=seconds, wait_for_ready=True))

    # ---- waiting ----

    def phase(self, name):
        return self.pb.AttemptPhase.Value("ATTEMPT_PHASE_" + name)

    def reaches(self, key, *phases, seconds=60):
        wanted = [self.phase(p) for p in phases]
        last = []

        def look():
            last[:] = [self.status_of(key)]
            return last[0] if last[0].phase in wanted else None

        return wait_for(lambda: f"{key} to be {phases}; it is {last[0]} {self.log()[-3000:]}", look, seconds, 0.1)

    def ends(self, key, seconds=60):
        return self.reaches(key, "ENDED", seconds=seconds)

    def cause(self, status):
        return self.pb.EndCause.Name(status.cause).removeprefix("END_CAUSE_")

    # ---- the spool ----

    def directory(self, key):
        job, number = key.rsplit("-", 1)
        return self.root / job / number

    def output(self, key, name="stdout.log"):
        path = self.directory(key) / name
        return path.read_text() if path.exists() else ""

    def lifecycle(self, key):
        return [json.loads(line) for line in self.output(key, "lifecycle.jsonl").splitlines()]
