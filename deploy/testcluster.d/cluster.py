"""The cluster: what is in it, how each part starts, how all of it goes away.

Everything lies under one directory. state.json there is written before each step that could leave something behind, so
`down` finds it even if `up` was killed in the middle.

  this machine ── PREFIX0 (10.77.N.1) ═ veth ═ switch: a bridge in its own network namespace
     │ WAN proxy (127.0.0.1:port)                  ╠═ login  .2   sshd, slurmctld, munged (slurmdbd, MariaDB)
     └── gateway under test                        ╠═ login2 .3   sshd, munged
                                                   ╚═ n1 … nN     slurmd, munged
"""
import contextlib
import errno
import fcntl
import grp
import hashlib
import ipaddress
import json
import os
import pathlib
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

import processes
import site_files
from processes import ClusterError, wait_until

HERE = pathlib.Path(__file__).resolve().parent
PYTHON = "/usr/bin/python3"
MARKER = ".itwin-testcluster"
SSH_PORT = 22
MUNGE_SOCKET = "munge.socket.2"  # the name that munge's own tools expect under /run/munge
USERS = ("ada", "bob")
PROGRAMS = ("/usr/sbin/slurmctld", "/usr/sbin/slurmd", "/usr/sbin/munged", "/usr/sbin/sshd", "/usr/bin/sbatch",
            "/usr/bin/srun", "/usr/bin/sinfo", "/usr/bin/scontrol", "/usr/bin/nsenter", "/usr/bin/setpriv",
            "/usr/bin/ssh-keygen")
ACCOUNTING_PROGRAMS = ("/usr/sbin/slurmdbd", "/usr/sbin/mariadbd", "/usr/bin/mariadb-install-db", "/usr/bin/sacctmgr")
NODE_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


class Interrupted(BaseException):
    def __init__(self, number):
        super().__init__(f"signal {number}")
        self.number = number


def default_prefix(directory):
    return "itw" + hashlib.sha256(str(directory).encode()).hexdigest()[:5]


def sshd_has_penalties():
    """OpenSSH 9.8 and later know PerSourcePenalties."""
    version = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr
    return tuple(map(int, re.match(r"OpenSSH_(\d+)\.(\d+)", version).groups())) >= (9, 8)


