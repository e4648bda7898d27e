#!/bin/bash
# The installed package as its users have it: installed under a prefix, found by a project of its own, run against a gateway.
# usage: installed_package_test.sh <build directory> <source directory>
set -euo pipefail
build=$1 source=$2
work=$(mktemp -d)
gateway=
cleanup() {
  if [[ -n $gateway ]]; then kill "$gateway" 2>/dev/null && wait "$gateway" 2>/dev/null; fi
  if [[ -d $work/data/sites/local ]]; then "$build/bin/itwin-agent" stop --root "$work/data/sites/local" >/dev/null 2>&1; fi
  rm -rf "$work"
}
trap cleanup EXIT

cmake --install "$build" --component development --prefix "$work/prefix" >/dev/null
if grep -rlF -e "$source" -e "$build" "$work/prefix" --include='*.cmake' --include='*.h'; then
  echo "the installed files above name the machine they were built on" >&2
  exit 1
fi
cmake -S "$source/client/example" -B "$work/example" -DCMAKE_PREFIX_PATH="$work/prefix" >/dev/null
cmake --build "$work/example"

# Without a gateway it says what to do.
status=0
message=$(env -u ITWIN_ENDPOINT -u ITWIN_CONFIG HOME="$work" "$work/example/submit_and_watch" 2>&1) || status=$?
[[ $status == 2 && $message == *"no gateway is configured"* ]] || { echo "unexpected ($status): $message" >&2; exit 1; }

if [[ ! -x $build/bin/itwin-gateway || ! -x $build/bin/itwin-agent ]]; then
  echo "no gateway here: built and linked only"
  exit 0
fi
"$build/bin/itwin-gateway" init --data "$work/data" >/dev/null
"$build/bin/itwin-gateway" serve --data "$work/data" --listen 127.0.0.1:0 >"$work/gateway.log" 2>&1 &
gateway=$!
export ITWIN_CONFIG=$work/data/client/config.yaml
for _ in $(seq 200); do
  [[ -s $work/data/run/endpoint ]] && break
  kill -0 "$gateway" || { cat "$work/gateway.log" >&2; exit 1; }
  read -rt 0.05 <> <(:) || true
done
ITWIN_ENDPOINT=$(cat "$work/data/run/endpoint")
export ITWIN_ENDPOINT
cd "$work"
"$work/example/submit_and_watch" | tee "$work/out"
grep -q '^answer = 42$' "$work/out"
ls "$work"/*/now.txt
