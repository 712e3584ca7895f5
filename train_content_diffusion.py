"""Train the model that generates what a video begins with: content frames, on the latents of an autoencoder (CMD), or first frames (VIDM).

  torchrun --standalone --nproc_per_node 2 train_content_diffusion.py --config configs/cmd/tiny.yaml --data-path SHARDS --ae RUN
  python train_content_diffusion.py --nproc_per_node 2 --config configs/vidm/tiny.yaml --data-path SHARDS

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
from tasks import content, vidm_content
from tasks.content import CMDContentConfig
from tasks.scores import open_scorer, plan_scorer
from tasks.vidm_config import VIDMContentConfig
from utils.config import dump_yaml, load_config, to_dict

PROG = "train_content_diffusion.py"
Config = CMDContentConfig | VIDMContentConfig
SCHEMAS: dict[str, type[Config]] = {"cmd": CMDContentConfig, "vidm": VIDMContentConfig}


def build(config: Config, env: Env) -> tuple[Task, ClipSource, ClipSource | None]:
    """Task, training samples and validation samples of the config's system."""
    return vidm_content.build(config, env) if isinstance(config, VIDMContentConfig) else content.build(config, env)


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
