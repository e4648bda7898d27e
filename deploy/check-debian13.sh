#!/usr/bin/env bash
# Makes a Debian 13 root in a folder, builds everything there and runs every test: LibTorch 2.6, Open MPI 5, SLURM 24.11, newer
# libssh, OpenSSH, absl.
#   deploy/check-debian13.sh                 all of it, with the tests on a real SLURM cluster
#   deploy/check-debian13.sh --worker        only the training worker, with its tests
#   deploy/check-debian13.sh --cuda          the same against LibTorch with CUDA and NCCL (Debian's contrib and non-free), in a
#                                            root of its own; this machine needs no GPU: it is told apart from one at run time
#   deploy/check-debian13.sh --root DIR      the root's place (default /var/tmp/itwin-debian13, about 8 GB, with --cuda
#                                            /var/tmp/itwin-debian13-cuda, about 14); kept for the next time, delete it when done
#   deploy/check-debian13.sh --build         configure and build, run no tests
#   deploy/check-debian13.sh -R REGEX        only the tests whose name matches; -E, -L and -LE as of ctest (-LE cluster)
# Needs root (mounts, namespaces). The sources are seen read-only in the root; the build lies in DIR/build. Takes long: 19 is
# its niceness.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/common.sh

root="" worker=0 cuda=0 tests=1 jobs=$(build_jobs) ctest_arguments=()
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
while (($#)); do
  case "$1" in
    --worker) worker=1 ;;
    --cuda) worker=1 cuda=1 ;;
    --build) tests=0 ;;
    --root) root=$2; shift ;;
    --jobs) jobs=$2; shift ;;
    -R | -E | -L | -LE) ctest_arguments+=("$1" "$2"); shift ;;
    -h | --help) usage_of "$0"; exit 0 ;;
    *) echo "check-debian13.sh: unknown option '$1'; see deploy/check-debian13.sh --help" >&2; exit 2 ;;
  esac
  shift
done
: "${root:=/var/tmp/itwin-debian13$( ((cuda)) && echo -cuda || true)}"
if ((EUID != 0)); then
  echo "check-debian13.sh: mounts and namespaces need root; run it as root (sudo deploy/check-debian13.sh)" >&2
  exit 1
fi
renice -n 19 $$ >/dev/null

step "Debian 13 in $root"
if [[ ! -e $root/etc/debian_version ]]; then
  command -v debootstrap >/dev/null || {
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends debootstrap
  }
  mkdir -p "$root"
  debootstrap --variant=minbase trixie "$root" "$mirror"
fi

cp /etc/resolv.conf "$root/etc/resolv.conf"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"  # no service of a package starts in here
chmod 755 "$root/usr/sbin/policy-rc.d"
mkdir -p "$root/src" "$root/old"

# A command in the root, which is the / of a mount namespace of its own: what is mounted goes with the command, and the test
# cluster can make namespaces below it, which it could not in a chroot.
enter_root='
  root=$1 command=$2
  mount -t proc proc "$root/proc"
  mount --rbind /sys "$root/sys"  # Open MPI looks for the processors there
  mount --rbind /dev "$root/dev"
  mount -t tmpfs -o size=2g tmpfs "$root/dev/shm"  # shared memory of Open MPI
  mount --bind "$PWD" "$root/src"
  mount -o remount,ro,bind "$root/src"
  mount --rbind "$root" "$root"
  cd "$root"
  pivot_root . old
  exec chroot . bash -euo pipefail -c "umount -l /old; $command"'
inside() {
  env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 TERM="${TERM:-dumb}" DEBIAN_FRONTEND=noninteractive \
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    CCACHE_DIR=/var/cache/ccache unshare --mount --propagation private bash -euo pipefail -c "$enter_root" enter "$root" "$1"
}

step "packages"
purposes="build test cluster"
((worker)) && purposes="worker"
cuda_packages='
  if [[ ! -e /usr/lib/x86_64-linux-gnu/libtorch_cuda.so ]]; then
    deploy/install-packages.sh worker
    sed -i "s/ main$/ main contrib non-free non-free-firmware/" /etc/apt/sources.list
    apt-get update -q
    # These take the place of the packages without CUDA. cuDNN is fetched from NVIDIA by its package, which may fail.
    apt-get install -y -q --no-install-recommends libtorch-cuda-dev python3-torch-cuda libnccl-dev nvidia-cuda-toolkit ||
      test -e /usr/lib/x86_64-linux-gnu/libtorch_cuda.so
  fi
  if [[ ! -e /usr/lib/x86_64-linux-gnu/libcudnn.so.9 ]]; then
    echo "cuDNN cannot be fetched: a stand-in without any function of it lets programs link; without a GPU none is called"
    cd /tmp
    nm -D /usr/lib/x86_64-linux-gnu/libtorch*.so | sed -n "s/.* U \(cudnn[A-Za-z0-9_]*\).*/void \1(void) { __builtin_trap(); }/p" | sort -u >cudnn.c
    echo "libcudnn.so.9 { global: cudnn*; };" >cudnn.map
    gcc -shared -fPIC -Wl,-soname,libcudnn.so.9 -Wl,--version-script=cudnn.map -o /usr/lib/x86_64-linux-gnu/libcudnn.so.9 cudnn.c
  fi'
if ((cuda)); then
  inside "cd /src; ($cuda_packages)"
else
  inside "cd /src && deploy/install-packages.sh $purposes"
fi

step "configure"
options="-DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO='-O1 -g1 -DNDEBUG' -DITWIN_TEST_CLUSTER=$( ((worker)) && echo OFF || echo ON)"
((worker)) && options+=" -DITWIN_BUILD_SERVICES=OFF -DITWIN_BUILD_PYTHON=OFF"
inside "cmake -S /src -B /build -G Ninja $options"

step "build"
inside "ninja -C /build -k 0 -j $jobs"  # all that is wrong at once

if ((tests)); then
  step "tests"
  quoted=""
  for argument in "${ctest_arguments[@]}"; do quoted+=" $(printf '%q' "$argument")"; done
  inside "ctest --test-dir /build --output-on-failure -j $jobs$quoted"
fi
step "done: $(cat "$root/etc/debian_version"), $(inside "dpkg-query -W -f='\${Package} \${Version}, ' libtorch$( ((cuda)) && echo -cuda || true)-dev openmpi-bin libnetcdf-dev")"
