"""The text of every configuration file of a site. Pure functions: nothing here touches the machine."""


def slurm_conf(site, options):
    """`site`: dict with cluster, control (host, address), paths, nodes [(name, address)], gpus, accounting host."""
    cpus, memory = options["cpus"], options["memory"]
    lines = [
        f"ClusterName={site['cluster']}",
        f"SlurmctldHost={site['control'][0]}({site['control'][1]})",
        f"SlurmctldPort={site['port']}",
        f"SlurmdPort={site['port'] + 1}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={site['munge_socket']}",
        "SlurmUser=slurm",
        "SlurmdUser=root",
        f"StateSaveLocation={site['directory']}/slurmctld",
        f"SlurmdSpoolDir={site['directory']}/nodes/%n/slurmd",
        f"SlurmctldPidFile={site['directory']}/slurmctld/slurmctld.pid",
        f"SlurmdPidFile={site['directory']}/nodes/%n/slurmd.pid",
        f"SlurmctldLogFile={site['directory']}/log/slurmctld.log",
        f"SlurmdLogFile={site['directory']}/log/slurmd-%n.log",
        "SlurmctldDebug=info",
        "SlurmdDebug=info",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU_Memory",
        f"DefMemPerCPU={max(1, memory // cpus)}",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "MpiDefault=pmix",
        f"MinJobAge={options['min_job_age']}",
        f"MessageTimeout={options['message_timeout']}",
        f"KillWait={options['kill_wait']}",
        f"SlurmdTimeout={options['slurmd_timeout']}",
        "SlurmctldTimeout=60",
        "InactiveLimit=0",
    ]
    if options["accounting"]:
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            f"AccountingStorageHost={site['control'][1]}",
            f"AccountingStoragePort={site['port'] + 2}",
            f"AccountingStoragePass={site['munge_socket']}",  # with munge: where its socket is
            "AccountingStoreFlags=job_comment",
        ]
    if options["accounting"] or options["memory_kill"]:
        lines += ["JobAcctGatherType=jobacct_gather/linux", "JobAcctGatherFrequency=task=1"]
    if options["memory_kill"]:
        lines.append("JobAcctGatherParams=OverMemoryKill")
    if options["gpus"]:
        lines.append("GresTypes=gpu")
    gres = f" Gres=gpu:{options['gpus']}" if options["gpus"] else ""
    for name, address in site["nodes"]:
        lines.append(f"NodeName={name} NodeAddr={address} CPUs={cpus} RealMemory={memory}{gres} State=UNKNOWN")
    lines += partitions(",".join(name for name, _ in site["nodes"]), options["preemption"])
    lines += options["slurm_conf"]
    return "\n".join(lines) + "\n"


def partitions(nodes, preemption):
    """main: an hour; short: one minute, the smallest limit that SLURM knows; low and high: with preemption."""
    lines = [
        f"PartitionName=main Nodes={nodes} Default=YES DefaultTime=00:10:00 MaxTime=01:00:00 State=UP",
        f"PartitionName=short Nodes={nodes} DefaultTime=00:01:00 MaxTime=00:01:00 State=UP",
        f"PartitionName=two Nodes={nodes} DefaultTime=00:02:00 MaxTime=00:02:00 State=UP",
    ]
    if preemption != "off":
        mode = {"requeue": "REQUEUE", "cancel": "CANCEL", "suspend": "SUSPEND,GANG"}[preemption]
        share = " OverSubscribe=FORCE:1" if preemption == "suspend" else ""
        low = {"requeue": "REQUEUE", "cancel": "CANCEL", "suspend": "SUSPEND"}[preemption]
        lines = ["PreemptType=preempt/partition_prio", f"PreemptMode={mode}"] + [
            line + share for line in lines] + [
            f"PartitionName=low Nodes={nodes} DefaultTime=00:10:00 MaxTime=01:00:00 PriorityTier=1 "
            f"PreemptMode={low} State=UP{share}",
            f"PartitionName=high Nodes={nodes} DefaultTime=00:10:00 MaxTime=01:00:00 PriorityTier=10 "
            f"PreemptMode=OFF State=UP{share}",
        ]
    return lines


