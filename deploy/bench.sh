#!/usr/bin/env bash
# Builds the benchmarks (release) and runs them one after the other; prints a table and writes bench.json.
#   deploy/bench.sh                       all of them
#   deploy/bench.sh NAME...               only these: gateway, store, worker ..., cluster (needs root); NAME:PART for one part
#   deploy/bench.sh --compare OLD NEW     two bench.json files side by side
# bench.json: one object per figure with name, value, unit, reference, ratio (value / reference) and runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/common.sh

if [[ "${1:-}" == --compare ]]; then
  exec /usr/bin/python3 deploy/bench_table.py --compare "${2:?the old bench.json}" "${3:?the new bench.json}"
fi
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then usage_of "$0"; exit 0; fi

step "packages"
deploy/install-packages.sh build
prepare_compiler_cache
step "build"
run_logged "configure" cmake --preset bench
build_targets build-bench all

export ITWIN_BIN=$PWD/build-bench/bin ITWIN_SOURCE=$PWD PYTHONPATH=$PWD/build-bench/python
lines=$(mktemp)
trap 'rm -f "$lines"' EXIT
wanted=("$@")
if ((${#wanted[@]} == 0)); then
  for program in build-bench/benchmark/*_benchmark; do
    wanted+=("$(basename "$program" _benchmark)")
  done
  wanted+=(cluster)
fi
for name in "${wanted[@]}"; do
  program=build-bench/benchmark/${name%%:*}_benchmark
  [[ ${name%%:*} == cluster ]] && program=tests/benchmark/cluster_benchmark.py
  [[ -x $program ]] || { echo "bench.sh: no benchmark '$name'; there are: $(ls build-bench/benchmark | sed -n 's/_benchmark$//p' | tr '\n' ' ')" >&2; exit 2; }
  part=()
  [[ $name == *:* ]] && part=("${name#*:}")
  step "$name"
  "$program" "${part[@]}" | tee -a "$lines"
done
/usr/bin/python3 deploy/bench_table.py "$lines" bench.json
