#!/bin/sh
# Estimates pi by throwing darts, one round per step: ./train.sh [rounds]. Needs sh, awk and date.
# It reports each round, saves and leaves with 85 when it is asked to stop, and goes on from there when it is started again.
set -eu

rounds=${1:-30}
metrics=${ITWIN_METRICS:-metrics.jsonl}
outputs=${ITWIN_OUTPUTS:-outputs}
checkpoints=${ITWIN_CHECKPOINTS:-checkpoints}
resume=${ITWIN_RESUME:-}
stop=${ITWIN_STOP:-stop}
mkdir -p "$outputs" "$checkpoints"

round=0
hits=0
# A checkpoint is a directory step-<n> with a manifest.json, which is written last.
if [ -n "$resume" ]; then
  for manifest in "$resume"/step-*/manifest.json; do
    [ -e "$manifest" ] || continue
    read -r saved_round saved_hits <"${manifest%/*}/state"
    if [ "$saved_round" -gt "$round" ]; then round=$saved_round hits=$saved_hits; fi
  done
  echo "going on after round $round"
fi

save() {
  mkdir -p "$checkpoints/step-$round"
  echo "$round $hits" >"$checkpoints/step-$round/state"
  echo "{\"format\": 1, \"step\": $round, \"files\": [\"state\"]}" >"$checkpoints/step-$round/manifest.partial"
  mv "$checkpoints/step-$round/manifest.partial" "$checkpoints/step-$round/manifest.json"
}

estimate() {
  awk -v hits="$hits" -v darts="$((round * 50000))" 'BEGIN { printf "%.6f", 4 * hits / darts }'
}

while [ "$round" -lt "$rounds" ]; do
  if [ -e "$stop" ]; then
    save
    echo "saved after round $round"
    exit 85
  fi
  round=$((round + 1))
  new=$(awk -v seed="$round" 'BEGIN {
    srand(seed)
    for (i = 0; i < 50000; i++) { x = rand(); y = rand(); if (x * x + y * y < 1) hits++ }
    print hits
  }')
  hits=$((hits + new))
  pi=$(estimate)
  # One line per report; it counts when its newline is there.
  printf '{"t":%s,"step":%d,"metrics":{"pi":%s},"progress":{"step":%d,"steps":%d}}\n' \
    "$(date +%s)" "$round" "$pi" "$round" "$rounds" >>"$metrics"
done
pi=$(estimate)
echo "$pi" >"$outputs/pi.txt"
echo "pi is about $pi"
