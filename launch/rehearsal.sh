#!/usr/bin/env bash
# Rehearse everything that a model of the paper's size goes through, before renting machines for it.
#
#   launch/rehearsal.sh [--out DIR]              at a tiny size, minutes on two CPU cores
#   launch/rehearsal.sh --plan DEVICES [--out DIR]   at full size, on paper: DEVICES such as v5e:16x16, v5p:4x4x4, h100:8
#
# At a tiny size, with files of every kind that a real run reads: random DINOv2 and Qwen2.5-VL folders as `transformers` writes
# them, PNG files and JSONL. Converts the VLM, trains a codec on the encoder (`features` and `pixels`), encodes shards, begins a
# run, trains stages 1 to 3 (on the shards, then on pictures), draws DIR/samples/*.png, and has a server draw
# DIR/served.png. The pictures mean nothing. --plan compiles each training step for DEVICES that need not be there, and
# prints days and chip-hours of each stage; predictions, minutes each.
#
#   --out DIR   new folder (default: rehearsal)
#
# Makes .venv at the first call; see setup_env.sh for VENV and PYTHON. Needs the extras `torch` and `serve`, or `tpu` or
# `cuda` for --plan.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
here="$REPOSITORY/launch"
out=rehearsal devices=""
while (($#)); do
  case "$1" in
  --out) out="${2:?--out takes a folder}" && shift 2 ;;
  --plan) devices="${2:?--plan takes devices, such as v5p:4x4x4}" && shift 2 ;;
  --help)
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
    exit
    ;;
  *) echo "rehearsal.sh: unknown argument $1; --help lists them" >&2 && exit 2 ;;
  esac
done
[[ ! -e "$out" ]] || { echo "rehearsal.sh: $out exists; name a new folder with --out" >&2 && exit 2; }
case "$devices" in
"") use_env torch,serve ;;
v[0-9]*) use_env torch,serve,tpu ;;
*) use_env torch,serve,cuda ;;
esac
mkdir -p "$out"
out="$(cd "$out" && pwd)"

step() { # WHAT COMMAND...: says what is done, then runs the command
  echo "== $1 ($SECONDS s)" >&2
  "${@:2}"
}

plans() {
  # Without this flag, XLA cannot compile products of DINOv2's 257 tokens a picture to Triton kernels.
  export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false${XLA_FLAGS:+ $XLA_FLAGS}"
  local chip="${devices%%:*}" stage
  for stage in features pixels pixels_tuned; do
    plan "1_codec_$stage" fae_dinov2_g "$stage"
  done
  plan 2_text_to_image starflow2_7b_t2i text_to_image --codec fae_dinov2_g
  plan 3_image_to_text starflow2_7b_adapter image_to_text --codec fae_dinov2_g
  plan 4_joint starflow2_7b_joint joint --codec fae_dinov2_g
  python "$here/rehearsal.py" table "$out"
}

plan() { # NAME EXPERIMENT STAGE [arguments of `starflow2 plan`]
  step "planning $1" starflow2 plan --config "$2" --chip "$chip" --topology "$devices" --stage "$3" --json "$out/$1.json" "${@:4}" >"$out/$1.txt"
}

if [[ -n "$devices" ]]; then
  plans
  exit
fi

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export XLA_FLAGS="${XLA_FLAGS:---xla_backend_optimization_level=0}" # most of the time goes into compiling
codec=(--config.codec.kind=fae --config.codec.grid=4,4 --config.codec.channels=4 --config.codec.patch=8)
order=text_to_image,image_to_text,joint

train() { # EXPERIMENT DIR SOURCE ORDER [overrides]
  starflow2 train --runlocal --config "$1" --out "$2" --config.data.source="$3" --config.order="$4" "${@:5}"
}

step "random models and pictures" python "$here/rehearsal.py" inputs "$out"
step "converting the VLM" starflow2 convert qwen2_5_vl --from "$out/qwen" --to "$out/vlm"
step "training a codec" train fae_dinov2_g "$out/codec" "$out/captions.jsonl" features,pixels \
  --config.encoder.kind=dinov2 --config.encoder.path="$out/dinov2"
step "encoding shards" starflow2 encode --source "json:$out/captions.jsonl" --codec "$out/codec" --out "$out/latents" --shards 2
step "beginning a run" starflow2 init --runlocal --vlm "$out/vlm" --codec "$out/codec" --config starflow2_7b_joint \
  --out "$out/run" --config.data.source="$out/latents" --config.order="$order" "${codec[@]}"
step "stage 1, on latents" train starflow2_7b_t2i "$out/run" "$out/latents" text_to_image "${codec[@]}"
step "stage 2" train starflow2_7b_adapter "$out/run" "$out/questions.jsonl" text_to_image,image_to_text "${codec[@]}"
step "stage 3, on pictures" train starflow2_7b_joint "$out/run" "$out/documents.jsonl" "$order" "${codec[@]}"
step "drawing" starflow2 sample --checkpoint "$out/run" --prompt "a dog" --image-first --max-tokens 40 --out "$out/samples"

echo "== serving ($SECONDS s)" >&2
starflow2 serve --checkpoint "$out/run" --port 0 --rows 2 >"$out/serve.log" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
until address="$(awk '/^serving / { print $NF }' "$out/serve.log")" && [[ -n "$address" ]]; do
  kill -0 "$server" || { echo "rehearsal.sh: the server has ended; see above" >&2 && exit 1; }
  sleep 1
done
python "$here/rehearsal.py" ask "$address" "$out/served.png"
kill -TERM "$server"
wait "$server"
echo "done in $SECONDS s: $out/samples and $out/served.png"
