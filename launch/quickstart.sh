#!/usr/bin/env bash
# From videos to generated clips on a CPU: shards -> autoencoder -> latents -> generators -> clips -> report.html.
#   launch/quickstart.sh                 moving digits, made on the spot
#   DATA=folder launch/quickstart.sh     your own videos
#   SYSTEM=latte ...                     which system: cmd (default), hvdm, latte, pvdm or vidm
#   OUT=folder ...                       where everything goes (default: quickstart, or quickstart/<system>)
# Stop it at any time (Ctrl-C); the same command goes on where it was.
set -euo pipefail
shopt -s extglob
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
DATA=${DATA:-}
SYSTEM=${SYSTEM:-cmd}
STAGES=launch/quickstart/$SYSTEM.sh
[ -f "$STAGES" ] || { echo "SYSTEM=$SYSTEM: one of $(basename -as .sh launch/quickstart/*.sh | paste -sd' ')" >&2; exit 2; }
OUT=${OUT:-quickstart${DATA:+/$(basename "$DATA")}$([ "$SYSTEM" = cmd ] || echo "/$SYSTEM")}
PROCESSES=${PROCESSES:-2}
CONFIG=configs/$SYSTEM/tiny.yaml
SIZE=(32 32)
LENGTH=8             # frames of a stored clip
SAMPLES=(--num-videos 20)
# bf16 where the processor computes in it: one and a half times as fast as fp32.
PRECISION=${PRECISION:-$(grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo bf16 || echo fp32)}
RUNS=$OUT/runs
AE=                  # export of the system's autoencoder, where it has one
REPORTED=("$OUT/samples")   # folders of samples in the report

# One thread per process: two training processes share two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
started=$SECONDS
say() { printf '\n\033[1m[%d:%02d] %s\033[0m\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }
stopped() { echo; echo "Stopped. The same command goes on from here."; exit 130; }
trap stopped INT

torchrun() { "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$PROCESSES" -- "$@"; }
train() { # script, training set, validation set, further flags
  local script=$1 set=$2 held_out=$3
  shift 3
  torchrun "$script" --config "$CONFIG" --data-path "$set" --val-path "$held_out" --results-dir "$RUNS" --precision "$PRECISION" "$@"
}
run_of() { # newest run folder of a stage
  compgen -G "$RUNS/[0-9][0-9]+([0-9])-$1" | sort -V | tail -n 1
}
encode_sets() { # SHARDS and HELD_OUT by the autoencoder AE, with further flags -> LATENTS and HELD_OUT_LATENTS
  say "Clips -> latents: the generators need not encode each clip again and again"
  LATENTS=$RUNS/latents/train
  HELD_OUT_LATENTS=$LATENTS
  torchrun preprocess.py latents "$SHARDS" --ae "$AE" --out "$LATENTS" "$@"
  if [ "$HELD_OUT" != "$SHARDS" ]; then
    HELD_OUT_LATENTS=$RUNS/latents/held-out
    torchrun preprocess.py latents "$HELD_OUT" --ae "$AE" --out "$HELD_OUT_LATENTS" "$@"
  fi
}

# shellcheck source=launch/quickstart/hvdm.sh
source "$STAGES"      # the system's `stages`: trains, and sets SAMPLING and, where there is one, AE
mkdir -p "$OUT"
if [ -n "$DATA" ]; then
  say "Videos of $DATA -> shards"
  SHARDS=$OUT/shards
  "$PYTHON" preprocess.py shards "$DATA" --out "$SHARDS" --image-size "${SIZE[@]}" --clip-length $LENGTH
  HELD_OUT=$SHARDS
else
  say "Moving digits -> video files -> shards"
  SHARDS=$OUT/shards/train
  HELD_OUT=$OUT/shards/held-out
  "$PYTHON" preprocess.py shards --dataset-name synthetic-digits --num-videos 1000 --seed 0 --out "$SHARDS" \
    --image-size "${SIZE[@]}" --clip-length $LENGTH
  "$PYTHON" preprocess.py shards --dataset-name synthetic-digits --num-videos 64 --seed 1 --out "$HELD_OUT" \
    --image-size "${SIZE[@]}" --clip-length $LENGTH
fi

stages

FIGURES=()
if [ -n "$AE" ]; then
  say "Reconstruction of held-out clips"
  torchrun evaluate.py reconstruct --ae "$AE" --data-path "$HELD_OUT" --out "$OUT/reconstruction.json"
  FIGURES=(--figures "$OUT/reconstruction.json")
fi
say "Generated clips"
torchrun sample.py --run "$RUNS" "${SAMPLES[@]}" --gif --out "$OUT/samples" "${SAMPLING[@]}"
"$PYTHON" -m launch.report "$RUNS" --samples "${REPORTED[@]}" "${FIGURES[@]}" --out "$OUT/report.html"
say "Done: open $OUT/report.html"
