"""A gateway with a real cluster as its site, and the one check that every fault has to pass."""
import contextlib
import glob
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "e2e"))
import harness  # noqa: E402
from harness import BIN, FINAL, artifacts_pb2, jobs_pb2, processes, sites_pb2, state_name, wait_for  # noqa: E402, F401

# Appends points all the time so that there is something to lose or to double at every moment, until its gate opens. TAIL:
# what it does then. Written for bash without a process per turn.
PROGRAM = """
step=0
emit() { step=$((step+1)); printf '{"step":%d,"metrics":{"train/loss":0.%04d,"lr":1e-3}}\\n' $step $step >>"$ITWIN_METRICS"; }
exec {never}<> <(:)
nap() { read -rt "$1" -u $never || :; }
for i in 1 2 3 4 5 6 7 8 9 10; do emit; done
echo running
until [ -e GATE ]; do emit; nap 0.05; done
for i in 1 2 3 4 5 6 7 8 9 10; do emit; done
TAIL
"""
FINISH = 'head -c 1000 /dev/zero | tr "\\0" x >"$ITWIN_OUTPUTS/model.bin"; echo done'
SSH_OPTIONS = ("-o", "ServerAliveInterval=2", "-o", "ServerAliveCountMax=2", "-o", "ConnectTimeout=5")


def digest_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") \
            else hashlib.sha256(file.read()).hexdigest()


