"""Processes known by id *and* start time, so that a recycled id is never signalled, and waiting for events."""
import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import time

MARK = "ITWIN_TESTCLUSTER_DIR"  # in the environment of every process that lives outside the nodes

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
NODE_NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
SWITCH_NAMESPACES = CLONE_NEWPID | CLONE_NEWNET
ENTERED = ("uts", "ipc", "net", "pid", "mnt")  # mnt last: the files of the others are opened before it

_libc = ctypes.CDLL(None, use_errno=True)
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ClusterError(Exception):
    """Something a person can act on; its text says what and how."""


def checked(what, result):
    if result != 0:
        code = ctypes.get_errno()
        raise ClusterError(f"{what}: {os.strerror(code)}")


def unshare(flags):
    checked("unshare (is this root, with CAP_SYS_ADMIN?)", _libc.unshare(flags))


def setns(fd):
    checked("setns", _libc.setns(fd, 0))


def wait_until(what, predicate, seconds, interval=0.02, explain=None):
    """The first true value of predicate(); ClusterError naming `what` when the deadline passes."""
    deadline = time.monotonic() + seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise ClusterError(f"not within {seconds:g} s: {what}" + (f"\n{explain()}" if explain else ""))
        time.sleep(interval)


def stat_fields(pid):
    """(state letter, start time in ticks) of a process, or None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return fields[0], int(fields[19])


def identity(pid):
    fields = stat_fields(pid)
    return {"pid": pid, "start": fields[1]} if fields else None


def state_of(record):
    """'running', 'frozen' or 'dead' (a zombie, another process with that id, or nothing)."""
    fields = stat_fields(record["pid"]) if record else None
    if not fields or fields[1] != record["start"] or fields[0] in "ZX":
        return "dead"
    return "frozen" if fields[0] in "Tt" else "running"


def alive(record):
    return state_of(record) != "dead"


def send(record, number):
    """Signals exactly the recorded process; False if it is gone."""
    if not alive(record):
        return False
    try:
        fd = os.pidfd_open(record["pid"])
    except ProcessLookupError:
        return False
    try:
        if not alive(record):  # the id may have been reused before the descriptor was opened
            return False
        signal.pidfd_send_signal(fd, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)


def kill_and_wait(record, number=signal.SIGKILL, seconds=20, what="the process"):
    if send(record, number):
        wait_until(f"{what} (pid {record['pid']}) to end", lambda: not alive(record), seconds)


def marked(directory):
    """Holders and proxies of this directory, found by their environment: the net below the recorded ids."""
    wanted = f"{MARK}={directory}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    record = identity(int(name))
                    if record and alive(record):
                        found.append(record)
    return found


@contextlib.contextmanager
def signals_blocked():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child_basics():
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()


def _redirect(log):
    null = os.open("/dev/null", os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)


def _start(child, record, report_fd):
    """The common end of both spawns: nothing runs that `record` has not seen first.

    The child waits for one byte; if this program dies before it recorded the id, the child reads the end of the
    stream instead and ends.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # the kernel translates the sender's id to ours
    with signals_blocked():
        first = os.fork()
        if first == 0:
            try:
                ours.close()
                if report_fd is not None:
                    os.close(report_fd)
                child(theirs)
            except BaseException as error:  # noqa: B902  nothing may escape into the parent's code
                with contextlib.suppress(OSError):
                    theirs.sendall(b"!" + str(error).encode())
            finally:
                os._exit(1)
        theirs.close()
    try:
        data, ancillary, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(12))
        os.waitpid(first, 0)
        if data[:1] != b"+":
            raise ClusterError(f"cannot start a process: {data[1:].decode(errors='replace') or 'it ended'}")
        pid = next(struct.unpack("iII", content)[0] for level, kind, content in ancillary
                   if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS)
        found = identity(pid)
        if not found:
            raise ClusterError("cannot start a process: it ended at once")
        record(found)
        ours.sendall(b"g")
        problem = ours.recv(4096)  # closed by a successful exec
        if problem:
            raise ClusterError(f"cannot start a process: {problem[1:].decode(errors='replace')}")
        return found
    finally:
        ours.close()


def _announce_and_wait(channel):
    channel.sendall(b"+")
    if channel.recv(1) != b"g":
        os._exit(0)


def spawn(argv, directory, log, record, unshared=0, pass_fd=None, report_fd=None):
    """Starts argv outside the nodes, in new namespaces if `unshared`; with CLONE_NEWPID it is their process 1.

    `report_fd` is the read end that stays with the caller, `pass_fd` the descriptor that the program keeps.
    """
    def child(channel):
        _child_basics()
        if unshared:
            unshare(unshared)
        if os.fork():
            channel.close()
            os._exit(0)
        _announce_and_wait(channel)
        _redirect(log)
        os.chdir("/")
        if pass_fd is not None:
            os.set_inheritable(pass_fd, True)
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", MARK: str(directory)}
        os.execve(argv[0], argv, environment)

    return _start(child, record, report_fd)


def spawn_in(node_pid, argv, log, record, environment, user=None):
    """Starts a daemon inside a node, as a child of the node's process 1. `user` is (uid, gid) or None for root."""
    def child(channel):
        _child_basics()
        descriptors = [os.open(f"/proc/{node_pid}/ns/{name}", os.O_RDONLY) for name in ENTERED]
        for fd in descriptors:
            setns(fd)
        if os.fork():  # enters the process namespace
            channel.close()
            os._exit(0)
        if os.fork():  # its child is adopted by the node's process 1, which reaps it
            channel.close()
            os._exit(0)
        os.setsid()
        _announce_and_wait(channel)
        _redirect(log)
        os.chdir("/")
        if user:
            os.setgroups([user[1]])
            os.setgid(user[1])
            os.setuid(user[0])
        os.execve(argv[0], argv, environment)

    return _start(child, record, None)


def enter_argv(node_pid, argv, environment, user=None, cwd="/"):
    """The command line that runs argv inside a node; it dies with whoever runs it."""
    line = ["/usr/bin/nsenter", "-t", str(node_pid), "-m", "-u", "-i", "-n", "-p", "--", "/usr/bin/setpriv"]
    if user:
        line += [f"--reuid={user[0]}", f"--regid={user[1]}", "--clear-groups"]
    line += ["--pdeathsig", "KILL", "--", "/usr/bin/env", "-i", "-C", cwd]
    line += [f"{key}={value}" for key, value in environment.items()]
    return line + list(argv)


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path, value, mode=0o644):
    """All or nothing, also when the program is killed in the middle."""
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, mode)
    os.replace(temporary, path)