def partition_names(preemption):
    return ["main", "short", "two"] + ([] if preemption == "off" else ["low", "high"])


ACCOUNTING_DATABASE = "accounting"


def slurmdbd_conf(site):
    return "\n".join([
        "AuthType=auth/munge",
        f"AuthInfo=socket={site['munge_socket']}",
        f"DbdHost={site['control'][0]}",
        f"DbdAddr={site['control'][1]}",
        f"DbdPort={site['port'] + 2}",
        "SlurmUser=slurm",
        "DebugLevel=info",
        f"LogFile={site['directory']}/log/slurmdbd.log",
        f"PidFile={site['directory']}/slurmctld/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        "StorageUser=slurm",
        f"StorageLoc={ACCOUNTING_DATABASE}",
    ]) + "\n"


def mpi_conf():
    # Each node has its own /var/tmp; with a shared one the second node fails with "Cannot create client cli tmpdir".
    return "PMIxCliTmpDirBase=/var/tmp\n"


def cgroup_conf():
    # Nothing is confined. But slurmd looks for a cgroup version before it knows that, and stops in a container where
    # it finds none, or finds v2 and no systemd to ask. Version 1 touches nothing until it is used.
    return "CgroupPlugin=cgroup/v1\n"


def gres_conf(device_pattern):
    return f"AutoDetect=off\nName=gpu File={device_pattern}\n"


def sshd_config(address, port, host_key, user_ca, users, forwarding, penalties):
    """`penalties`: this sshd locks out addresses that fail often (OpenSSH 9.8 and later); all clients have the WAN's."""
    allowed = "yes" if forwarding else "no"
    return "\n".join([
        f"Port {port}",
        f"ListenAddress {address}",
        f"HostKey {host_key}",
        f"TrustedUserCAKeys {user_ca}",
        "PidFile none",
        "UsePAM no",
        "UseDNS no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PermitRootLogin no",
        f"AllowUsers {' '.join(users)}",
        f"AllowTcpForwarding {allowed}",
        "AllowStreamLocalForwarding no",
        "AllowAgentForwarding no",
        "X11Forwarding no",
        "PrintMotd no",
        "PrintLastLog no",
        "LogLevel VERBOSE",
        "Subsystem sftp internal-sftp",
        *(["PerSourcePenalties no"] if penalties else []),
    ]) + "\n"


def ssh_config(entries):
    """`entries`: (alias, host, port, user, key, known_hosts)."""
    text = "# ssh -F THIS_FILE ALIAS\n"
    for alias, host, port, user, key, known_hosts in entries:
        text += "\n".join([
            f"Host {alias}",
            f"  HostName {host}",
            f"  Port {port}",
            f"  User {user}",
            f"  IdentityFile {key}",
            "  IdentitiesOnly yes",
            f"  UserKnownHostsFile {known_hosts}",
            "  GlobalKnownHostsFile /dev/null",
            "  StrictHostKeyChecking yes",
            "  BatchMode yes",
            "  LogLevel ERROR",
        ]) + "\n"
    return text


def passwd(system_text, users, homes):
    """The system's accounts and ours; `*` is a password that nobody has, and not a locked account for sshd."""
    names = {user["name"] for user in users}
    kept = [line for line in system_text.splitlines() if line.split(":")[0] not in names]
    ours = [f"{u['name']}:*:{u['uid']}:{u['gid']}:{u['name']}:{homes}/{u['name']}:/bin/bash" for u in users]
    return "\n".join(kept + ours) + "\n"


def group(system_text, users):
    names = {user["name"] for user in users}
    kept = [line for line in system_text.splitlines() if line.split(":")[0] not in names]
    return "\n".join(kept + [f"{u['name']}:x:{u['gid']}:" for u in users]) + "\n"


def hosts(nodes):
    return "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in nodes)