class World(harness.World):
    """The gateway runs on this machine, the agent as `user` on the login node, jobs where SLURM puts them."""

    def __init__(self, cluster, user="ada", scheduler=None, login="login", site_options="", environment=None,
                 agent_flags=(), root=None):
        self.cluster = cluster
        self.user = user
        self.home = cluster.home(user)
        self.owner = self.home.stat().st_uid, self.home.stat().st_gid
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="itwin-fw-", dir="/var/tmp"))
        self.data = self.directory / "data"
        # Faults of processes and links are the same whatever runs the jobs.
        self.scheduler = scheduler = scheduler or os.environ.get("ITWIN_FAULTS_SCHEDULER", "slurm")
        self.site_root = pathlib.Path(root) if root else self.home / f"spool-{uuid.uuid4().hex[:8]}"
        self.gates = self.home / f"gates-{uuid.uuid4().hex[:8]}"
        self.gates.mkdir()
        self.arguments = []
        self.environment = environment or {}
        self.process = None
        self.channel = None
        self.login = login
        self.opened = set()
        self.install_agent()
        subprocess.run([BIN / "itwin-gateway", "init", "--data", self.data], check=True, stdout=subprocess.DEVNULL)
        self.connect_line = [str(self.agent_program), "connect", "--root", str(self.site_root), *agent_flags]
        self.connect_line += ["--slots", "4"] if scheduler == "process" else ["--scheduler", scheduler]
        self.write_config(site_options)

    def install_agent(self):
        """As `itwin site add` leaves it: programs in the user's home."""
        folder = self.home / "itwin"
        folder.mkdir(exist_ok=True)
        for program in ("itwin-agent", "itwin-worker"):
            if (BIN / program).exists() and not (folder / program).exists():
                shutil.copy(BIN / program, folder / program)
        self.agent_program = folder / "itwin-agent"

    def write_config(self, site_options=""):
        command = ["ssh", "-F", self.cluster.status["ssh_config"], *SSH_OPTIONS,
                   self.login if self.user == "ada" else f"{self.login}-{self.user}", *self.connect_line]
        (self.data / "gateway.yaml").write_text(
            "local: {enabled: false}\nsites:\n  - name: alpha\n    command: " + json.dumps(command) + "\n" + site_options)

    def start(self):
        os.environ.update(self.environment)
        try:
            return super().start()
        finally:
            for name in self.environment:
                os.environ.pop(name, None)

    def ready_site(self, seconds=60):
        def ready():
            sites = self.sites.ListSites(sites_pb2.ListSitesRequest(), timeout=10).sites
            return any(s.state == sites_pb2.SITE_STATE_READY for s in sites)

        wait_for(f"site alpha to be ready ({self.site().reason})", ready, seconds, interval=0.05)
        return self

    def site(self):
        return self.sites.ListSites(sites_pb2.ListSitesRequest(), timeout=10).sites[0]

    # -- jobs -------------------------------------------------------------------------------------------------
    def upload_file(self, path):
        digest, size = digest_of(path), os.path.getsize(path)

        def chunks():
            with open(path, "rb") as file:
                yield artifacts_pb2.UploadArtifactRequest(sha256=digest, size_bytes=size, data=file.read(1 << 20))
                while data := file.read(1 << 20):
                    yield artifacts_pb2.UploadArtifactRequest(data=data)

        self.artifacts.UploadArtifact(chunks(), timeout=300)
        return digest

    def gate(self, name):
        return self.gates / name

    def open_gate(self, name):
        self.gate(name).touch()

    def program(self, gate, tail=FINISH, **keywords):
        """The spec of a job that prints points until the gate is open."""
        script = PROGRAM.replace("GATE", str(self.gate(gate))).replace("TAIL", tail)
        keywords.setdefault("memory_mib_per_node", 64)
        return self.shell(script, name=gate, **keywords)

    def limited(self, spec, seconds):
        spec.resources.time.FromSeconds(seconds)
        return spec

    def key(self, job, attempt=1):
        return f"{job}-{attempt}"

    def slurm_id(self, job, attempt=None):
        """The SLURM job of an attempt, by its name; fails unless there is exactly one."""
        number = attempt or self.job(job).attempt
        rows = self.cluster.jobs_named(self.key(job, number))
        assert len(rows) == 1, rows
        return rows[0][0]

    def wait_points(self, job, attempt=1, count=12, seconds=60):
        wait_for(f"points of {job}-{attempt} ({self.state(job)}: {self.job(job).reason})",
                 lambda: len(self.points(job).get(attempt, [])) >= count, seconds, interval=0.05)

    def said(self, job):
        """Every sentence that the user can read about a job."""
        now = self.job(job)
        return "\n".join([now.reason] + [e.message for e in self.events(job)] + [a.reason for a in now.attempts])

    def kinds(self, job):
        return [e.kind for e in self.events(job)]

    def end_jobs(self, seconds=60):
        """Cancels what has not ended, and waits for the ends."""
        def live():
            return self.jobs.ListJobs(jobs_pb2.ListJobsRequest(live_only=True, page_size=1000), timeout=30).jobs

        for job in live():
            with contextlib.suppress(harness.grpc.RpcError):  # it may have ended meanwhile
                self.jobs.CancelJob(jobs_pb2.CancelJobRequest(job=job.id, reason="the test is over"), timeout=30)
        wait_for("the jobs of the test to end", lambda: not live(), seconds, interval=0.1)

    # -- the one check ----------------------------------------------------------------------------------------
    def check_everything(self, job, state="SUCCEEDED", attempts=1, words=(), output=True):
        """What must hold after any fault: the right end, one start per attempt, evidence, every point once, and a
        sentence that explains (`words`: all of them are said somewhere, by events or reasons)."""
        now = self.wait_final(job, seconds=180)
        story = self.said(job)
        assert state_name(now.state) == state, f"{state_name(now.state)}: {story}"
        if attempts is not None:
            assert now.attempt == attempts, f"{now.attempt} attempts: {story}"
        for word in words:
            assert word.lower() in story.lower(), f"nobody says '{word}':\n{story}"
        self.check_exactly_once(job)
        for number in range(1, now.attempt + 1):
            self.check_evidence(job, number, last=number == now.attempt, state=state)
        if state == "SUCCEEDED" and output:
            files = self.jobs.ListOutputs(jobs_pb2.ListOutputsRequest(job=job)).outputs
            assert [file.path for file in files] == ["model.bin"], files
        return now

    def check_evidence(self, job, number, last, state):
        """No end without evidence: an attempt that began has an exit record, or a word of the scheduler in ended.pb."""
        directory = self.attempt_directory(job, number)
        if directory is None:  # never reached the site
            assert state != "SUCCEEDED" or not last
            return
        lifecycle = directory / "lifecycle.jsonl"
        events = [json.loads(line)["event"] for line in lifecycle.read_text().splitlines()] if lifecycle.exists() else []
        assert events.count("started") <= 1 and events.count("exited") <= 1, events
        if self.points(job).get(number):
            assert events.count("started") == 1, f"points without a start: {events}"
        if "started" in events:
            assert "exited" in events or (directory / "ended.pb").exists(), f"attempt {number} ended without evidence"
        if last and state == "SUCCEEDED":
            exited = [json.loads(line) for line in lifecycle.read_text().splitlines() if '"exited"' in line]
            assert exited and exited[0]["exit_code"] == 0, exited
            assert json.loads((directory / "result.json").read_text())["outcome"] == "succeeded"

    # -- victims ----------------------------------------------------------------------------------------------
    def ranks(self, job):
        """The programs of an attempt, wherever they run: what the supervisor has started."""
        found = []
        for supervisor in self.supervisors(job):
            for path in glob.glob(f"/proc/{supervisor}/task/*/children"):
                with contextlib.suppress(OSError):
                    found += [int(pid) for pid in pathlib.Path(path).read_text().split()]
        return found

    def supervisors(self, job):
        return [pid for pid in processes("run-attempt", job)
                if "itwin-agent" in pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]]

    def tunnels(self):
        return processes("ssh", str(self.site_root), "connect")

    def close(self):
        for name in glob.glob(str(self.gates / "*")):
            pathlib.Path(name).touch()
        if self.channel:
            self.channel.close()
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.signal_all(processes(str(self.site_root)), signal.SIGCONT)
        self.cluster.tool("exec", "--user", self.user, "login", "--", "scancel", "--me", check=False)
        self.signal_all(processes(str(self.site_root)), signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.site_root, ignore_errors=True)
        shutil.rmtree(self.gates, ignore_errors=True)
