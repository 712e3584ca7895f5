"""Train an autoencoder (CMD: a clip to a content frame and a motion latent, and back; PVDM: to three planes;
HVDM: to a volume; Latte: a VAE of frames).

  torchrun --standalone --nproc_per_node 2 train_ae.py --config configs/cmd/tiny.yaml --data-path SHARDS
  python train_ae.py --nproc_per_node 2 --config configs/latte/tiny.yaml --data-path SHARDS
  python train_ae.py --config configs/pvdm/ucf101-adversarial.yaml --data-path SHARDS --val-path HELD_OUT --init-from RUN

The same line starts a run, resumes it and finds it finished. Exit status: 0 done; 75 stopped by a signal
and saved; 130 Ctrl-C; 2 wrong settings; 1 any other error.
"""

from datasets.loader import ClipSource
from engine.elastic import for_ranks
from engine.loop import fit
from engine.plan import report
from engine.task import Task
from launch.env import Env, distributed
from launch.run import parse_launch, run_main
from tasks import autoencoder, frame_vae, hvdm_autoencoder, pvdm_autoencoder
from tasks.autoencoder_config import CMDAutoencoderConfig
from tasks.frame_vae_config import FrameVAERunConfig
from tasks.hvdm_autoencoder_config import HVDMAutoencoderConfig
from tasks.pvdm_autoencoder_config import PVDMAutoencoderConfig
from tasks.scores import open_scorer, plan_scorer
from utils.config import dump_yaml, load_config, to_dict

PROG = "train_ae.py"
Config = CMDAutoencoderConfig | PVDMAutoencoderConfig | HVDMAutoencoderConfig | FrameVAERunConfig
SCHEMAS: dict[str, type[Config]] = {
    "cmd": CMDAutoencoderConfig,
    "pvdm": PVDMAutoencoderConfig,
    "hvdm": HVDMAutoencoderConfig,
    "latte": FrameVAERunConfig,
}


def build(config: Config, env: Env) -> tuple[Task, ClipSource, ClipSource | None]:
    """Task, training samples and validation samples of the config's system."""
    if isinstance(config, PVDMAutoencoderConfig):
        return pvdm_autoencoder.build(config, env)
    if isinstance(config, HVDMAutoencoderConfig):
        return hvdm_autoencoder.build(config, env)
    return frame_vae.build(config, env) if isinstance(config, FrameVAERunConfig) else autoencoder.build(config, env)


def main() -> None:
    """Command line -> config -> task -> `fit`."""
    launch = parse_launch(__doc__ or "")
    config = load_config(SCHEMAS, launch.argv, prog=PROG, description=launch.about)
    config.validate()
    if launch.print_config:
        print(dump_yaml(to_dict(config)), end="")
        return
    if launch.dry_run:
        env = launch.env()
        config = for_ranks(config, env)
        task, source, valid = build(config.for_planning(), env)
        print(report(task, source, config, env, valid, plan_scorer(config, task, valid or source)), end="")
        return
    with distributed(config.parallel.timeout) as env:
        config = for_ranks(config, env)
        task, source, valid = build(config, env)
        fit(task, source, config, env, valid=valid, scorer=open_scorer(config, task, valid or source, env))


if __name__ == "__main__":
    run_main(main)
