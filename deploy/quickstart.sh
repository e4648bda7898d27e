#!/usr/bin/env bash
# From a clone to a trained model: installs what is missing, builds, starts a gateway with the embedded site `local`,
# trains the wind-downscaling example on two MPI ranks, shows it live, and puts the model into your hands.
#   deploy/quickstart.sh [--keep] [--data DIR]
#     --keep      leave the gateway running afterwards
#     --data DIR  where the gateway keeps its data (default ~/.local/share/itwin)
# Can be run again: what is built, installed or running is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/common.sh

keep=0
data=${XDG_DATA_HOME:-$HOME/.local/share}/itwin
while (($#)); do
  case "$1" in
    --keep) keep=1 ;;
    --data) data=${2:?--data needs a directory}; shift ;;
    -h | --help) usage_of "$0"; exit 0 ;;
    *) echo "quickstart.sh: unknown option '$1'; see deploy/quickstart.sh --help" >&2; exit 2 ;;
  esac
  shift
done
bin=$PWD/build/bin

step "1/5 packages"
deploy/install-packages.sh build
prepare_compiler_cache

step "2/5 build (the first time takes several minutes)"
build_started=$SECONDS
run_logged "configure" cmake --preset dev
build_targets build itwin itwin-gateway itwin-agent itwin-worker
build_seconds=$((SECONDS - build_started))

step "3/5 gateway"
mkdir -p "$data"
data=$(cd "$data" && pwd)
[[ -e $data/gateway.db ]] || "$bin/itwin-gateway" init --data "$data"
export ITWIN_CONFIG=$data/client/config.yaml
started_here=0
if "$bin/itwin" version --timeout 5s >/dev/null 2>&1; then
  echo "a gateway on $data is already running at $(cat "$data/run/endpoint"); using it"
else
  "$bin/itwin-gateway" serve --data "$data" >>"$data/gateway.log" 2>&1 &
  gateway=$!
  started_here=1
  stop_gateway() {
    kill "$gateway" 2>/dev/null && wait "$gateway" 2>/dev/null
    "$bin/itwin-agent" stop --root "$data/sites/local" >/dev/null 2>&1 || true
  }
  trap 'stop_gateway' EXIT
  trap 'exit 130' INT TERM
  for _ in $(seq 100); do
    "$bin/itwin" version --timeout 2s >/dev/null 2>&1 && break
    if ! kill -0 "$gateway" 2>/dev/null; then
      echo "the gateway did not start; the end of $data/gateway.log says:" >&2
      tail -n 20 "$data/gateway.log" >&2
      exit 1
    fi
    sleep 0.1
  done
  echo "gateway running at $(cat "$data/run/endpoint") (log: $data/gateway.log)"
fi
"$bin/itwin" sites

step "4/5 train: monthly winds, reconstructed from 4× coarser ones, on two ranks"
winds=$(dpkg -L ferret-datasets | grep '/monthly_navy_winds.cdf$')
status=0
"$bin/itwin" submit deploy/examples/wind-downscaling/job.yaml --set "train.data.netcdf=$winds" --watch \
  --id-file "$data/quickstart.job" || status=$?
job=$(cat "$data/quickstart.job")
if ((status != 0)); then
  echo "the job did not succeed. What happened:" >&2
  "$bin/itwin" events "$job" >&2 || true
  "$bin/itwin" logs "$job" --stderr >&2 || true
  exit "$status"
fi

step "5/5 the result"
model_directory=$data/results/$job
"$bin/itwin" get "$job" "$model_directory"
"$bin/itwin" --output json status "$job" >"$data/quickstart.status.json"
"$bin/itwin" metrics "$job" --json >"$data/quickstart.metrics.json"
/usr/bin/python3 - "$data" "$model_directory" "$build_seconds" <<'PY'
import json, os, sys
data, directory, build_seconds = sys.argv[1], sys.argv[2], int(sys.argv[3])
job = json.load(open(f"{data}/quickstart.status.json"))
points = json.load(open(f"{data}/quickstart.metrics.json"))
summary = job["summary"]
created = int(job["created_us"])
first = min(int(p["time_us"]) for p in points if p["series"].startswith("train/"))
model = next(os.path.join(directory, name) for name in ("model.pt", "weights.safetensors")
             if os.path.exists(os.path.join(directory, name)))
result = {
    "job": job["id"], "state": job["state"], "ranks": job["ranks"],
    "seconds_to_build": build_seconds,
    "seconds_to_first_metric": round((first - created) / 1e6, 3),
    "seconds_to_finish": round((int(job["finished_us"]) - created) / 1e6, 3),
    "test_rmse": summary["test/rmse"],
    "ratio_to_bilinear": summary["test/ratio_to_bilinear"],
    "ratio_to_bicubic": summary["test/ratio_to_bicubic"],
    "model": model,
}
temporary = f"{data}/quickstart.json.tmp"
with open(temporary, "w") as f:
    json.dump(result, f, indent=2)
    f.write("\n")
os.rename(temporary, f"{data}/quickstart.json")
os.unlink(f"{data}/quickstart.status.json")
os.unlink(f"{data}/quickstart.metrics.json")
print(f"""
held-out months (24), root mean square error in standard deviations:
  this model  {result['test_rmse']:.4f}
  bicubic     {summary['test/bicubic_rmse']:.4f}   the model has {result['ratio_to_bicubic']:.0%} of its error
  bilinear    {summary['test/bilinear_rmse']:.4f}   the model has {result['ratio_to_bilinear']:.0%} of its error
trained on {job['ranks']} ranks in {result['seconds_to_finish']:.0f} s; first metric after {result['seconds_to_first_metric']:.1f} s
model:   {model}
figures: {data}/quickstart.json""")
PY

cat <<TEXT

To submit the next job:
  export ITWIN_CONFIG=$ITWIN_CONFIG PATH=$bin:\$PATH
TEXT
if ((started_here && !keep)); then
  echo "  itwin-gateway serve --data $data &      # it is stopped now; --keep leaves it running"
fi
cat <<TEXT
  itwin submit my-job.yaml --watch         # deploy/examples/ has more to start from
  itwin jobs                               # and: itwin --help
TEXT
if ((started_here && keep)); then
  trap - EXIT
  disown "$gateway"
  echo "The gateway is left running. To stop it: itwin-gateway stop --data $data"
elif ((started_here)); then
  stop_gateway
  trap - EXIT
  echo "The gateway is stopped; its jobs and models stay in $data."
fi
