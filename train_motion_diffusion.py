"""Train the model that generates motion: of a content frame, on the latents of an autoencoder (CMD), or frame after frame (VIDM).

  torchrun --standalone --nproc_per_node 2 train_motion_diffusion.py --config configs/cmd/tiny.yaml --data-path SHARDS --ae RUN
  python train_motion_diffusion.py --nproc_per_node 2 --config configs/vidm/tiny.yaml --data-path SHARDS

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
from tasks import motion, vidm_motion
from tasks.motion import CMDMotionConfig
from tasks.scores import open_scorer, plan_scorer
from tasks.vidm_config import VIDMMotionConfig
from utils.config import dump_yaml, load_config, to_dict

PROG = "train_motion_diffusion.py"
Config = CMDMotionConfig | VIDMMotionConfig
SCHEMAS: dict[str, type[Config]] = {"cmd": CMDMotionConfig, "vidm": VIDMMotionConfig}


def build(config: Config, env: Env) -> tuple[Task, ClipSource, ClipSource | None]:
    """Task, training samples and validation samples of the config's system."""
    return vidm_motion.build(config, env) if isinstance(config, VIDMMotionConfig) else motion.build(config, env)


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
        task, source, valid = build(config, env)
        print(report(task, source, config, env, valid, plan_scorer(config, task, valid or source)), end="")
        return
    with distributed(config.parallel.timeout) as env:
        config = for_ranks(config, env)
        task, source, valid = build(config, env)
        fit(task, source, config, env, valid=valid, scorer=open_scorer(config, task, valid or source, env))


if __name__ == "__main__":
    run_main(main)
