"""HVDM's first stage, tiny, for tests of it and of what comes after it."""

from tasks.hvdm_autoencoder import hvdm_autoencoder_task
from tasks.hvdm_autoencoder_config import HVDMAutoencoderConfig
from tests.clip_stage import CLIPS, Stage, batch, modules

SIZES = "--model.dim 16 --model.depth 1 --model.heads 2 --model.head_dim 8 --patch-size 4 --model.plane_depth 1 --model.plane_heads 2"
FUSION = "--model.plane_mlp_dim 16 --model.fusion_depth 1 --model.freq_widths 4 4 8 8"
SMALL = f"{SIZES} {FUSION} --perceptual none --loss.adversarial.ndf 4 --loss.adversarial.n_layers 2"
STAGE = Stage("hvdm", HVDMAutoencoderConfig, hvdm_autoencoder_task, SMALL)
config, task, export, train = STAGE.config, STAGE.task, STAGE.export, STAGE.train

__all__ = ["CLIPS", "batch", "config", "export", "modules", "task", "train"]
