#!/usr/bin/env bash
# Many jobs on a real SLURM cluster on this machine while something is broken every few seconds; then every job is checked.
#   deploy/soak.sh [--jobs 200] [--minutes 10] [--seed N]   the randomised run; the same seed, the same faults in the same order
#   deploy/soak.sh --faults                                 the fault tests that deploy/test.sh leaves out for their length
# Needs root and what deploy/test.sh builds. Ends with a table and exit status 0 only if every check of every job held.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/common.sh

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then usage_of "$0"; exit 0; fi
if ((EUID != 0)); then echo "soak.sh: the cluster needs root; run: sudo deploy/soak.sh $*" >&2; exit 2; fi

step "packages"
deploy/install-packages.sh build test cluster
prepare_compiler_cache
step "build"
[[ -f build/build.ninja ]] || run_logged "configure" cmake --preset dev
build_targets build itwin-gateway itwin-agent itwin-worker itwin_python_stubs

export ITWIN_BIN=$PWD/build/bin ITWIN_SOURCE=$PWD PYTHONPATH=$PWD/build/python PYTHONDONTWRITEBYTECODE=1
if [[ "${1:-}" == --faults ]]; then
  step "slow faults"
  exec /usr/bin/python3 -m pytest -v --tb=short -p no:cacheprovider -m slow tests/faults --durations=0
fi
step "soak"
exec /usr/bin/python3 tests/faults/soak.py "$@"
