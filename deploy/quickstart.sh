#!/usr/bin/env bash
# From a clone to a trained model: installs what is missing, builds, starts a gateway with the embedded site `local`,
# trains the wind-downscaling example on two MPI ranks, shows it live, and puts the model into your hands.
#   deploy/quickstart.sh [--slurm] [--keep] [--data DIR] [--bin DIR]
#     --slurm     the real path: starts a SLURM cluster of two nodes on this machine (deploy/testcluster; needs root), adds it as a
#                 site over SSH, and trains on one rank of each node; afterwards all of it is taken down
#     --keep      leave the gateway (and the cluster) running afterwards
#     --data DIR  where the gateway keeps its data (default ~/.local/share/itwin; with --slurm: itwin-slurm beside it)
#     --bin DIR   take the programs from there; nothing is installed or built
# Can be run again: what is built, installed or running is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/common.sh

keep=0
slurm=0
data=
bin=
while (($#)); do
  case "$1" in
    --keep) keep=1 ;;
    --slurm) slurm=1 ;;
    --data) data=${2:?--data needs a directory}; shift ;;
    --bin) bin=${2:?--bin needs a directory}; shift ;;
    -h | --help) usage_of "$0"; exit 0 ;;
    *) echo "quickstart.sh: unknown option '$1'; see deploy/quickstart.sh --help" >&2; exit 2 ;;
  esac
  shift
done
: "${data:=${XDG_DATA_HOME:-$HOME/.local/share}/itwin$( ((slurm)) && echo -slurm || true)}"
if ((slurm && EUID != 0)); then
  echo "quickstart.sh: --slurm starts a cluster in network namespaces and needs root; run it with sudo, or leave --slurm out" >&2
  exit 2
fi

build_started=$SECONDS
if [[ -z $bin ]]; then
  step "1/5 packages"
  purposes=(build)
  if ((slurm)); then purposes+=(cluster); fi
  deploy/install-packages.sh "${purposes[@]}"
  prepare_compiler_cache

  step "2/5 build (the first time takes several minutes)"
  build_started=$SECONDS
  run_logged "configure" cmake --preset dev
  build_targets build itwin itwin-gateway itwin-agent itwin-worker
  bin=$PWD/build/bin
fi
build_seconds=$((SECONDS - build_started))

if ((slurm)); then step "3/5 gateway and cluster"; else step "3/5 gateway"; fi
mkdir -p "$data"
data=$(cd "$data" && pwd)
[[ -e $data/gateway.db ]] || "$bin/itwin-gateway" init --data "$data"
export ITWIN_CONFIG=$data/client/config.yaml
started_here=0
gateway_flags=()
if ((slurm)); then gateway_flags=(--no-local --listen 127.0.0.1:0); fi
if "$bin/itwin" version --timeout 5s >/dev/null 2>&1; then
  echo "a gateway on $data is already running at $(cat "$data/run/endpoint"); using it"
else
  # Out of reach of what ends this script: its last task is to stop things in order.
  setsid "$bin/itwin-gateway" serve --data "$data" "${gateway_flags[@]}" >>"$data/gateway.log" 2>&1 &
  gateway=$!
  started_here=1
  stop_gateway() {
    kill "$gateway" 2>/dev/null && wait "$gateway" 2>/dev/null
    if ((!slurm)); then "$bin/itwin-agent" stop --root "$data/sites/local" >/dev/null 2>&1 || true; fi
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

if ((slurm)); then
  # Unix users of the cluster read the programs and write their spool: its directory cannot be inside a private one.
  cluster=${ITWIN_TESTCLUSTER:-/var/tmp/itwin-quickstart}
  take_down() {
    trap '' INT TERM
    echo "taking the cluster down"
    # A job that still runs would otherwise wait for a site that never comes back.
    if [[ -e $data/quickstart.job ]] && "$bin/itwin" cancel "$(cat "$data/quickstart.job")" --reason "quickstart was ended" >/dev/null 2>&1; then
      timeout 30 "$bin/itwin" watch "$(cat "$data/quickstart.job")" >/dev/null 2>&1 || true
    fi
    "$bin/itwin" site remove testcluster >/dev/null 2>&1 || true
    deploy/testcluster down --dir "$cluster" >/dev/null || true
    if ((started_here)); then stop_gateway; fi
  }
  trap 'take_down' EXIT
  trap 'exit 130' INT TERM
  rm -f "$data/quickstart.job"
  deploy/testcluster up --dir "$cluster" --nodes 2 --json >"$data/cluster.json"
  site=$data/testcluster.yaml
  # What an administrator of a real cluster writes by hand (docs/sites.md).
  /usr/bin/python3 - "$data/cluster.json" >"$site" <<'PY'
import json, sys
status = json.load(open(sys.argv[1]))
ssh = status["nodes"]["login"]["ssh"]
print(f"""# The cluster of deploy/testcluster, through its WAN.
name: testcluster
ssh:
  hosts: [{ssh['wan_host']}]
  port: {ssh['wan_port']}
  user: ada
  key: {status['keys']['ada']}
  fingerprint: {ssh['fingerprint']}
root: {status['sites']['alpha']['shared']}/$USER/itwin
scheduler: slurm
launcher: srun --mpi=pmix -n {{ranks}}
query_interval: 1s""")
PY
  echo "a SLURM cluster of two nodes is up; this is its site file ($site):"
  sed 's/^/    /' "$site"
  # Each cluster of this script is a new one under the same name; the first time there is nothing to forget.
  "$bin/itwin-gateway" accept-spool testcluster --data "$data" >/dev/null 2>&1 || true
  "$bin/itwin" site add "$site" --replace
fi
"$bin/itwin" sites

train_flags=()
if ((slurm)); then
  train_flags=(--set site=testcluster --set resources.nodes=2 --set resources.ranks_per_node=1)
  step "4/5 train: monthly winds, reconstructed from 4× coarser ones, by SLURM on two nodes"
else
  step "4/5 train: monthly winds, reconstructed from 4× coarser ones, on two ranks"
fi
winds=$(dpkg -L ferret-datasets | grep '/monthly_navy_winds.cdf$')
status=0
"$bin/itwin" submit deploy/examples/wind-downscaling/job.yaml --set "train.data.netcdf=$winds" "${train_flags[@]}" --watch \
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
if ((slurm && !keep)); then
  echo "  sudo deploy/quickstart.sh --slurm --keep      # leaves both running"
elif ((started_here && !keep)); then
  echo "  itwin-gateway serve --data $data &      # it is stopped now; --keep leaves it running"
fi
cat <<TEXT
  itwin submit my-job.yaml --watch         # deploy/examples/ has more to start from
  itwin jobs                               # and: itwin --help
TEXT
if ((slurm && keep)); then
  trap - EXIT
  if ((started_here)); then disown "$gateway"; fi
  echo "Gateway and cluster are left running. To stop them:"
  echo "  itwin-gateway stop --data $data; deploy/testcluster down --dir $cluster"
elif ((slurm)); then
  trap - EXIT
  take_down
  echo "The cluster and the gateway are gone; jobs and models stay in $data."
elif ((started_here && keep)); then
  trap - EXIT
  disown "$gateway"
  echo "The gateway is left running. To stop it: itwin-gateway stop --data $data"
elif ((started_here)); then
  stop_gateway
  trap - EXIT
  echo "The gateway is stopped; its jobs and models stay in $data."
fi
