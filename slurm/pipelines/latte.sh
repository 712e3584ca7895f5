# shellcheck shell=bash
# Latte: frame VAE -> latents -> transformer over the latents of a clip -> samples. Sourced by slurm/pipeline.sh.
CONFIG=${CONFIG:-configs/latte/ucf101.yaml}
train autoencoder - train_ae.py "$SHARDS" "$HELD_OUT"
encode autoencoder --ae "$RUNS/@latte-autoencoder"
train denoiser latents train_dit.py "$LATENTS" "$HELD_OUT_LATENTS" --ae "$RUNS/@latte-autoencoder"
samples denoiser
