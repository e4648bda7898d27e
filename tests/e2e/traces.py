"""What a machine looks like from outside, to see that nothing is left of what was started on it."""
import contextlib
import hashlib
import json
import os
import pathlib
import subprocess

import waiting

SYSTEM_FILES = ("/etc/passwd", "/etc/group", "/etc/shadow", "/etc/hosts", "/etc/munge/munge.key", "/etc/ssh/sshd_config")


def wait_for(what, predicate, seconds=30, interval=0.02):
    return waiting.wait_for(what, predicate, seconds, interval)


def file_hashes():
    return {path: hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
            for path in SYSTEM_FILES if os.path.exists(path)}


def namespaces():
    """Every network, mount and process namespace in which a process lives (a dead one not yet reaped does not)."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                names = {os.readlink(f"/proc/{entry}/ns/{kind}") for kind in ("net", "mnt", "pid")}
                if pathlib.Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
                    found |= names
    return found


def links():
    return {entry["ifname"] for entry in json.loads(subprocess.check_output(["ip", "-json", "link"]))}


def processes_about(directory):
    """Live processes that mention the directory in their command line or environment, this one left out."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                text = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes() + pathlib.Path(f"/proc/{entry}/environ").read_bytes()
                state = pathlib.Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[0]
                if str(directory).encode() in text and state != "Z":
                    found.append((int(entry), text[:200]))
    return found


class Traces:
    """What a machine looks like; to be compared after a cluster has gone."""

    def __init__(self):
        self.namespaces, self.links, self.files = namespaces(), links(), file_hashes()

    def assert_nothing_left(self, directory):
        wait_for("the processes to end", lambda: not processes_about(directory), 5)
        wait_for("the links to go", lambda: links() <= self.links, 5)
        assert not namespaces() - self.namespaces
        assert str(directory) not in pathlib.Path("/proc/self/mountinfo").read_text()
        assert not os.path.exists(directory)
        assert file_hashes() == self.files
