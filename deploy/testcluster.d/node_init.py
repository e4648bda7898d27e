"""Process 1 of a node: makes the node's private view of the file system, then reaps whatever ends.

Usage: node_init.py CONFIG.json REPORT_FD. Runs in fresh mount, uts, ipc, net and pid namespaces, so all of this goes
away when it is killed, and so does every process of the node: a user's stray background program too. Writes `ready`
or the reason of a failure to REPORT_FD.
"""
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source, target, kind=None, flags=0, data=None):
    def text(value):
        return None if value is None else os.fsencode(value)
    if _libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data)) != 0:
        raise OSError(ctypes.get_errno(), f"mount of {source} on {target}: {os.strerror(ctypes.get_errno())}")


def bind(source, target):
    mount(source, target, None, MS_BIND | MS_REC)


def private_view(config):
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # What is shared may lie below what is about to be hidden: held by descriptor, shown again afterwards.
    shared = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in config["shared"]]
    for source, target in config["directories"]:
        if os.path.isdir(target):
            bind(source, target)
    mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    hidden = ("/dev/shm/", "/run/") + tuple(target + "/" for _, target in config["directories"])
    for path, fd in shared:
        if path.startswith(hidden):
            os.makedirs(path, mode=0o755, exist_ok=True)
            bind(f"/proc/self/fd/{fd}", path)
        os.close(fd)
    for path in config["run"]:
        os.makedirs(path, mode=0o755, exist_ok=True)
    for path, uid, gid in config["owned"]:
        os.makedirs(path, mode=0o755, exist_ok=True)
        os.chown(path, uid, gid)
    for source, target in config["links"]:
        os.symlink(source, target)
    for source, target in config["late"]:
        if os.path.exists(target):
            bind(source, target)


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        config = json.load(file)
    report = int(sys.argv[2])
    os.umask(0o022)
    try:
        if config.get("hostname"):
            socket.sethostname(config["hostname"])
            private_view(config)
    except OSError as error:
        os.write(report, str(error).encode())
        return 1
    signal.signal(signal.SIGCHLD, lambda *_: None)  # so that it interrupts the pause
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    os.write(report, b"ready")
    os.close(report)
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigwait({signal.SIGCHLD})


if __name__ == "__main__":
    sys.exit(main())
