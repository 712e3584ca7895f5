# shellcheck shell=bash disable=SC2034
# HVDM: hybrid autoencoder -> latents of clip pairs, of stills and of motion -> denoiser -> clips, long videos, videos that begin at
# pictures, and three amounts of motion. Sourced by launch/quickstart.sh.
LENGTH=32            # four clips of 8 frames: each is learnt alone, and as the continuation of the one before it
SAMPLES=(--num-videos 20)

stages() {
  say "Autoencoder: a clip to a volume of latents, and back"
  train train_ae.py "$SHARDS" "$HELD_OUT" --n-frames 8 --max-steps 800
  AE=$(run_of hvdm-autoencoder)/export
  encode_sets --stills
  say "Denoiser: the latents of a clip, alone, after another or after its own first frame"
  train train_dit.py "$LATENTS" "$HELD_OUT_LATENTS" --ae "$AE" --max-steps 2000
  SAMPLING=(--steps 50)
  say "Long videos: 64 frames, clip after clip"
  torchrun sample.py --run "$RUNS" --mode long --num-frames 64 --num-videos 4 --gif --out "$OUT/long" "${SAMPLING[@]}"
  say "Videos that begin at held-out pictures"
  "$PYTHON" preprocess.py inspect "$HELD_OUT" --pictures "$OUT/pictures" --num-pictures 10
  torchrun sample.py --run "$RUNS" --mode image --image "$OUT/pictures" --num-videos 10 --gif --out "$OUT/i2v" "${SAMPLING[@]}"
  say "Little, more and much motion"
  for class in 0 1 3; do
    torchrun sample.py --run "$RUNS" --dynamics "$class" --num-videos 20 --gif --out "$OUT/motion-$class" "${SAMPLING[@]}"
  done
  "$PYTHON" evaluate.py motion --samples "$OUT"/motion-[0-9]
  REPORTED+=("$OUT/long" "$OUT/i2v" "$OUT"/motion-[0-9])
}
