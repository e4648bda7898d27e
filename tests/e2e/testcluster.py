"""deploy/testcluster for tests (docs/testcluster.md): one cluster in a directory of its own, and ways to look at it."""
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
    """Options are those of `deploy/testcluster up`. `status` is what it printed."""

    def __init__(self, *options):
        self.base = pathlib.Path(tempfile.mkdtemp(prefix="itwin-tc-", dir="/var/tmp"))
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

    def home(self, user="ada", site="alpha"):
        return pathlib.Path(self.status["sites"][site]["homes"][user])

    def wan(self, *words):
        return json.loads(self.tool("wan", *words).stdout)

    def admin(self, *argv, site="alpha"):
        """An administrator's command, on this machine."""
        environment = {**os.environ, **self.status["sites"][site]["environment"]}
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=60)

    def queue(self, site="alpha"):
        """All SLURM jobs that the controller remembers: a list of (id, name, state, user, nodes, reason)."""
        output = self.admin("squeue", "-h", "-a", "-t", "all", "-o", "%i\x1f%j\x1f%T\x1f%u\x1f%N\x1f%r", site=site).stdout
        return [tuple(line.split("\x1f")) for line in output.splitlines()]

    def jobs_named(self, part):
        return [row for row in self.queue() if part in row[1]]
