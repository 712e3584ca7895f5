# PVDM: triplane autoencoder -> its adversarial phase -> latents of clip pairs -> plane UNet -> clips, and videos four clips long.
# Sourced by launch/quickstart.sh.
LENGTH=32            # two clips of 16 frames: the second is learnt as the continuation of the first
SAMPLES=(--num-samples 16)

stages() {
  say "Autoencoder: a clip to three planes, and back"
  train train_ae.py "$SHARDS" "$HELD_OUT" --n-frames 16 --max-steps 700
  say "Its adversarial phase: against two discriminators, keeping the best export on held-out clips"
  train train_ae.py "$SHARDS" "$HELD_OUT" --n-frames 16 --config configs/pvdm/tiny-adversarial.yaml --max-steps 100 \
    --init-from "$(run_of pvdm-autoencoder)" --run-name pvdm-adversarial
  AE=$(run_of pvdm-adversarial)/export
  encode_sets
  say "Plane UNet: the latents of a clip, alone or after another"
  train train_dit.py "$LATENTS" "$HELD_OUT_LATENTS" --ae "$AE" --max-steps 2500
  say "Long videos: 64 frames, clip after clip"
  torchrun sample.py --run "$RUNS" --mode long --num-frames 64 --num-samples 4 --gif --steps 50 --next-steps 50 --out "$OUT/long"
  REPORTED+=("$OUT/long")
  SAMPLING=(--steps 50)
}
