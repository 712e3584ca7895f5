# shellcheck shell=bash disable=SC2034
# PVDM: triplane autoencoder -> its adversarial phase -> latents of clip pairs -> denoiser -> clips, and videos of two and eight clips.
# Sourced by launch/quickstart.sh.
LENGTH=32            # four clips of 8 frames: each is learnt alone, and as the continuation of the one before it
SAMPLES=(--num-videos 20 --mode long --num-frames 16)

stages() {
  say "Autoencoder: a clip to three planes, and back"
  train train_ae.py "$SHARDS" "$HELD_OUT" --n-frames 8 --max-steps 800
  say "Its adversarial phase: against two discriminators, keeping the best export on held-out clips"
  train train_ae.py "$SHARDS" "$HELD_OUT" --n-frames 8 --config configs/pvdm/tiny-adversarial.yaml --max-steps 100 \
    --init-from "$(run_of pvdm-autoencoder)" --run-name pvdm-adversarial
  AE=$(run_of pvdm-adversarial)/export
  encode_sets
  say "Denoiser: the latents of a clip, alone or after another"
  train train_dit.py "$LATENTS" "$HELD_OUT_LATENTS" --ae "$AE" --max-steps 1500
  SAMPLING=(--steps 50 --next-steps 50)
  say "Long videos: 64 frames, clip after clip"
  torchrun sample.py --run "$RUNS" --mode long --num-frames 64 --num-videos 4 --gif --out "$OUT/long" "${SAMPLING[@]}"
  REPORTED+=("$OUT/long")
}
