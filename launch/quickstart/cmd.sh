# shellcheck shell=bash disable=SC2034
# CMD: autoencoder -> latents -> content model -> motion model. Sourced by launch/quickstart.sh.
stages() {
  say "Autoencoder: a clip to a content frame and a motion latent, and back"
  train train_ae.py "$SHARDS" "$HELD_OUT" --max-steps 800
  AE=$(run_of cmd-autoencoder)/export
  encode_sets
  say "Content model: the content frame of a clip"
  train train_content_diffusion.py "$LATENTS" "$HELD_OUT_LATENTS" --ae "$AE" --max-steps 2200
  say "Motion model: the motion of a content frame"
  train train_motion_diffusion.py "$LATENTS" "$HELD_OUT_LATENTS" --ae "$AE" --max-steps 1300
  SAMPLING=(--guidance-scale 2 --steps 50)
}
