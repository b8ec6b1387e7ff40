#!/usr/bin/env bash
# Plans of the three paper-size stages on three slices: NAME.txt and NAME.json beside this script.
#   docs/benchmarks/plans/make.sh            all nine, one after another
#   docs/benchmarks/plans/make.sh t2i_v5e    one of them
# Needs the extra `tpu` and no TPU. A plan takes minutes of one core.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=docs/benchmarks/plans
only=${1:-}
splash=(--config.model.vlm.kernel=splash --config.model.shallow.kernel=splash --config.model.deep.kernel=splash)

plan() { # NAME EXPERIMENT TOPOLOGY OVERRIDE...
  local name=$1 experiment=$2 topology=$3
  shift 3
  if [[ -n $only && $only != "$name" ]]; then return; fi
  starflow2 plan --config "experiments/starflow2_7b_$experiment.py" --topology "$topology" --json "$here/$name.json" \
    "${splash[@]}" "$@" >"$here/$name.txt"
}

dots=(--config.model.shallow.remat=dots --config.model.deep.remat=dots)
plan t2i_v5e t2i v5e:16x16 "${dots[@]}" --config.stages.text_to_image.rows=512
plan t2i_v5p t2i v5p:4x4x4 "${dots[@]}" --config.stages.text_to_image.rows=512
plan t2i_v6e t2i v6e:16x16 "${dots[@]}" --config.stages.text_to_image.rows=1024
plan adapter_v5e adapter v5e:16x16 --config.stages.image_to_text.rows=512
plan adapter_v5p adapter v5p:4x4x4 --config.stages.image_to_text.rows=512
plan adapter_v6e adapter v6e:16x16 --config.stages.image_to_text.rows=1024
plan joint_v5e joint v5e:16x16 --config.stages.joint.rows=512
plan joint_v5p joint v5p:4x4x4 "${dots[@]}" --config.stages.joint.rows=512
plan joint_v6e joint v6e:16x16 --config.stages.joint.rows=1024
