"""A real cluster for a module of fault tests, and what can be done to it (docs/testcluster.md)."""
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TOOL = ROOT / "deploy" / "testcluster"


def missing():
    """Why no cluster can be started here; '' when one can."""
    if os.geteuid() != 0:
        return "needs root"
    if not all(map(os.path.exists, ("/usr/sbin/slurmctld", "/usr/sbin/munged", "/usr/sbin/sshd"))):
        return "needs deploy/install-packages.sh cluster"
    return ""


class Cluster:
    def __init__(self, *options):
        self.base = pathlib.Path(tempfile.mkdtemp(prefix="itwin-fc-", dir="/var/tmp"))
        os.chmod(self.base, 0o755)
        self.directory = self.base / "c"
        self.options = options
        self.status = None

    def tool(self, command, *words, check=True, seconds=180, **keywords):
        result = subprocess.run([TOOL, command, "--dir", self.directory, *words], capture_output=True, text=True,
                                timeout=seconds, check=False, **keywords)
        assert not check or result.returncode == 0, f"{command} {words}: {result.stdout}{result.stderr}"
        return result

    def up(self):
        self.status = json.loads(self.tool("up", "--json", *self.options, seconds=300).stdout)
        return self

    def close(self):
        try:
            self.tool("down")
        finally:
            shutil.rmtree(self.base, ignore_errors=True)

    # -- looking ------------------------------------------------------------------------------------------------
    def home(self, user="ada", site="alpha"):
        return pathlib.Path(self.status["sites"][site]["homes"][user])

    def slurm(self, *argv, user=None, node="login", check=True, seconds=60):
        """Runs a SLURM command on a node, as an administrator unless a user is named."""
        who = ["--user", user] if user else ["--root"]
        result = self.tool("exec", *who, node, "--", *argv, check=False, seconds=seconds)
        assert not check or result.returncode == 0, f"{argv}: {result.stdout}{result.stderr}"
        return result.stdout

    def queue(self, site="alpha"):
        """All SLURM jobs that the controller remembers: a list of (id, name, state, user, nodes)."""
        environment = {**os.environ, **self.status["sites"][site]["environment"]}
        output = subprocess.run(["squeue", "-h", "-a", "-t", "all", "-O", "JobID:|,Name:|,State:|,UserName:|,NodeList:|"],
                                env=environment, capture_output=True, text=True, check=False).stdout
        return [tuple(word.strip() for word in line.split("|")[:5]) for line in output.splitlines()]

    def jobs_named(self, part):
        return [row for row in self.queue() if part in row[1]]

    # -- harm ---------------------------------------------------------------------------------------------------
    def wan(self, *words):
        return json.loads(self.tool("wan", *words).stdout)

    @contextlib.contextmanager
    def frozen(self, service, node="login"):
        self.tool("freeze", service, node)
        try:
            yield
        finally:
            self.tool("thaw", service, node, check=False)

    def heal(self):
        """Everything a test may have broken works again (but for cables: who unplugs, plugs)."""
        now = json.loads(self.tool("status", "--json", check=False).stdout)
        for name, node in now["nodes"].items():
            if not node["alive"]:
                self.tool("start", "node", name)
                continue
            for service, record in node["services"].items():
                if record["state"] == "frozen":
                    self.tool("thaw", service, name)
                elif record["state"] == "dead":
                    self.tool("start", service, name)
        self.wan("restore")
        for line in self.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines():
            if "drain" in line or "down" in line:
                self.tool("resume", line.split()[0])
        self.tool("ready", seconds=120)
