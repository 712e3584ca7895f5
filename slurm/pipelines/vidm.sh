# shellcheck shell=bash
# VIDM: content generator (first frames) and motion generator (every next frame), side by side -> samples. Sourced by slurm/pipeline.sh.
CONFIG=${CONFIG:-configs/vidm/ucf101.yaml}
train content - train_content_diffusion.py "$SHARDS" "$HELD_OUT"
train motion - train_motion_diffusion.py "$SHARDS" "$HELD_OUT"
samples content,motion
