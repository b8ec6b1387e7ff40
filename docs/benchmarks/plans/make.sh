#!/usr/bin/env bash
# Plans of the three paper-size stages on three slices: NAME.txt and NAME.json beside this script.
#   docs/benchmarks/plans/make.sh            all nine, one after another
#   docs/benchmarks/plans/make.sh t2i_v5e    one of them
# Needs the extra `tpu` and no TPU. A plan takes minutes of one core.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=docs/benchmarks/plans
only=${1:-}

plan() { # NAME EXPERIMENT TOPOLOGY
  if [[ -n $only && $only != "$1" ]]; then return; fi
  starflow2 plan --config "starflow2_7b_$2" --chip "${3%%:*}" --topology "$3" --json "$here/$1.json" >"$here/$1.txt"
}

for stage in t2i adapter joint; do
  plan "${stage}_v5e" "$stage" v5e:16x16
  plan "${stage}_v5p" "$stage" v5p:4x4x4
  plan "${stage}_v6e" "$stage" v6e:16x16
done
