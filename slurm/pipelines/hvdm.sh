# shellcheck shell=bash
# HVDM: hybrid autoencoder -> latents of clip pairs, of stills and of motion -> denoiser -> samples. Sourced by slurm/pipeline.sh.
CONFIG=${CONFIG:-configs/hvdm/ucf101.yaml}
train autoencoder - train_ae.py "$SHARDS" "$HELD_OUT"
encode autoencoder --ae "$RUNS/@hvdm-autoencoder" --stills
train denoiser latents train_dit.py "$LATENTS" "$HELD_OUT_LATENTS" --ae "$RUNS/@hvdm-autoencoder"
samples denoiser
