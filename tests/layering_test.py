#!/usr/bin/env python3
"""Who may include whom (docs/architecture.md), and words that may not stand where they do not belong.

Reads the sources as text. Prints each breach as file:line and why; exit 1 if there is any.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = {  # a folder and the folders of ours it may include
    "common": ["common", "itwin"],
    "server": ["common", "server", "itwin"],
    "agent/worker": ["agent/worker"],
    "agent": ["common", "agent", "itwin"],
    "client": ["common", "client", "itwin"],
}
# Inside server/: what each folder may use beside itself.
SERVER = {
    "store": [],
    "artifacts": [],
    "jobs": ["store", "artifacts"],
    "tunnel": [],
    "dispatch": ["jobs", "store", "artifacts", "tunnel"],
    "rpc": ["jobs", "store", "artifacts"],
    "sites": ["jobs", "store", "artifacts", "tunnel", "dispatch"],
}
GRPC_PLACES = re.compile(r"(/rpc/|^client/src/|agent_client\.|^common/grpc_status\.|^server/gateway\.cc|^agent/agent\.cc)")
# A foreign header and where alone it may be included.
FOREIGN = [
    (r"<sqlite3\.h>|<SQLiteCpp/", r"^server/store/"),
    (r"<libssh/", r"^server/tunnel/ssh_session\."),
    (r"<(torch|ATen|c10|caffe2)/", r"^agent/worker/"),
    (r"<cuda|<(ATen|c10)/cuda/", r"^agent/worker/device/gpu_cuda\.cc"),
    (r"<mpi\.h>", r"^agent/worker/dist/"),
    (r"<netcdf\.h>", r"^agent/worker/data/netcdf\."),
    (r"<yaml-cpp/", r"^(common/spec/|server/sites/site_file|client/src/)"),
    (r"<CLI/", r"^(server/(main|config)|client/cli/|agent/main)"),
]
WORDS = [  # a pattern of code and where alone it may stand
    (r"\b(fork|execve?|execvp|posix_spawnp?|popen|system)\s*\(", r"^(common/subprocess\.cc)"),
    (r"\b(sbatch|squeue|scancel|sacct|scontrol|srun)\b", r"^agent/scheduler/slurm"),
    (r"\bstate\s*=\s*JobState::k", r"^(common/job_state|server/store/job_rows\.h)"),  # there: a default
]
BANNED = re.compile(r"^(util|utils|helper|helpers|misc|manager|info|base)$")


def program_of(path):
    for name in ("agent/worker", "common", "server", "agent", "client"):
        if path.startswith(name + "/"):
            return name
    return None


def breaches():
    for file in sorted(ROOT.glob("*/**/*")):
        path = file.relative_to(ROOT).as_posix()
        if path.startswith(("build", ".")) or file.suffix not in (".h", ".cc"):
            continue
        if BANNED.match(file.stem):
            yield path, 0, f"'{file.stem}' is no name: say what it is"
        lines = file.read_text(encoding="utf-8").splitlines()
        if path.startswith("tests/"):
            if not path.startswith(("tests/testing/", "tests/benchmark/")):
                for number, line in enumerate(lines, 1):
                    if re.search(r"\b(sleep_for|SleepFor|usleep|nanosleep|sleep)\s*\(", line):
                        yield path, number, "a test may not sleep: wait for an event with a deadline"
            continue
        program = program_of(path)
        if program is None:
            continue
        for number, line in enumerate(lines, 1):
            ours = re.match(r'\s*#include "([^"]+)"', line)
            if ours:
                target = ours.group(1)
                known = target.split("/")[0] in ("common", "server", "agent", "client", "tests")
                if known and not any(target.startswith(prefix + "/") for prefix in PROGRAMS[program]) or (
                    program == "agent" and target.startswith("agent/worker/")
                ):
                    yield path, number, f"{program}/ may not include {target}"
                parts = path.split("/")
                to = target.split("/")
                if program == "server" and len(parts) > 2 and to[0] == "server":
                    if len(to) == 2 or to[1] not in SERVER[parts[1]] + [parts[1]]:
                        yield path, number, f"server/{parts[1]}/ may not include {target}"
            foreign = re.match(r"\s*#include\s+(<[^>]+>)", line)
            if foreign or ours:
                header = foreign.group(1) if foreign else ours.group(1)
                if re.search(r"<grpcpp/|\.grpc\.pb\.h", header) and not GRPC_PLACES.search(path):
                    yield path, number, f"gRPC ({header}) belongs into rpc/ folders and client/src/"
                for pattern, places in FOREIGN:
                    if re.search(pattern, header) and not re.search(places, path):
                        yield path, number, f"{header} is included outside {places}"
            code = line.split("//")[0]
            if '"' in code:
                code = re.sub(r'"(\\.|[^"\\])*"', '""', code)
            for pattern, places in WORDS:
                if re.search(pattern, code) and not re.search(places, path) and "#include" not in line:
                    yield path, number, f"{pattern} outside {places}"


def main():
    found = list(breaches())
    for path, number, why in found:
        print(f"{path}:{number}: {why}")
    print(f"layering: {len(found)} breaches")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