class Cluster:
    def __init__(self, directory, verbose=False):
        self.directory = pathlib.Path(os.path.abspath(directory))
        self.state_file = self.directory / "state.json"
        self.verbose = verbose
        self.state = None
        self.lock = None

    # -- state -----------------------------------------------------------------------------------------------
    def load(self):
        try:
            self.state = processes.read_json(self.state_file)
        except FileNotFoundError:
            self.state = None
        except ValueError as error:
            raise ClusterError(f"{self.state_file} is damaged ({error}); run `down` with the same --dir") from error
        return self.state

    def save(self):
        processes.write_json(self.state_file, self.state)

    def need_up(self):
        if not self.load() or self.state["phase"] != "up":
            phase = self.state["phase"] if self.state else "down"
            raise ClusterError(f"the cluster in {self.directory} is {phase}; start it with: "
                               f"deploy/testcluster up --dir {self.directory}")
        return self.state

    def say(self, text):
        if self.verbose:
            print(f"testcluster: {text}", flush=True)

    @contextlib.contextmanager
    def locked(self, seconds, evict=False):
        """One changing command at a time. `evict` asks an `up` that is under way to stop, and waits for it."""
        path = self.directory / "lock"
        deadline = time.monotonic() + seconds
        evicted = False
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                raise ClusterError(f"{self.directory} was removed by another command") from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    break  # not the lock of a cluster that was removed meanwhile
            except BlockingIOError:
                if evict and not evicted:
                    holder = (self.load() or {}).get("starting")
                    evicted = bool(holder) and processes.send(holder, signal.SIGTERM)
            except FileNotFoundError:
                os.close(fd)
                raise ClusterError(f"{self.directory} was removed by another command") from None
            os.close(fd)
            if time.monotonic() > deadline:
                raise ClusterError(f"another command holds {path}")
            time.sleep(0.05)
        try:
            yield
        finally:
            os.close(fd)

    # -- where things are --------------------------------------------------------------------------------------
    def site_directory(self, site):
        return self.directory / site

    def node_directory(self, name):
        return self.site_directory(self.node(name)["site"]) / "nodes" / name

    def node(self, name):
        try:
            return self.state["nodes"][name]
        except KeyError:
            raise ClusterError(f"no node '{name}'; known: {', '.join(self.state['nodes'])}") from None

    def user(self, name):
        for user in self.state["users"]:
            if user["name"] == name:
                return user
        raise ClusterError(f"no user '{name}'; known: {', '.join(u['name'] for u in self.state['users'])}")

    def home(self, site, user):
        return self.site_directory(site) / "home" / user

    def slurm_conf(self, site):
        return self.site_directory(site) / "etc" / "slurm.conf"

    def control_node(self, site):
        return self.state["sites"][site]["control"]

    def names(self, *kinds, site=None):
        return [name for name, node in self.state["nodes"].items()
                if node["kind"] in kinds and site in (None, node["site"])]

    def log(self, site, name):
        return self.site_directory(site) / "log" / name

    # -- running things in nodes -------------------------------------------------------------------------------
    def environment(self, name, user=None):
        if user:
            home = self.home(self.node(name)["site"], user)
            return {"HOME": str(home), "USER": user, "LOGNAME": user, "SHELL": "/bin/bash", "PATH": NODE_PATH,
                    "LANG": "C.UTF-8"}
        return {"HOME": "/root", "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash", "PATH": NODE_PATH,
                "LANG": "C.UTF-8"}

    def enter(self, name, argv, user=None, cwd=None, extra=()):
        node = self.node(name)
        if not processes.alive(node.get("holder")):
            raise ClusterError(f"node '{name}' is down; start it with: deploy/testcluster start node {name}")
        environment = self.environment(name, user)
        environment.update(extra)
        ids = None
        if user:
            ids = (self.user(user)["uid"], self.user(user)["gid"])
            cwd = cwd or environment["HOME"]
        return processes.enter_argv(node["holder"]["pid"], argv, environment, ids, str(cwd or "/"))

    def run(self, name, *argv, user=None, seconds=60, check=True, text=None):
        """Runs a short command inside a node and returns its result."""
        try:
            result = subprocess.run(self.enter(name, argv, user), stdin=None if text else subprocess.DEVNULL,
                                    capture_output=True, text=True, timeout=seconds, input=text, check=False)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"on {name}, `{' '.join(argv)}` did not end within {seconds} s") from None
        if check and result.returncode != 0:
            raise ClusterError(f"on {name}, `{' '.join(argv)}` ended with {result.returncode}: "
                               f"{(result.stderr or result.stdout).strip()[-2000:]}")
        return result

    def ip(self, commands, pid=None):
        """Many `ip` commands at once, in the network namespace of a process if one is given."""
        argv = ["ip", "-batch", "-"]
        if pid:
            argv = ["/usr/bin/nsenter", "-t", str(pid), "-n", "--"] + argv
        result = subprocess.run(argv, input="\n".join(commands) + "\n", capture_output=True, text=True, check=False,
                                env={"PATH": NODE_PATH, "LC_ALL": "C"})
        if result.returncode != 0:
            raise ClusterError(f"network set-up failed: {result.stderr.strip()} (in: {'; '.join(commands)})")

    def holder(self, record_in, config_path, log, namespaces):
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            def record(found):
                record_in["holder"] = found
                self.save()
            processes.spawn([PYTHON, str(HERE / "node_init.py"), str(config_path), str(write_end)], self.directory,
                            str(log), record, unshared=namespaces, pass_fd=write_end, report_fd=read_end)
            os.close(write_end)
            write_end = None
            answer = os.read(read_end, 4096).decode(errors="replace")
        finally:
            os.close(read_end)
            if write_end is not None:
                os.close(write_end)
        if answer != "ready":
            raise ClusterError(f"a node could not be made: {answer or 'it ended'}; see {log}")
        return record_in["holder"]["pid"]

    # -- up ----------------------------------------------------------------------------------------------------
    def up(self, options):
        self.check_machine(options)
        self.directory.mkdir(parents=True, exist_ok=True)
        marker = self.directory / MARKER
        if not marker.exists():
            if any(path.name != "lock" for path in self.directory.iterdir()):
                raise ClusterError(f"{self.directory} is not empty and not a cluster's; choose another --dir")
            marker.write_text("A test cluster lives here; `deploy/testcluster down` removes the whole directory.\n")
        self.check_reachable()
        with self.locked(60):
            if self.load():
                if self.state["phase"] == "up":
                    if self.state["options"] == options:
                        self.say(f"already up in {self.directory}")
                        return
                    raise ClusterError(f"a cluster with other options is up in {self.directory}; `down` it first")
                self.say("cleaning up after a start that was cut off")
                self.remove_all()
                self.remove_content()
            started = time.monotonic()
            self.state = {"version": 1, "phase": "starting", "directory": str(self.directory),
                          "starting": processes.identity(os.getpid()), "options": options,
                          "prefix": options["prefix"], "link": f"{options['prefix']}0", "switch": {}, "wan": {},
                          "users": [], "sites": {}, "nodes": {}}
            self.save()
            try:
                self.build(options)
                self.state["phase"] = "up"
                self.state["starting"] = None
                self.state["up_seconds"] = round(time.monotonic() - started, 2)
                self.save()
            except BaseException as error:
                # A second Ctrl-C must not stop the cleaning.
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                if options.get("keep_failed") and isinstance(error, ClusterError):
                    print(f"testcluster: kept for inspection in {self.directory}", file=sys.stderr)
                else:
                    self.remove_all()
                    self.remove_directory()
                raise
        self.say(f"up in {self.state['up_seconds']} s: {self.directory}")

    def check_machine(self, options):
        if os.geteuid() != 0:
            raise ClusterError("needs root (network and mount namespaces); run it with sudo")
        wanted = PROGRAMS + (ACCOUNTING_PROGRAMS if options["accounting"] else ())
        missing = [path for path in wanted if not os.path.exists(path)]
        if missing or not shutil.which("ip"):
            raise ClusterError(f"missing: {', '.join(missing) or 'ip'}; install with: deploy/install-packages.sh cluster")
        if len(options["prefix"]) > 12:
            raise ClusterError(f"--prefix '{options['prefix']}' is longer than 12 characters (a link's name has 15)")
        if not 1 <= options["nodes"] <= 90:
            raise ClusterError("--nodes must be 1 to 90")
        if len(str(self.directory)) > 60:
            raise ClusterError(f"--dir is longer than 60 characters, too long for the sockets in it: {self.directory}")
        for reserved in ("/proc", "/sys", "/dev", "/run", "/etc"):
            if f"{self.directory}/".startswith(reserved + "/"):
                raise ClusterError(f"--dir may not lie under {reserved}")
        for path in options["bind"]:
            if not os.path.isabs(path) or not os.path.exists(path):
                raise ClusterError(f"--bind needs an existing absolute path: '{path}'")

    def check_reachable(self):
        os.chmod(self.directory, 0o755)
        for parent in self.directory.parents:
            if not os.stat(parent).st_mode & stat.S_IXOTH:
                raise ClusterError(f"ordinary users cannot enter {parent}, so they could not use a cluster in "
                                   f"{self.directory}; choose a --dir under /var/tmp")

    def build(self, options):
        self.plan(options)
        self.make_switch()
        self.say(f"network {self.state['subnet']}, link {self.state['link']}")
        self.make_keys(options)
        for site in self.state["sites"]:
            self.make_site_files(site, options)
        for name in self.state["nodes"]:
            self.make_node(name)
        databases = {site: self.make_database(site) for site in self.state["sites"] if options["accounting"]}
        self.start_wan()
        self.write_client_files()
        for site in self.state["sites"]:
            if options["accounting"]:
                self.say(f"{site}: accounting")
                self.start_accounting(site, databases[site])
            self.say(f"{site}: slurmctld, slurmd, sshd")
            self.start_service("slurmctld", self.control_node(site), wait=False)
        for name in self.names("login", "jump"):
            self.start_service("sshd", name, wait=False)
        for site in self.state["sites"]:
            self.wait_service("slurmctld", self.control_node(site))
        for name in self.names("compute"):
            self.start_service("slurmd", name, wait=False)
        for name in self.names("login", "jump"):
            self.wait_service("sshd", name)
        for site in self.state["sites"]:
            self.wait_idle(site, options["timeout"])
            self.check_jobs(site, options["timeout"])

    def plan(self, options):
        """Names and addresses. The lock is the machine's, for two clusters may look for a free network at once."""
        first_uid = self.free_uid()
        self.state["users"] = [{"name": name, "uid": first_uid + i, "gid": first_uid + i}
                               for i, name in enumerate(USERS)]
        sites = ["alpha"] + (["beta"] if options["second_cluster"] else [])
        nodes = self.state["nodes"]

        def add(name, site, kind, last):
            nodes[name] = {"site": site, "kind": kind, "last": last, "services": {}}

        for index, site in enumerate(sites):
            before = "" if index == 0 else "b-"
            add(f"{before}login", site, "login", 2 if index == 0 else 5)
            if index == 0 and options["login2"]:
                add("login2", site, "login", 3)
            if index == 0 and options["jump"]:
                add("jump", site, "jump", 4)
            for i in range(1, options["nodes"] + 1):
                add(f"{before}n{i}", site, "compute", 10 + i if index == 0 else 110 + i)
            self.state["sites"][site] = {"cluster": site, "control": f"{before}login", "port": 6817 + 10 * index,
                                         "partitions": site_files.partition_names(options["preemption"])}

    def set_subnet(self, subnet):
        network = ipaddress.ip_network(subnet)
        self.state["subnet"] = str(network)
        self.state["gateway_address"] = str(network[1])
        for node in self.state["nodes"].values():
            node["address"] = str(network[node["last"]])

    @staticmethod
    def free_uid():
        taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
        uid = 52001
        while any(uid + i in taken for i in range(len(USERS))):
            uid += 10
        return uid

    @staticmethod
    def used_networks():
        """Networks that this machine has an address in or a route to, the default route left out."""
        found = []
        for argv in (["ip", "-4", "-json", "route", "show", "table", "all"], ["ip", "-4", "-json", "addr"]):
            result = subprocess.run(argv, capture_output=True, text=True, check=True)
            for entry in json.loads(result.stdout or "[]"):
                texts = [entry.get("dst")] + [f"{a['local']}/{a['prefixlen']}" for a in entry.get("addr_info", [])]
                for text in texts:
                    with contextlib.suppress(ValueError, TypeError):
                        if text and text != "default":
                            found.append(ipaddress.ip_network(text, strict=False))
        return found

    def make_switch(self):
        state, switch = self.state, self.state["switch"]
        config = self.directory / "switch.json"
        processes.write_json(config, {})
        pid = self.holder(switch, config, self.directory / "switch.log", processes.SWITCH_NAMESPACES)
        self.ip(["link set lo up", "link add br0 type bridge", "link set br0 up"], pid)
        wanted = state["options"]["subnet"]
        candidates = [wanted] if wanted else [f"10.77.{i}.0/24" for i in range(256)]
        guard = os.open("/run", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            wait_until("another cluster to choose its network", lambda: self.try_lock(guard), 30)
            used = self.used_networks()
            free = next((c for c in candidates
                         if not any(ipaddress.ip_network(c).overlaps(u) for u in used if u.prefixlen)), None)
            if free is None:
                raise ClusterError(f"network {wanted or '10.77.0.0/16'} is in use on this machine; give another "
                                   f"with --subnet")
            self.set_subnet(free)
            self.save()
            prefix_length = ipaddress.ip_network(free).prefixlen
            self.ip([f"link add {state['link']} type veth peer name uplink netns {pid}",
                     f"addr add {state['gateway_address']}/{prefix_length} dev {state['link']}",
                     f"link set {state['link']} up"])
        finally:
            os.close(guard)
        self.ip(["link set uplink master br0", "link set uplink up"], pid)

    @staticmethod
    def try_lock(fd):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    # -- files -------------------------------------------------------------------------------------------------
    def write(self, path, text, mode=0o644, owner=None):
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "w") as file:
            file.write(text)
        os.chmod(path, mode)
        if owner:
            os.chown(path, *owner)

    def make_keys(self, options):
        keys = self.directory / "ssh"
        keys.mkdir(mode=0o755)
        names = [*USERS, "forced", "user_ca", "stranger"]
        running = [subprocess.Popen(["/usr/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"testcluster {name}",
                                     "-f", str(keys / name)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
                   for name in names]
        running += [subprocess.Popen(["/usr/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name,
                                      "-f", str(keys / f"host_{name}")], stdin=subprocess.DEVNULL,
                                     stdout=subprocess.DEVNULL) for name in self.names("login", "jump")]
        if any([process.wait(30) for process in running]):
            raise ClusterError("ssh-keygen failed")
        for name in names:
            os.chown(keys / name, options["owner"], -1)

    def authorized_keys(self, user):
        keys = self.directory / "ssh"
        text = (keys / f"{user}.pub").read_text()
        if user == USERS[0]:
            command = self.state["options"]["forced_command"].replace('"', '\\"')
            text += f'restrict,command="{command}" {(keys / "forced.pub").read_text()}'
        return text

    def write_authorized_keys(self, site):
        for user in self.state["users"]:
            ids = (user["uid"], user["gid"])
            self.write(self.home(site, user["name"]) / ".ssh" / "authorized_keys",
                       self.authorized_keys(user["name"]), 0o600, ids)

    def mount_home(self, site, size):
        home = self.site_directory(site) / "home"
        home.mkdir(parents=True, exist_ok=True)
        if size:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", f"home-{site}", str(home)], check=True)
        return home

    def make_site_files(self, site, options):
        state = self.state
        directory = self.site_directory(site)
        etc = directory / "etc"
        slurm = pwd.getpwnam("slurm")
        munge = pwd.getpwnam("munge")
        slurm_ids, munge_ids = (slurm.pw_uid, slurm.pw_gid), (munge.pw_uid, munge.pw_gid)
        for path in (directory, etc, directory / "log", directory / "nodes", directory / "munge", directory / "shared"):
            path.mkdir(parents=True, exist_ok=True)
        os.chown(directory / "munge", *munge_ids)
        os.chmod(directory / "shared", 0o1777)
        (directory / "slurmctld").mkdir(mode=0o750)
        os.chown(directory / "slurmctld", *slurm_ids)
        os.chown(directory / "log", *slurm_ids)
        home = self.mount_home(site, options["home_size"])
        for user in state["users"]:
            ids = (user["uid"], user["gid"])
            for path, mode in ((home / user["name"], 0o750), (home / user["name"] / ".ssh", 0o700)):
                path.mkdir(mode=mode)
                os.chmod(path, mode)
                os.chown(path, *ids)
        self.write_authorized_keys(site)

        control = state["sites"][site]["control"]
        description = {
            "cluster": site, "directory": directory, "port": state["sites"][site]["port"],
            "control": (control, state["nodes"][control]["address"]),
            "munge_socket": directory / "munge" / MUNGE_SOCKET,
            "nodes": [(name, state["nodes"][name]["address"]) for name in self.names("compute", site=site)],
        }
        self.write(etc / "slurm.conf", site_files.slurm_conf(description, options))
        self.write(etc / "mpi.conf", site_files.mpi_conf())
        self.write(etc / "cgroup.conf", site_files.cgroup_conf())
        if options["gpus"]:
            self.write(etc / "gres.conf", site_files.gres_conf(self.make_gpus(directory, options["gpus"])))
        if options["accounting"]:
            self.write(etc / "slurmdbd.conf", site_files.slurmdbd_conf(description), 0o600, slurm_ids)
        # Accounts, names and addresses are the nodes' own: this machine's files are never changed.
        self.write(etc / "passwd", site_files.passwd(pathlib.Path("/etc/passwd").read_text(), state["users"], home))
        self.write(etc / "group", site_files.group(pathlib.Path("/etc/group").read_text(), state["users"]))
        self.write(etc / "hosts", site_files.hosts([(n, node["address"]) for n, node in state["nodes"].items()]))
        self.write(etc / "resolv.conf", "# no name server here\n")
        key = os.open(etc / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(key, "wb") as file:
            file.write(os.urandom(128))
        os.chown(etc / "munge.key", *munge_ids)

    @staticmethod
    def make_gpus(directory, count):
        devices = directory / "devices"
        devices.mkdir()
        for i in range(count):
            path = devices / f"gpu{i}"
            try:
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # reads and writes as /dev/null does
            except PermissionError:  # a container without CAP_MKNOD: SLURM needs only that the file exists
                path.touch()
            os.chmod(path, 0o666)
        return f"{devices}/gpu{'0' if count == 1 else f'[0-{count - 1}]'}"

    # -- nodes -------------------------------------------------------------------------------------------------
    def make_node(self, name):
        node, site = self.node(name), self.node(name)["site"]
        directory, etc = self.node_directory(name), self.site_directory(site) / "etc"
        munge = pwd.getpwnam("munge")
        for path, mode, owner in ((directory, 0o755, 0), (directory / "tmp", 0o1777, 0),
                                  (directory / "var-tmp", 0o1777, 0), (directory / "slurmd", 0o755, 0),
                                  (directory / "munge", 0o755, munge.pw_uid)):
            path.mkdir(exist_ok=True, parents=True)
            os.chmod(path, mode)
            os.chown(path, owner, -1)
        self.write(directory / "hostname", f"{name}\n")
        late = [(str(etc), "/etc/slurm"), (str(etc / "hosts"), "/etc/hosts"), (str(etc / "passwd"), "/etc/passwd"),
                (str(etc / "group"), "/etc/group"), (str(etc / "resolv.conf"), "/etc/resolv.conf"),
                (str(directory / "hostname"), "/etc/hostname")]
        if name != self.control_node(site):  # each node has its own munged behind the same path
            late.append((str(directory / "munge"), str(self.site_directory(site) / "munge")))
        slurm = pwd.getpwnam("slurm")
        config = directory / "init.json"
        processes.write_json(config, {
            "hostname": name, "shared": [str(self.directory), *self.state["options"]["bind"]],
            "directories": [[str(directory / "tmp"), "/tmp"], [str(directory / "var-tmp"), "/var/tmp"]],
            "run": ["/run/sshd", "/run/lock"], "owned": [["/run/mysqld", slurm.pw_uid, slurm.pw_gid]], "late": late,
            "links": [[str(self.site_directory(site) / "munge"), "/run/munge"]]})
        pid = self.holder(node, config, self.log(site, f"{name}.log"), processes.NODE_NAMESPACES)
        switch = self.state["switch"]["holder"]["pid"]
        port = self.port_of(name)
        length = self.state["subnet"].split("/")[1]
        self.ip([f"link add {port} type veth peer name eth0 netns {pid}", f"link set {port} master br0",
                 f"link set {port} up"], switch)
        self.ip(["link set lo up", f"addr add {node['address']}/{length} dev eth0", "link set eth0 up"], pid)
        if node["kind"] != "jump":
            self.start_service("munge", name)

    def port_of(self, name):
        return f"port{self.node(name)['last']}"

    # -- services ----------------------------------------------------------------------------------------------
    def services_of(self, name):
        """Names of what runs on a node, in starting order."""
        node = self.node(name)
        if node["kind"] == "jump":
            return ["sshd"]
        if node["kind"] == "compute":
            return ["munge", "slurmd"]
        names = ["munge"]
        if name == self.control_node(node["site"]):
            names += (["mariadb", "slurmdbd"] if self.state["options"]["accounting"] else []) + ["slurmctld"]
        return names + ["sshd"]

    def command_of(self, service, name):
        """(argv, user ids or None)"""
        site = self.node(name)["site"]
        directory, etc = self.site_directory(site), self.site_directory(site) / "etc"
        control = name == self.control_node(site)
        munge, slurm = pwd.getpwnam("munge"), pwd.getpwnam("slurm")
        if service == "munge":
            # Through the node's view both are the same path; the proper directory of the others lies with the node.
            place = directory / "munge"
            return (["/usr/sbin/munged", "--foreground", "--force", f"--socket={place}/{MUNGE_SOCKET}",
                     f"--pid-file={place}/munged.pid", f"--log-file={place}/munged.log", f"--seed-file={place}/seed",
                     f"--key-file={etc}/munge.key", "--num-threads=2"], (munge.pw_uid, munge.pw_gid))
        if service == "slurmctld" and control:
            return ["/usr/sbin/slurmctld", "-D", "-f", str(etc / "slurm.conf")], None
        if service == "slurmdbd" and control:
            return ["/usr/sbin/slurmdbd", "-D"], None
        if service == "mariadb" and control:
            return (["/usr/sbin/mariadbd", "--no-defaults", f"--datadir={directory}/mariadb", "--skip-networking",
                     "--socket=/run/mysqld/mysqld.sock", f"--pid-file={directory}/mariadb/mariadb.pid",
                     "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M",
                     "--innodb-lock-wait-timeout=900", "--skip-log-bin"], (slurm.pw_uid, slurm.pw_gid))
        if service == "slurmd" and self.node(name)["kind"] == "compute":
            return ["/usr/sbin/slurmd", "-D", "-N", name, "-f", str(etc / "slurm.conf")], None
        if service == "sshd" and self.node(name)["kind"] in ("login", "jump"):
            config = self.node_directory(name) / "sshd_config"
            self.write(config, site_files.sshd_config(
                self.node(name)["address"], SSH_PORT, self.directory / "ssh" / f"host_{name}",
                self.directory / "ssh" / "user_ca.pub", USERS, self.node(name)["kind"] == "jump", sshd_has_penalties()))
            return ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)], None
        raise ClusterError(f"there is no {service} on {name}; there is: {', '.join(self.services_of(name))}")

    def start_service(self, service, name, wait=True):
        node = self.node(name)
        if processes.alive(node["services"].get(service)):
            return
        if not processes.alive(node.get("holder")):
            raise ClusterError(f"node '{name}' is down; start it with: deploy/testcluster start node {name}")
        argv, ids = self.command_of(service, name)
        environment = {"PATH": NODE_PATH, "LC_ALL": "C.UTF-8"}
        if service == "munge":  # a socket of a killed daemon would look alive
            place = self.munge_directory(name)
            with contextlib.suppress(FileNotFoundError):
                (place / MUNGE_SOCKET).unlink()

        def record(found):
            node["services"][service] = found
            self.save()

        processes.spawn_in(node["holder"]["pid"], argv, str(self.log(node["site"], f"{service}-{name}.out")), record,
                           environment, ids)
        if wait or service == "munge":
            self.wait_service(service, name)

    def munge_directory(self, name):
        site = self.node(name)["site"]
        return self.site_directory(site) / "munge" if name == self.control_node(site) \
            else self.node_directory(name) / "munge"

    def service_ready(self, service, name):
        record = self.node(name)["services"].get(service)
        if not processes.alive(record):
            raise ClusterError(f"{service} on {name} ended; the end of its log:\n{self.log_tail(service, name)}")
        if service == "munge":
            return self.answers_unix(self.munge_directory(name) / MUNGE_SOCKET)
        if service == "sshd":
            return self.answers_tcp(self.node(name)["address"], SSH_PORT, b"SSH-")
        if service == "slurmctld":
            return self.run(name, "scontrol", "ping", check=False).returncode == 0
        if service == "slurmdbd":
            return self.run(name, "sacctmgr", "-n", "-r", "list", "cluster", check=False).returncode == 0
        if service == "mariadb":
            return self.run(name, "mariadb", "--no-defaults", "-u", "root", "-e", "select 1", check=False).returncode == 0
        if service == "slurmd":
            result = self.run(self.control_node(self.node(name)["site"]), "sinfo", "-h", "-N", "-n", name, "-o", "%T",
                              check=False)
            states = set(result.stdout.split())
            return result.returncode == 0 and states and not any(
                s.endswith("*") or s.startswith(("down", "unknown")) for s in states)
        return True

    def wait_service(self, service, name, seconds=60):
        wait_until(f"{service} on {name} to answer", lambda: self.service_ready(service, name), seconds,
                   explain=lambda: self.log_tail(service, name))

    def log_tail(self, service, name, lines=15):
        site = self.node(name)["site"]
        candidates = [self.log(site, f"{service}-{name}.out"), self.log(site, f"{service}.log"),
                      self.log(site, f"{service}-{name}.log"), self.munge_directory(name) / "munged.log"]
        text = ""
        for path in candidates if service == "munge" else candidates[:3]:
            with contextlib.suppress(OSError):
                content = path.read_text(errors="replace").splitlines()[-lines:]
                text += f"-- {path}\n" + "\n".join(content) + "\n"
        return text

    @staticmethod
    def answers_unix(path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
                return True
            except OSError:
                return False

    @staticmethod
    def answers_tcp(address, port, greeting):
        try:
            with socket.create_connection((address, port), timeout=2) as probe:
                return probe.recv(64).startswith(greeting)
        except OSError:
            return False

    def signal_service(self, service, name, number):
        """Signals one service of a node; waits for the end where the signal means it."""
        self.command_of(service, name)  # says what there is when there is no such service
        record = self.node(name)["services"].get(service)
        if not processes.alive(record):
            if number in (signal.SIGKILL, signal.SIGTERM):
                return
            raise ClusterError(f"{service} on {name} is not running")
        if number in (signal.SIGKILL, signal.SIGTERM):
            processes.kill_and_wait(record, number, 60, f"{service} on {name}")
        else:
            processes.send(record, number)
            if number in (signal.SIGSTOP, signal.SIGCONT):
                wanted = "frozen" if number == signal.SIGSTOP else "running"
                wait_until(f"{service} to be {wanted}", lambda: processes.state_of(record) == wanted, 10)

    def kill_sessions(self, name):
        """Ends the SSH sessions of a login node, not its sshd: what a user sees when an admin kills his session."""
        listener = self.node(name)["services"].get("sshd")
        count = 0
        for record in self.inhabitants(name):
            # From OpenSSH 9.8 on a session is a program of its own, sshd-session.
            if listener and record["pid"] != listener["pid"] and self.command_name(record["pid"]).startswith("sshd"):
                count += processes.send(record, signal.SIGKILL)
        return count

    @staticmethod
    def command_name(pid):
        try:
            return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            return ""

    def inhabitants(self, name):
        """Every live process of a node but its process 1, by host id."""
        holder = self.node(name).get("holder")
        if not processes.alive(holder):
            return []
        namespace = os.readlink(f"/proc/{holder['pid']}/ns/pid")
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != holder["pid"]:
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{entry}/ns/pid") == namespace:
                        record = processes.identity(int(entry))
                        if record and processes.alive(record):
                            found.append(record)
        return found

    # -- whole nodes -------------------------------------------------------------------------------------------
    def kill_node(self, name):
        """Power failure: every process of the node at once. Its directories stay."""
        holder = self.node(name).get("holder")
        members = self.inhabitants(name)
        if processes.alive(holder):
            processes.kill_and_wait(holder, what=f"node {name}")
        wait_until(f"the processes of {name} to end", lambda: not any(map(processes.alive, members)), 20)

    def start_node(self, name):
        if processes.alive(self.node(name).get("holder")):
            return
        switch = self.state["switch"]["holder"]["pid"]
        port = self.port_of(name)
        # The kernel takes the link of a dead node away a little later than the node.
        with contextlib.suppress(ClusterError):
            self.ip([f"link del {port}"], switch)
        self.make_node(name)
        for service in self.services_of(name):
            self.start_service(service, name)

    def plug(self, name, connected):
        self.ip([f"link set {self.port_of(name)} {'up' if connected else 'down'}"],
                self.state["switch"]["holder"]["pid"])

    # -- accounting --------------------------------------------------------------------------------------------
    def make_database(self, site):
        """Begins to make an empty MariaDB, which takes seconds; start_accounting waits for it."""
        name, data, slurm = self.control_node(site), self.site_directory(site) / "mariadb", pwd.getpwnam("slurm")
        data.mkdir()
        os.chown(data, slurm.pw_uid, slurm.pw_gid)
        # The database knows its client by the Unix account behind the socket; there is no password anywhere.
        with open(self.log(site, "mariadb-install.out"), "wb") as log:
            return subprocess.Popen(self.enter(name, [
                "/usr/bin/mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=slurm", "--skip-test-db",
                "--auth-root-authentication-method=socket", "--auth-root-socket-user=slurm",
                "--innodb-log-file-size=16M"]), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start_accounting(self, site, database):
        name = self.control_node(site)
        if database.wait(120) != 0:
            raise ClusterError(f"mariadb-install-db failed; see {self.log(site, 'mariadb-install.out')}")
        self.start_service("mariadb", name)
        # slurmdbd would make its database itself, and MariaDB's client library of 11.8 then answers every query on that
        # connection with error 5027.
        self.run(name, "mariadb", "--no-defaults", "-u", "root", "-e", f"create database {site_files.ACCOUNTING_DATABASE}")
        self.start_service("slurmdbd", name)
        self.run(name, "sacctmgr", "-i", "add", "cluster", site)
        self.run(name, "sacctmgr", "-i", "add", "account", "science", f"Cluster={site}")
        self.run(name, "sacctmgr", "-i", "add", "user", ",".join(USERS), "Account=science", f"Cluster={site}")

    # -- readiness ---------------------------------------------------------------------------------------------
    def node_states(self, site):
        result = self.run(self.control_node(site), "sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False)
        return dict(line.split() for line in result.stdout.splitlines() if len(line.split()) == 2)

    def wait_idle(self, site, seconds):
        names = set(self.names("compute", site=site))

        def ready():
            for name in names:
                if not processes.alive(self.node(name)["services"].get("slurmd")):
                    raise ClusterError(f"slurmd on {name} ended:\n{self.log_tail('slurmd', name)}")
            states = self.node_states(site)
            return set(states) == names and all(state == "idle" for state in states.values())

        wait_until(f"all nodes of {site} to be idle", ready, seconds,
                   explain=lambda: f"{self.node_states(site)}\n{self.log_tail('slurmctld', self.control_node(site))}")

    def wait_usable(self, site, seconds):
        """After a fault: the controller answers and no node is down, silent or drained; jobs may run on them."""
        names = set(self.names("compute", site=site))

        def usable():
            states = self.node_states(site)
            return set(states) == names and all(state in ("idle", "mixed", "allocated", "completing")
                                                for state in states.values())

        wait_until(f"all nodes of {site} to be usable", usable, seconds, interval=0.1,
                   explain=lambda: str(self.node_states(site)))

    def check_jobs(self, site, seconds):
        """A job by sbatch and one by srun, over every node, as an ordinary user."""
        name, user, count = self.control_node(site), USERS[0], len(self.names("compute", site=site))
        result = self.run(name, "srun", f"-N{count}", "--mpi=none", "hostname", user=user, seconds=seconds)
        if sorted(result.stdout.split()) != sorted(self.names("compute", site=site)):
            raise ClusterError(f"srun ran on {result.stdout.split()}")
        mark = self.home(site, user) / "up-check"
        self.run(name, "sbatch", "--parsable", "-J", "up-check", "-o", "/dev/null", user=user, seconds=seconds,
                 text=f"#!/bin/sh\nprintf done > {mark}\n")
        wait_until(f"the first batch job of {site}", lambda: mark.exists() and mark.read_text() == "done", seconds)
        mark.unlink()
        wait_until("an empty queue", lambda: not self.run(name, "squeue", "-h").stdout.strip(), seconds)

    # -- the way in --------------------------------------------------------------------------------------------
    def start_wan(self):
        wan = self.state["wan"]
        if processes.alive(wan.get("process")):
            return
        links = {name: {"target": [self.node(name)["address"], SSH_PORT],
                        "port": wan.get("ports", {}).get(name, self.state["options"]["wan_port"]
                                                         if name == "login" else 0)}
                 for name in self.names("login", "jump")}
        config = self.directory / "wan.json"
        control = self.directory / "wan.sock"
        processes.write_json(config, {"host": self.state["options"]["wan_host"], "links": links,
                                      "control": str(control), "owner": self.state["options"]["owner"]})
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            def record(found):
                wan["process"] = found
                self.save()
            processes.spawn([PYTHON, str(HERE / "wan_proxy.py"), str(config), str(write_end)], self.directory,
                            str(self.directory / "wan.log"), record, pass_fd=write_end, report_fd=read_end)
            os.close(write_end)
            write_end = None
            answer = os.read(read_end, 65536).decode(errors="replace")
        finally:
            os.close(read_end)
            if write_end is not None:
                os.close(write_end)
        if not answer.startswith("{"):
            raise ClusterError(f"the WAN proxy did not start: {answer[1:] or self.directory / 'wan.log'}")
        wan["ports"] = json.loads(answer)
        wan["host"] = self.state["options"]["wan_host"]
        wan["control"] = str(control)
        self.save()

    def wan(self, request):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(10)
            try:
                channel.connect(str(self.directory / "wan.sock"))
                channel.sendall(json.dumps(request).encode() + b"\n")
                answer = b"".join(iter(lambda: channel.recv(65536), b""))
            except OSError as error:
                raise ClusterError(f"the WAN proxy does not answer ({error.strerror or error}); start it with: "
                                   f"deploy/testcluster start wan") from error
        answer = json.loads(answer)
        if "error" in answer:
            raise ClusterError(answer["error"])
        return answer

    def write_client_files(self):
        state, keys = self.state, self.directory / "ssh"
        known, entries = "", []
        for name in self.names("login", "jump"):
            public = " ".join((keys / f"host_{name}.pub").read_text().split()[:2])
            known += f"[{state['wan']['host']}]:{state['wan']['ports'][name]} {public}\n"
            known += f"{self.node(name)['address']} {public}\n"
            for user in USERS:
                suffix = "" if user == USERS[0] else f"-{user}"
                common = (user, keys / user, keys / "known_hosts")
                entries.append((f"{name}{suffix}", state["wan"]["host"], state["wan"]["ports"][name], *common))
                entries.append((f"{name}{suffix}-direct", self.node(name)["address"], SSH_PORT, *common))
            entries.append((f"{name}-forced", state["wan"]["host"], state["wan"]["ports"][name], USERS[0],
                            keys / "forced", keys / "known_hosts"))
        self.write(keys / "known_hosts", known)
        self.write(keys / "config", site_files.ssh_config(entries))

    # -- status ------------------------------------------------------------------------------------------------
    def status(self):
        if not self.load():
            return {"state": "down", "directory": str(self.directory)}
        state, keys = self.state, self.directory / "ssh"
        nodes = {}
        for name, node in state["nodes"].items():
            services = {service: {**record, "state": processes.state_of(record)}
                        for service, record in node["services"].items()}
            entry = {"site": node["site"], "kind": node["kind"], "hostname": name, "address": node.get("address"),
                     "alive": processes.alive(node.get("holder")), "process_1": node.get("holder"),
                     "services": services}
            if node["kind"] != "compute":
                entry["ssh"] = {"direct_host": node.get("address"), "direct_port": SSH_PORT,
                                "wan_host": state["wan"].get("host"), "wan_port": state["wan"].get("ports", {}).get(name)}
                with contextlib.suppress(OSError, subprocess.CalledProcessError):
                    entry["ssh"]["host_key"] = (keys / f"host_{name}.pub").read_text().strip()
                    entry["ssh"]["fingerprint"] = subprocess.run(
                        ["/usr/bin/ssh-keygen", "-lf", str(keys / f"host_{name}.pub")], capture_output=True, text=True,
                        check=True).stdout.split()[1]
            nodes[name] = entry
        sites = {}
        for site, about in state["sites"].items():
            directory = self.site_directory(site)
            sites[site] = {
                "cluster": about["cluster"], "control": about["control"], "slurmctld_port": about["port"],
                "partitions": about["partitions"], "logins": self.names("login", site=site),
                "compute": self.names("compute", site=site), "directory": str(directory),
                "slurm_conf": str(self.slurm_conf(site)), "environment": {"SLURM_CONF": str(self.slurm_conf(site))},
                "homes": {user["name"]: str(self.home(site, user["name"])) for user in state["users"]},
                "shared": str(directory / "shared"), "logs": str(directory / "log"),
                "slurmctld_log": str(directory / "log" / "slurmctld.log")}
        result = {
            "state": state["phase"], "directory": str(self.directory), "prefix": state["prefix"],
            "link": state["link"], "subnet": state.get("subnet"), "gateway_address": state.get("gateway_address"),
            "up_seconds": state.get("up_seconds"), "options": state["options"], "users": state["users"],
            "keys": {name: str(keys / name) for name in (*USERS, "forced", "user_ca", "stranger")},
            "forced_command": state["options"]["forced_command"],
            "known_hosts": str(keys / "known_hosts"), "ssh_config": str(keys / "config"),
            "switch": state["switch"].get("holder"), "sites": sites, "nodes": nodes,
            "wan": {"process": state["wan"].get("process"), "control": state["wan"].get("control")}}
        if state["phase"] == "up":
            with contextlib.suppress(ClusterError):
                result["wan"]["links"] = self.wan({"action": "status"})
        return result

    # -- down --------------------------------------------------------------------------------------------------
    def down(self):
        """Removes the cluster, whole or half made. Returns False if there was none."""
        if not self.directory.exists():
            return False
        if not (self.directory / MARKER).exists() and {path.name for path in self.directory.iterdir()} != {"lock"}:
            raise ClusterError(f"{self.directory} is not a cluster's directory (no {MARKER}); nothing was touched")
        if os.geteuid() != 0:
            raise ClusterError("needs root; run it with sudo")
        try:
            with self.locked(90, evict=True):
                with contextlib.suppress(ClusterError):
                    self.load()
                self.remove_all()
                self.remove_directory()
        except ClusterError:
            if self.directory.exists():
                raise  # else the `up` that was asked to stop has removed everything itself
        return True

    def remove_all(self):
        state = self.state or {}
        holders = [node.get("holder") for node in state.get("nodes", {}).values()]
        holders += [state.get("switch", {}).get("holder"), state.get("wan", {}).get("process")]
        holders = [record for record in holders if record]
        # A child between its birth and its note in the state ends by itself; one that carries our mark is ended here.
        ours = {record["pid"]: record for record in holders}
        ours.update({record["pid"]: record for record in processes.marked(self.directory)})
        starting = state.get("starting") or {}
        ours.pop(starting.get("pid"), None)
        members = []
        for name in state.get("nodes", {}):
            members += self.inhabitants(name)
        for record in ours.values():
            processes.send(record, signal.SIGKILL)
        everything = list(ours.values()) + members
        wait_until("all processes of the cluster to end", lambda: not any(map(processes.alive, everything)), 30,
                   explain=lambda: str([record for record in everything if processes.alive(record)]))
        link = state.get("link") or f"{default_prefix(self.directory)}0"
        if self.link_exists(link):
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)  # may be going already
            wait_until(f"the link {link} to go", lambda: not self.link_exists(link), 30)
        for mount in reversed(self.mounts()):
            result = subprocess.run(["umount", "-l", mount], capture_output=True, text=True, check=False)
            if result.returncode != 0 and mount in self.mounts():
                raise ClusterError(f"cannot unmount {mount}: {result.stderr.strip()}")

    @staticmethod
    def link_exists(link):
        return os.path.exists(f"/proc/sys/net/ipv4/conf/{link}")

    def mounts(self):
        found = []
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                path = line.split()[4].encode().decode("unicode_escape")
                if path == str(self.directory) or path.startswith(f"{self.directory}/"):
                    found.append(path)
        return found

    def remove_content(self):
        if self.mounts():
            raise ClusterError(f"{self.directory} is not safe to remove: {', '.join(self.mounts())} is mounted")
        for path in self.directory.iterdir():
            if path.name not in (MARKER, "lock", "state.json"):
                self.remove_tree(path)

    def remove_directory(self):
        # State, marker and lock last: cut off in the middle, the next `down` still knows what this is.
        self.remove_content()
        for name in ("state.json", MARKER, "lock"):
            with contextlib.suppress(FileNotFoundError):
                (self.directory / name).unlink()
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    @staticmethod
    def remove_tree(path):
        if path.is_dir() and not path.is_symlink():
            try:
                shutil.rmtree(path)
            except OSError as error:  # the kernel may still be ending a dead node's processes and taking its mounts away
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise
                wait_until(f"{path} to be free", lambda: not shutil.rmtree(path, ignore_errors=True)
                           and not path.exists(), 20)
        else:
            path.unlink()
