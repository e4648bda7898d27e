#!/usr/bin/env bash
# Builds the benchmarks (release) and runs them one after the other; prints a table and writes bench.json.
#   deploy/bench.sh                       all of them
#   deploy/bench.sh NAME...               only these; NAME:PART for one part: gateway:submit. `cluster`, `slurm` and `network` need root
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
# Each is a program build-bench/benchmark/NAME_benchmark or a script tests/benchmark/NAME_benchmark.py.
names=()
for program in build-bench/benchmark/*_benchmark tests/benchmark/*_benchmark.py; do
  name=$(basename "$program" .py)
  names+=("${name%_benchmark}")
done
wanted=("$@")
if ((${#wanted[@]} == 0)); then wanted=("${names[@]}"); fi
for name in "${wanted[@]}"; do
  if [[ " ${names[*]} " != *" ${name%%:*} "* ]]; then
    echo "bench.sh: no benchmark '${name%%:*}'; there are: ${names[*]}" >&2
    exit 2
  fi
done
for name in "${wanted[@]}"; do
  program=(build-bench/benchmark/"${name%%:*}"_benchmark)
  if [[ ! -x ${program[0]} ]]; then program=(/usr/bin/python3 tests/benchmark/"${name%%:*}"_benchmark.py); fi
  if [[ $name == *:* ]]; then program+=("${name#*:}"); fi
  step "$name"
  "${program[@]}" | tee -a "$lines"
done
/usr/bin/python3 deploy/bench_table.py "$lines" bench.json
