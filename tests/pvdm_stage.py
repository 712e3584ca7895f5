"""PVDM's first stage, tiny, for tests of it and of what comes after it."""

from tasks.pvdm_autoencoder import pvdm_autoencoder_task
from tasks.pvdm_autoencoder_config import PVDMAutoencoderConfig
from tests.clip_stage import CLIPS, Stage, batch, modules

SIZES = "--model.dim 16 --model.depth 1 --model.heads 2 --model.head_dim 8 --patch-size 4 --model.plane_depth 1 --model.plane_heads 2"
SMALL = f"{SIZES} --model.plane_mlp_dim 16 --perceptual none --loss.adversarial.ndf 4 --loss.adversarial.n_layers 2"
STAGE = Stage("pvdm", PVDMAutoencoderConfig, pvdm_autoencoder_task, SMALL)
config, task, export, train = STAGE.config, STAGE.task, STAGE.export, STAGE.train

__all__ = ["CLIPS", "batch", "config", "export", "modules", "task", "train"]
