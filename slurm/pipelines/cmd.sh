# shellcheck shell=bash
# CMD: autoencoder -> content and motion model, side by side -> samples. Sourced by slurm/pipeline.sh.
CONFIG=${CONFIG:-configs/cmd/ucf101-64-paper.yaml}
train autoencoder - train_ae.py "$SHARDS" "$HELD_OUT"
train content autoencoder train_content_diffusion.py "$SHARDS" "$HELD_OUT" --ae "$RUNS/@cmd-autoencoder"
train motion autoencoder train_motion_diffusion.py "$SHARDS" "$HELD_OUT" --ae "$RUNS/@cmd-autoencoder"
samples content,motion
