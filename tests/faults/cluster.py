"""A real cluster for a module of fault tests, and what can be done to it (docs/testcluster.md)."""
import contextlib
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "e2e"))
import testcluster  # noqa: E402
from testcluster import missing  # noqa: E402, F401


class Cluster(testcluster.Cluster):
    # -- looking ------------------------------------------------------------------------------------------------
    def slurm(self, *argv, user=None, node="login", check=True, seconds=60):
        """Runs a SLURM command on a node, as an administrator unless a user is named."""
        who = ["--user", user] if user else ["--root"]
        result = self.tool("exec", *who, node, "--", *argv, check=False, seconds=seconds)
        assert not check or result.returncode == 0, f"{argv}: {result.stdout}{result.stderr}"
        return result.stdout

    # -- harm ---------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def frozen(self, service, node="login"):
        self.tool("freeze", service, node)
        try:
            yield
        finally:
            self.tool("thaw", service, node, check=False)

    # -- rest ---------------------------------------------------------------------------------------------------
    def busy(self):
        return [row for row in self.queue() if row[2] in ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING")]

    def end_jobs(self, keep=None):
        """Cancels all SLURM jobs, those of the user `keep` left out."""
        # By number: the host does not know the names of the cluster's users.
        numbers = [row[0] for row in self.busy() if row[3] != keep]
        if numbers:
            self.slurm("scancel", *numbers, check=False)

    def wait_idle(self, seconds):
        """Returns what is still busy then."""
        deadline = time.monotonic() + seconds
        while (left := self.busy()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

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
