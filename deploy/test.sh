#!/usr/bin/env bash
# Installs what is missing, builds everything and runs every test; can be run again.
#   deploy/test.sh                 unit, contract, integration, end-to-end, Python and the notebook
#   deploy/test.sh --sanitizers    also unit, contract and integration tests of the services built with ASan+UBSan and
#                                  with TSan, and the services compiled by clang with -Wthread-safety (three more builds)
# As root also the tests on a real SLURM cluster behind SSH, in network namespaces (label `cluster`); as another user these are
# left out, and the end says so.
#   deploy/test.sh -R REGEX        only the tests whose name matches (passed to ctest)
# Ends with the time of each step and ctest's own summary over all suites. Leaves nothing running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/common.sh

sanitizers=0
ctest_arguments=()
while (($#)); do
  case "$1" in
    --sanitizers) sanitizers=1 ;;
    -h | --help) usage_of "$0"; exit 0 ;;
    -R | -L | -E) ctest_arguments+=("$1" "$2"); shift ;;
    *) echo "test.sh: unknown option '$1'; see deploy/test.sh --help" >&2; exit 2 ;;
  esac
  shift
done

step "packages"
purposes=(build test)
cluster=OFF
if ((EUID == 0)); then
  purposes+=(cluster)
  cluster=ON
fi
deploy/install-packages.sh "${purposes[@]}"
prepare_compiler_cache

builds=(dev)
if ((sanitizers)); then builds+=(asan tsan); fi
for preset in "${builds[@]}"; do
  step "build: $preset"
  # The cluster is one for all builds: its tests belong to the first.
  run_logged "configure $preset" cmake --preset "$preset" -DITWIN_TEST_CLUSTER="$([[ $preset == dev ]] && echo "$cluster" || echo OFF)"
  build_targets "$(build_directory "$preset")" all
done
if ((sanitizers)); then
  step "build: clang, thread safety as errors"  # nothing of it is run
  run_logged "configure clang" cmake --preset clang
  build_targets build-clang all
fi

step "tests"
# One ctest over all builds, so that there is one summary.
mkdir -p build/all
{
  for preset in "${builds[@]}"; do echo "subdirs(\"$PWD/$(build_directory "$preset")\")"; done
} >build/all/CTestTestfile.cmake
# Two at a time; tests that measure or load the machine ask to run alone.
status=0
ctest --test-dir build/all --output-on-failure -j2 "${ctest_arguments[@]}" || status=$?
if [[ $cluster == OFF ]]; then
  echo "left out, because this user is not root: the tests on a real SLURM cluster (label cluster: e2e/testcluster, e2e/site_cluster, faults)"
fi
exit "$status"
