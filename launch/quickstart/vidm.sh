# shellcheck shell=bash disable=SC2034
# VIDM: content generator (first frames) and motion generator (every next frame) on the frames themselves -> videos of 32 frames.
# Sourced by launch/quickstart.sh.
LENGTH=32            # frame r is learnt from the first frame and frame r - 1, for every r up to 31
SAMPLES=(--num-videos 10 --num-frames 32)

stages() {
  say "Content generator: first frames"
  train train_content_diffusion.py "$SHARDS" "$HELD_OUT" --max-steps 1600
  say "Motion generator: the next frame, from the first one and the one before"
  train train_motion_diffusion.py "$SHARDS" "$HELD_OUT" --max-steps 1600
  SAMPLING=(--steps 50)
}
