"""Train the denoiser of a one-stage latent model on latents, or on clips that a frozen autoencoder encodes as it goes (Latte, PVDM, HVDM).

  torchrun --standalone --nproc_per_node 2 train_dit.py --config configs/latte/tiny.yaml --data-path LATENTS --ae RUN
  python train_dit.py --nproc_per_node 2 --config configs/latte/tiny.yaml --data-path SHARDS --ae RUN

The same line starts a run, resumes it and finds it finished. Exit status: 0 done; 75 stopped by a signal
and saved; 130 Ctrl-C; 2 wrong settings; 1 any other error.
"""

from datasets.loader import ClipSource
from engine.elastic import for_ranks
from engine.loop import fit
from engine.plan import report
from launch.env import Env, distributed
from launch.run import parse_launch, run_main
from tasks import hvdm, latte, pvdm
from tasks.hvdm_config import HVDMRunConfig
from tasks.latent import LatentTask
from tasks.latent_config import LatteRunConfig
from tasks.pvdm_config import PVDMRunConfig
from tasks.scores import open_scorer, plan_scorer
from utils.config import dump_yaml, load_config, to_dict

PROG = "train_dit.py"
Config = LatteRunConfig | PVDMRunConfig | HVDMRunConfig
SCHEMAS: dict[str, type[Config]] = {"latte": LatteRunConfig, "pvdm": PVDMRunConfig, "hvdm": HVDMRunConfig}


def build(config: Config, env: Env) -> tuple[LatentTask, ClipSource, ClipSource | None]:
    """Task, training samples and validation samples of the config's system."""
    if isinstance(config, PVDMRunConfig):
        return pvdm.build(config, env)
    return hvdm.build(config, env) if isinstance(config, HVDMRunConfig) else latte.build(config, env)


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
