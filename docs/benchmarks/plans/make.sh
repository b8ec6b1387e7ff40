#!/usr/bin/env bash
# Plans of the three paper-size stages on three slices of TPUs and five machines of GPUs, and of stages 1 and 3 on more
# chips (docs/benchmarks/scaling.md): NAME.txt and NAME.json beside this script.
#   docs/benchmarks/plans/make.sh            all, one after another
#   docs/benchmarks/plans/make.sh t2i_v5e    one of them; a pattern such as '*_h100x*' makes all whose names match
# Needs the extra `tpu` for TPUs, `cuda` for GPUs, and no TPU and no GPU. A plan takes up to minutes of one core.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=docs/benchmarks/plans
only=${1:-*}

plan() { # NAME EXPERIMENT TOPOLOGY [arguments of `starflow2 plan`]
  # shellcheck disable=SC2053
  if [[ $1 != $only ]]; then return; fi
  starflow2 plan --config "$2" --topology "$3" --json "$here/$1.json" "${@:4}" >"$here/$1.txt"
}

# Of the codec at the paper's size: fae_features_v5e, ...
for stage in features pixels pixels_tuned; do
  for at in v5e:16x16 h100:8; do
    # Without this flag, XLA cannot compile products of 257 tokens a picture to Triton kernels.
    XLA_FLAGS=--xla_gpu_enable_triton_gemm=false \
      plan "fae_${stage}_${at%%:*}" fae_dinov2_g "$at" --chip "${at%%:*}" --stage "$stage"
  done
done

number=0
for stage in t2i adapter joint; do
  number=$((number + 1))
  plan "${stage}_v5e" "starflow2_7b_$stage" v5e:16x16 --chip v5e
  plan "${stage}_v5p" "starflow2_7b_$stage" v5p:4x4x4 --chip v5p
  plan "${stage}_v6e" "starflow2_7b_$stage" v6e:16x16 --chip v6e
  plan "${stage}_h200x1" starflow2_7b_gpu h200:1 --stage "$number"
  plan "${stage}_h100x8" "starflow2_7b_$stage" h100:8 --chip h100 "--config.stages.*.rows=64"
  plan "${stage}_h100x64" "starflow2_7b_$stage" h100:8x8 --chip h100
  plan "${stage}_a100x8" "starflow2_7b_$stage" a100-80:8 --chip a100-80
  plan "${stage}_b200x8" "starflow2_7b_$stage" b200:8 --chip b200
done

for stage in t2i joint; do # as many rows per chip as on fewer
  if [[ $stage == t2i ]]; then rows=1280; else rows=1024; fi # 1536 would not fit where slices join
  plan "${stage}_h100x512" "starflow2_7b_$stage" h100:64x8 --chip h100 "--config.stages.*.rows=4096"
  plan "${stage}_v5p256" "starflow2_7b_$stage" v5p:4x8x8 --chip v5p "--config.stages.*.rows=2048"
  plan "${stage}_v5p1024" "starflow2_7b_$stage" v5p:8x8x16 --chip v5p "--config.stages.*.rows=8192"
  plan "${stage}_v5p4096" "starflow2_7b_$stage" v5p:16x16x16 --chip v5p "--config.stages.*.rows=32768"
  plan "${stage}_v6e1024" "starflow2_7b_$stage" v6e:16x16:4 --chip v6e "--config.stages.*.rows=$((rows * 4))"
  plan "${stage}_v6e4096" "starflow2_7b_$stage" v6e:16x16:16 --chip v6e "--config.stages.*.rows=$((rows * 16))"
done
