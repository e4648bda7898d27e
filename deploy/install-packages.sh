#!/usr/bin/env bash
# Installs the Debian packages that a purpose needs, and only those that are missing.
#   deploy/install-packages.sh build            what compiling needs (quickstart, test)
#   deploy/install-packages.sh build test       also what the test suites need
#   deploy/install-packages.sh worker           what the training worker alone and its tests need
#   deploy/install-packages.sh cluster          SLURM, munge, sshd, MariaDB for deploy/testcluster
# No service of theirs (sshd, munge ...) is started, and none is enabled at boot.
# Runs apt-get only when something is missing; uses sudo when not root.
set -euo pipefail

build_packages=(
  build-essential cmake ninja-build ccache pkg-config ca-certificates git python3
  libgrpc++-dev protobuf-compiler-grpc protobuf-compiler libprotobuf-dev
  libssh-dev libsqlite3-dev libsqlitecpp-dev libssl-dev libspdlog-dev libfmt-dev libabsl-dev
  libyaml-cpp-dev libcli11-dev nlohmann-json3-dev libsimdjson-dev libgtest-dev libgmock-dev
  libbenchmark-dev libtorch-dev libopenblas0-pthread libopenblas-dev libopenmpi-dev openmpi-bin
  libnetcdf-dev libhdf5-dev libblosc1 libzstd1 ferret-datasets
)
test_packages=(
  sqlite3 python3-pytest python3-grpcio python3-protobuf python3-torch python3-numpy python3-scipy python3-yaml python3-pandas
  python3-matplotlib python3-ipywidgets python3-ipykernel python3-setuptools python3-pip
  python3-wheel python3-zarr jupyter-nbconvert jupyter-client zip curl openssl clang libclang-rt-dev
  strace procps util-linux openssh-server openssh-client
)
worker_packages=(
  build-essential cmake ninja-build ccache pkg-config python3 python3-torch python3-numpy python3-scipy python3-pytest
  python3-yaml python3-zarr libssl-dev nlohmann-json3-dev libgtest-dev libgmock-dev libbenchmark-dev libtorch-dev libopenblas0-pthread
  libopenblas-dev libopenmpi-dev openmpi-bin libnetcdf-dev libhdf5-dev zlib1g-dev libblosc1 libzstd1 ferret-datasets procps
)
# mariadb-server-core is the program without the system service, its user or its data.
cluster_packages=(
  slurm-wlm slurm-client slurmdbd slurm-wlm-mysql-plugin munge openssh-server openssh-client
  mariadb-server-core mariadb-client-core openmpi-bin libopenmpi-dev gcc libc6-dev
  iproute2 util-linux python3 python3-pytest faketime libfuse3-dev pkg-config
)

wanted=()
for purpose in "${@:-build}"; do
  case "$purpose" in
    build) wanted+=("${build_packages[@]}") ;;
    test) wanted+=("${test_packages[@]}") ;;
    worker) wanted+=("${worker_packages[@]}") ;;
    cluster) wanted+=("${cluster_packages[@]}") ;;
    *) echo "install-packages.sh: unknown purpose '$purpose'; known: build, test, worker, cluster" >&2; exit 2 ;;
  esac
done

# npm may come with a Node.js from elsewhere, which Debian's package would conflict with.
if [[ " $* " == *" test "* ]] && ! command -v npm >/dev/null; then wanted+=(npm); fi

missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null || true)
  [[ "$status" == "install ok installed" ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  echo "packages: all ${#wanted[@]} present"
  exit 0
fi

as_root=()
if ((EUID != 0)); then
  command -v sudo >/dev/null || {
    echo "packages: ${#missing[@]} are missing and this user is not root and has no sudo. As root, run:" >&2
    echo "  apt-get update && apt-get install -y ${missing[*]}" >&2
    exit 1
  }
  as_root=(sudo)
fi
echo "packages: installing ${#missing[@]} missing of ${#wanted[@]}: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive

# Packages of the tests and of the cluster bring services (sshd, munged, slurmd ...) that this machine has not asked for:
# nothing may start now, and what was not enabled before is not started by the next boot either.
services=(ssh munge slurmctld slurmd slurmdbd)
policy=/usr/sbin/policy-rc.d
guarded=() unwanted=()
restore_policy() { ((${#guarded[@]} == 0)) || "${as_root[@]}" rm -f "${guarded[@]}"; }
if [[ " $* " == *" cluster "* || " $* " == *" test "* ]]; then
  if [[ ! -e $policy ]]; then
    trap restore_policy EXIT
    guarded=("$policy")
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
  fi
  if [[ -d /run/systemd/system ]]; then
    for service in "${services[@]}"; do
      systemctl is-enabled --quiet "$service" 2>/dev/null || unwanted+=("$service")
    done
  fi
fi

"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
if ((${#unwanted[@]})); then "${as_root[@]}" systemctl disable --quiet "${unwanted[@]}" 2>/dev/null || true; fi
