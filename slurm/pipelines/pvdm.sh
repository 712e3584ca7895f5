# shellcheck shell=bash
# PVDM: triplane autoencoder -> its adversarial phase, where clips are held out to judge it by -> denoiser -> samples.
# Sourced by slurm/pipeline.sh. ADVERSARIAL: the recipe of the second phase.
CONFIG=${CONFIG:-configs/pvdm/ucf101.yaml}
train autoencoder - train_ae.py "$SHARDS" "$HELD_OUT"
ae=autoencoder
if [ -n "$HELD_OUT" ]; then
  ae=adversarial
  CONFIG=${ADVERSARIAL:-configs/pvdm/ucf101-adversarial.yaml} train adversarial autoencoder train_ae.py "$SHARDS" "$HELD_OUT" \
    --init-from "$RUNS/@pvdm-autoencoder" --run-name pvdm-adversarial
fi
train denoiser $ae train_dit.py "$SHARDS" "$HELD_OUT" --ae "$RUNS/@pvdm-$ae"
samples denoiser
