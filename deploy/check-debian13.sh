#!/usr/bin/env bash
# Makes a Debian 13 root in a folder, builds everything there and runs the tests: LibTorch 2.6, Open MPI 5, newer libssh.
#   deploy/check-debian13.sh                 all of it
#   deploy/check-debian13.sh --worker        only the training worker, with its tests
#   deploy/check-debian13.sh --root DIR      the root's place (default /var/tmp/itwin-debian13; about 8 GB); kept for the
#                                            next time, delete it when you are done
#   deploy/check-debian13.sh --build         configure and build, run no tests
#   deploy/check-debian13.sh -R REGEX        only the tests whose name matches; -E, -L and -LE as of ctest
# Needs root (chroot, mounts). The sources are seen read-only in the root; the build lies in DIR/build. Takes long: 19 is
# its niceness.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/common.sh

root=/var/tmp/itwin-debian13 worker=0 tests=1 jobs=$(build_jobs) ctest_arguments=()
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
while (($#)); do
  case "$1" in
    --worker) worker=1 ;;
    --build) tests=0 ;;
    --root) root=$2; shift ;;
    --jobs) jobs=$2; shift ;;
    -R | -E | -L | -LE) ctest_arguments+=("$1" "$2"); shift ;;
    -h | --help) usage_of "$0"; exit 0 ;;
    *) echo "check-debian13.sh: unknown option '$1'; see deploy/check-debian13.sh --help" >&2; exit 2 ;;
  esac
  shift
done
if ((EUID != 0)); then
  echo "check-debian13.sh: a chroot needs root; run it as root (sudo deploy/check-debian13.sh)" >&2
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

mounted=()
unmount_all() {
  local at
  for at in "${mounted[@]}"; do umount -l "$at" 2>/dev/null || true; done
}
trap unmount_all EXIT
mount_at() {  # SOURCE TARGET OPTIONS...
  local source=$1 target=$2
  shift 2
  mkdir -p "$target"
  mount "$@" "$source" "$target"
  mounted=("$target" "${mounted[@]}")
}
mount_at proc "$root/proc" -t proc
mount_at sysfs "$root/sys" -t sysfs -o ro  # Open MPI looks for the processors there
mount_at /dev "$root/dev" --bind
mount_at /dev/pts "$root/dev/pts" --bind
mount_at tmpfs "$root/dev/shm" -t tmpfs -o size=2g  # Open MPI's shared memory
mount_at "$PWD" "$root/src" --bind
mount -o remount,ro,bind "$root/src"
cp /etc/resolv.conf "$root/etc/resolv.conf"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"  # no service of a package starts in here
chmod 755 "$root/usr/sbin/policy-rc.d"

inside() {
  chroot "$root" /usr/bin/env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 TERM="${TERM:-dumb}" \
    DEBIAN_FRONTEND=noninteractive OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
    PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1 CCACHE_DIR=/var/cache/ccache bash -euo pipefail -c "$1"
}

step "packages"
purposes="build test"
((worker)) && purposes="worker"
inside "cd /src && deploy/install-packages.sh $purposes"

step "configure"
options="-DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO='-O1 -g1 -DNDEBUG'"
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
step "done: $(cat "$root/etc/debian_version"), $(inside "dpkg-query -W -f='\${Package} \${Version}, ' libtorch-dev openmpi-bin libnetcdf-dev")"
