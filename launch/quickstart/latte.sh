# shellcheck shell=bash disable=SC2034
# Latte: frame VAE -> latents -> transformer over the latents of a clip. Sourced by launch/quickstart.sh.
stages() {
  say "Frame VAE: single frames to latents, and back"
  train train_ae.py "$SHARDS" "$HELD_OUT" --max-steps 1000
  AE=$(run_of latte-autoencoder)/export
  encode_sets
  say "Latte: the latents of a clip"
  train train_dit.py "$LATENTS" "$HELD_OUT_LATENTS" --ae "$AE" --max-steps 2800
  SAMPLING=(--guidance-scale 2 --steps 50 --denoising-strip 8)
}
