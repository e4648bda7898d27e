"""Drives the real programs: a gateway with its embedded site in a fresh directory, spoken to through the generated stubs.

Nothing here sleeps for a fixed time: `wait_for` looks again until a deadline.
"""
import collections
import contextlib
import glob
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import uuid

import grpc
from waiting import wait_for

from itwin.v1 import artifacts_pb2, artifacts_pb2_grpc, jobs_pb2, jobs_pb2_grpc, sites_pb2, sites_pb2_grpc, spec_pb2

BIN = pathlib.Path(os.environ["ITWIN_BIN"])
SOURCE = pathlib.Path(os.environ["ITWIN_SOURCE"])
FINAL = {jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED, jobs_pb2.JOB_STATE_CANCELLED}


def state_name(state):
    return jobs_pb2.JobState.Name(state)[len("JOB_STATE_"):]


def processes(*words):
    """Ids of the live processes whose command line has all the words."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = pathlib.Path(path).read_bytes().replace(b"\0", b" ").decode(errors="replace")
            pid = int(path.split("/")[2])
            if pid != os.getpid() and line and all(word in line for word in words):
                with open(f"/proc/{pid}/stat") as stat:
                    if stat.read().rsplit(")", 1)[1].split()[0] != "Z":
                        found.append(pid)
    return found


class World:
    """One gateway, its site `local`, and what a test does to them."""

    programs = BIN  # where the gateway is; it brings the agent beside it to its sites

    def __init__(self, slots=4, arguments=()):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="itwin-e2e-"))
        self.data = self.directory / "data"
        self.site_root = self.data / "sites" / "local"
        self.arguments = ["--slots", str(slots), *arguments]
        self.process = None
        self.channel = None
        subprocess.run([BIN / "itwin-gateway", "init", "--data", self.data], check=True, stdout=subprocess.DEVNULL)

    # -- gateway ----------------------------------------------------------------------------------------------
    def start(self):
        endpoint = self.data / "run" / "endpoint"
        with contextlib.suppress(FileNotFoundError):
            endpoint.unlink()
        log = open(self.directory / "gateway.log", "ab")
        self.process = subprocess.Popen(
            [self.programs / "itwin-gateway", "serve", "--data", self.data, "--listen", "127.0.0.1:0", *self.arguments],
            stdout=log, stderr=log)
        log.close()

        def ready():
            if self.process.poll() is not None:
                raise AssertionError("the gateway ended:\n" + self.gateway_log()[-4000:])
            return endpoint.exists() and endpoint.read_text().strip()

        self.connect(wait_for("the gateway's endpoint", ready, 30))
        wait_for("the gateway to answer", self.answers, 30)
        return self

    def connect(self, address):
        if self.channel:
            self.channel.close()
        client = self.data / "client"
        config = dict(line.split(":", 1) for line in (client / "config.yaml").read_text().splitlines()
                      if ":" in line and not line.startswith("#"))
        config = {key.strip(): value.strip().strip("'\"") for key, value in config.items()}
        ca = (client / config["ca_file"]).read_bytes()
        token = (client / config["token_file"]).read_text().strip()
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(ca), grpc.access_token_call_credentials(token))
        self.channel = grpc.secure_channel(address, credentials, [("grpc.max_receive_message_length", 64 << 20)])
        self.jobs = jobs_pb2_grpc.JobsStub(self.channel)
        self.artifacts = artifacts_pb2_grpc.ArtifactsStub(self.channel)
        self.sites = sites_pb2_grpc.SitesStub(self.channel)

    def answers(self):
        with contextlib.suppress(grpc.RpcError):
            return self.sites.GetVersion(sites_pb2.GetVersionRequest(), timeout=5).version
        return None

    def kill_gateway(self):
        self.process.kill()
        self.process.wait()

    def stop_gateway(self):
        self.process.terminate()
        assert self.process.wait(30) == 0, "a graceful stop ends with 0:\n" + self.gateway_log()[-2000:]

    def gateway_log(self):
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "gateway.log").read_text(errors="replace")
        return ""

    # -- the site's processes ---------------------------------------------------------------------------------
    def agents(self):
        return processes("itwin-agent", "serve", str(self.site_root))

    def connections(self):
        return processes("itwin-agent", "connect", str(self.site_root))

    def supervisors(self, job):
        return processes("itwin-agent", "run-attempt", job)

    def signal_all(self, pids, number):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def ready_site(self):
        def ready():
            sites = self.sites.ListSites(sites_pb2.ListSitesRequest(), timeout=10).sites
            return any(s.name == "local" and s.state == sites_pb2.SITE_STATE_READY for s in sites)

        wait_for("site local to be ready", ready, 30)
        return self

    # -- jobs -------------------------------------------------------------------------------------------------
    def upload(self, content):
        digest = hashlib.sha256(content).hexdigest()

        def chunks():
            yield artifacts_pb2.UploadArtifactRequest(sha256=digest, size_bytes=len(content), data=content[:1 << 20])
            for at in range(1 << 20, len(content), 1 << 20):
                yield artifacts_pb2.UploadArtifactRequest(data=content[at:at + (1 << 20)])

        self.artifacts.UploadArtifact(chunks(), timeout=120)
        return digest

    def shell(self, script, name="shell", inputs=None, **resources):
        """The spec of a job that runs a shell script."""
        spec = spec_pb2.JobSpec(name=name, command=spec_pb2.CommandSpec(argv=["/bin/bash", "-c", script]))
        for key, value in resources.items():
            setattr(spec.resources, key, value)
        for path, content in (inputs or {}).items():
            spec.inputs.add(path=path, sha256=self.upload(content))
        return spec

    def submit(self, spec, request_id=None):
        request = jobs_pb2.SubmitJobRequest(request_id=request_id or str(uuid.uuid4()), spec=spec)
        return self.jobs.SubmitJob(request, timeout=30).job.id

    def job(self, job):
        return self.jobs.GetJob(jobs_pb2.GetJobRequest(job=job), timeout=30)

    def state(self, job):
        return state_name(self.job(job).state)

    def wait_state(self, job, *states, seconds=60):
        def reached():
            name = self.state(job)
            if name in states:
                return name
            assert name not in ("SUCCEEDED", "FAILED", "CANCELLED"), \
                f"{job} became {name}, not {states}: {self.job(job).reason}"
            return None

        return wait_for(f"{job} to be {' or '.join(states)} (log: {self.gateway_log()[-1500:]})", reached, seconds)

    def wait_final(self, job, seconds=120):
        def final():
            with contextlib.suppress(grpc.RpcError):
                now = self.job(job)
                return now if now.state in FINAL else None

        return wait_for(f"{job} to end", final, seconds)

    def events(self, job):
        return list(self.jobs.ListEvents(jobs_pb2.ListEventsRequest(job=job), timeout=30).events)

    def points(self, job):
        """All points of a job by attempt: a list of (series, step, value) in commit order."""
        found = collections.defaultdict(list)
        cursor = 0
        while True:
            page = self.jobs.ListPoints(jobs_pb2.ListPointsRequest(job=job, cursor=cursor), timeout=60)
            for block in page.blocks:
                for step, value in zip(block.steps, block.values):
                    found[block.attempt].append((block.series, step, value))
            cursor = page.next_cursor
            if page.end:
                return found

    def log(self, job, stream=jobs_pb2.LOG_STREAM_STDOUT):
        return self.jobs.ReadLog(jobs_pb2.ReadLogRequest(job=job, stream=stream), timeout=30).data.decode()

    # -- evidence ---------------------------------------------------------------------------------------------
    def attempt_directory(self, job, attempt):
        found = [path for path in glob.glob(f"{self.site_root}/**/{job}/{attempt}", recursive=True)
                 if os.path.isdir(path)]
        return pathlib.Path(found[0]) if found else None

    def started(self, job, attempt):
        """How often the program of this attempt was started, by the spool's own journal."""
        directory = self.attempt_directory(job, attempt)
        if directory is None or not (directory / "lifecycle.jsonl").exists():
            return 0
        lines = (directory / "lifecycle.jsonl").read_text().splitlines()
        return sum(json.loads(line).get("event") == "started" for line in lines)

    def spool_points(self, job, attempt):
        directory = self.attempt_directory(job, attempt)
        found = []
        if directory is None or not (directory / "metrics.jsonl").exists():
            return found
        text = (directory / "metrics.jsonl").read_bytes()
        for line in text[:text.rfind(b"\n") + 1].splitlines():
            with contextlib.suppress(ValueError, AttributeError):
                record = json.loads(line)
                for series, value in record.get("metrics", {}).items():
                    found.append((series, record.get("step", 0), float(value)))
        return found

    def check_points(self, job):
        """Every point of every attempt's spool is in the database exactly once, and nothing else is."""
        stored = self.points(job)
        attempts = self.job(job).attempt
        for attempt in range(1, attempts + 1):
            mine = [p for p in stored.get(attempt, []) if not p[0].startswith("node/")]
            assert sorted(map(repr, mine)) == sorted(map(repr, self.spool_points(job, attempt))), \
                f"points of attempt {attempt} differ from its spool"
        assert set(stored) <= set(range(1, attempts + 1))

    def check_exactly_once(self, job):
        """One start per attempt at most, one final event, points equal to the spool."""
        now = self.job(job)
        for attempt in range(1, now.attempt + 1):
            assert self.started(job, attempt) <= 1, f"attempt {attempt} was started more than once"
        events = self.events(job)
        finals = [e.kind for e in events if e.kind in ("succeeded", "failed", "cancelled")]
        assert len(finals) == (1 if now.state in FINAL else 0), finals
        assert [e.sequence for e in events] == sorted({e.sequence for e in events})
        self.check_points(job)

    # -- end --------------------------------------------------------------------------------------------------
    def close(self):
        if self.channel:
            self.channel.close()
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.signal_all(self.agents(), signal.SIGCONT)
        subprocess.run([BIN / "itwin-agent", "stop", "--root", self.site_root, "--kill-jobs"],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        # Of a site in the test cluster an agent is elsewhere, and stopping it from here has started another one.
        self.signal_all(self.agents() + processes(str(self.directory)), signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)
