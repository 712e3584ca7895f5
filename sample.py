"""Generates videos with a trained system, on any number of processes: files, a grid, a page that shows them, all settings as JSON.

  python sample.py RUNS --num-videos 16 --out samples
  torchrun --standalone --nproc_per_node 2 sample.py RUNS --num-videos 16 --out samples
  python sample.py RUNS --mode long --num-frames 128 --out long    (videos of any length, clip after clip)
  python sample.py RUNS --mode image --image FILE --out videos     (HVDM, VIDM: videos that begin at a picture)
  python sample.py RUNS --num-frames 512 --reanchor --out long     (VIDM: frame after frame, beyond the frames of training)

RUNS, or --run RUNS, is the --results-dir of training; the runs in it say which system generates. Samples that are there
are kept, so the same line goes on where it was stopped. Exit status: 0 done; 75 stopped by a signal; 130 Ctrl-C;
2 wrong settings; 1 any other error.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from launch.env import Env, Stopped, distributed
from launch.run import parse_launch, run_main
from metrics.frames import psnr
from pipelines.batches import Batches
from pipelines.jobs import PictureJob, SampleConfig, SampleJob
from pipelines.long import LATENTS, LongJob, continue_from, count_clips, first_frame, write_long_grid, write_videos
from pipelines.systems import SYSTEMS, load_sampling, with_run
from pipelines.video_files import count, exactest, iterate, video_path, write_video
from utils.config import dump_yaml, to_dict
from utils.errors import UserError
from utils.files import atomic_write_text, remove_temporaries, writing_alone
from utils.gallery import write_gallery
from utils.media import grid, to_uint8, write_gif, write_mp4, write_png

GRID_LIMIT = 64
"""Samples shown in the grid, at most."""
PICTURES_SHOWN = 8
"""Samples in pictures.png, a column each: the picture, what the autoencoder makes of it, and the first frame."""


def main() -> None:
    """Parse, and generate what is not there yet."""
    launch = parse_launch(__doc__ or "")
    config = load_sampling(with_run(launch.argv), "sample.py", launch.about)
    config.validate()
    if launch.print_config or launch.dry_run:
        print(dump_yaml(to_dict(config)), end="")
        return
    with distributed(config.timeout) as env:
        generate(config, env)


def generate(config: SampleConfig, env: Env) -> None:
    """Write the missing samples of this configuration; the processes share them."""
    with ExitStack() as held:
        _generate(config, env, held)


def _generate(config: SampleConfig, env: Env, held: ExitStack) -> None:
    """The same; `held` keeps the folder until it ends."""
    state = PartialState(cpu=env.device.type == "cpu")
    job = SYSTEMS[config.system].job(config, env.device)
    if config.long and not config.num_frames:
        config = dataclasses.replace(config, num_frames=job.n_frames)
    folder = config.out
    _check_settings(job, config)
    names = [job.name(i) for i in range(config.num_videos)]
    todo = [i for i, name in enumerate(names) if not _written(job, config, name)]
    # One process's view of the folder, agreed on before anything is written. Padded: accelerate would give an idle process a sample twice.
    todo = broadcast_object_list([todo])[0]
    if env.is_main:
        for note in job.notes:
            print(note, file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        if held.enter_context(writing_alone(folder)):
            _clean(folder)
        if config.continue_from and todo:
            continue_from(_long(job), range(config.num_videos), Path(config.continue_from), folder, config.num_frames)
        _write_settings(job, config, names)
    state.wait_for_everyone()
    started = time.perf_counter()
    with state.split_between_processes(todo + [None] * (-len(todo) % env.world_size)) as mine:
        _generate_share(job, config, [i for i in mine if i is not None], env)
    state.wait_for_everyone()
    taken = time.perf_counter() - started
    if env.is_main:
        _finish(job, config, names, env.device)
        kept = config.num_videos - len(todo)
        frames = config.num_frames if config.long else job.n_frames
        print(f"{config.num_videos} samples in {folder}" + (f" ({kept} were there already)" if kept else ""), flush=True)
        if todo:
            print(f"{taken / len(todo):.3g} s a video of {frames} frames ({len(todo)} finished in {taken:.1f} s)", flush=True)


def _clean(folder: Path) -> None:
    """Delete what a run that was killed had begun to write."""
    for place in (folder, *(folder / LATENTS).glob("*/")):
        remove_temporaries(place)


def _finish(job: SampleJob, config: SampleConfig, names: list[str], device: torch.device) -> None:
    """What is written of all samples together."""
    folder, columns = config.out, len(job.labels) if 1 < len(job.labels) <= 10 else 0
    if config.long:
        write_long_grid(folder, names[:GRID_LIMIT], job.fps, config.num_frames, columns, config.formats)
        if isinstance(job, PictureJob) and config.mode == "image":
            _write_settings(job, config, names, _compare_pictures(job, config, device))
    else:
        _write_grid(job, config, names[:GRID_LIMIT], columns)
        _write_strip(job, folder)
    if config.gallery:
        write_gallery(folder)


def _generate_share(job: SampleJob, config: SampleConfig, mine: list[int], env: Env) -> None:
    """This process's samples, each written as soon as it is there."""
    long, batches = _long(job) if config.long else None, Batches(config.together, env.device, env.local_world_size)
    clips, done = len(mine) * (count_clips(long, config.num_frames) if long else 1), 0
    with tqdm(total=clips, desc="samples of rank 0", unit="clip", disable=None if env.is_main else True) as bar:
        while done < len(mine):
            indices, before = mine[done : done + batches.size], bar.n
            step = partial(_advance, bar, len(indices), env)
            if batches.attempt(partial(_generate_batch, job, config, indices, env.device, step), len(indices)):
                done += len(indices)
                continue
            bar.n = before
            now = f"{batches.size} video{'s' * (batches.size > 1)} at a time"
            print(f"note: memory does not hold {len(indices)} videos, now {now} (rank {env.rank})", file=sys.stderr, flush=True)


def _generate_batch(job: SampleJob, config: SampleConfig, indices: list[int], device: torch.device, step: Callable[[], None]) -> None:
    """Make and write these samples together; `step` is called for each clip of theirs, and may raise."""
    if config.long:
        how: dict[str, Any] = {"formats": config.formats, "keep": config.keep_latents}
        write_videos(_long(job), indices, config.out, config.num_frames, device, step, **how)
        return
    made = {ending: to_uint8(videos).cpu() for ending, videos in job.generate(indices).items()}
    for row, index in enumerate(indices):
        for ending in job.endings[1:]:
            write_mp4(config.out / f"{job.name(index)}{ending}.mp4", made[ending][row], job.fps)
        for form in config.formats:
            write_video(video_path(config.out, job.name(index), form), form, made[""][row], job.fps)
    step()


def _advance(bar: tqdm, clips: int, env: Env) -> None:
    """So many clips are done. Raises Stopped when that was asked for."""
    bar.update(clips)
    if env.stop:
        raise Stopped(agreed=False)  # the shares differ in length: the others may be anywhere


def _long(job: SampleJob) -> LongJob:
    assert isinstance(job, LongJob), "settings of systems without long videos refuse --mode long"
    return job


def _written(job: SampleJob, config: SampleConfig, name: str) -> bool:
    """Whether all files of a sample are there; a long one may have been shorter before."""
    forms = config.formats
    files = [video_path(config.out, name, form) for form in forms] + [config.out / f"{name}{ending}.mp4" for ending in job.endings[1:]]
    if not all(file.exists() for file in files):
        return False
    return not config.long or all(count(file, form, job.fps) == config.num_frames for file, form in zip(files, forms, strict=False))


def _check_settings(job: SampleJob, config: SampleConfig) -> None:
    """Raises UserError when the folder holds samples of other settings, or longer videos, and for a file in its place."""
    folder = config.out
    file = next((place for place in (folder, *folder.parents) if place.is_file()), None)
    if file is not None:
        raise UserError(f"--out {folder}: {file} is a file, a folder is wanted")
    path = folder / "settings.json"
    if not path.exists():
        return
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: delete {folder}, or choose another --out") from None
    wanted = json.loads(json.dumps(job.settings())) | _length(config)
    found = {"mode": "short"} | found
    found["mode"] = {"i2v": "image"}.get(found["mode"], found["mode"])  # as it was called
    longer = found.get("num_frames", 0) if config.long and config.recorded_mode == found["mode"] else 0
    differ = [key for key, value in wanted.items() if found.get(key) != value and not (key == "num_frames" and longer)]
    if differ:
        raise UserError(f"{folder} holds samples of other settings ({', '.join(differ)} differ): choose another --out, or delete it")
    if longer > config.num_frames:
        raise UserError(f"{folder} holds videos of {longer} frames, --num-frames {config.num_frames} are fewer: choose another --out")


def _length(config: SampleConfig) -> dict[str, Any]:
    """What a record of long videos says beyond the settings of the job."""
    return {"mode": config.recorded_mode} | ({"num_frames": config.num_frames} if config.long else {})


def _write_settings(job: SampleJob, config: SampleConfig, names: list[str], figures: list[dict[str, float]] | None = None) -> None:
    """settings.json. `figures`: what was measured of each sample, of which the mean is there besides."""
    files = [str(video_path(Path(), name, exactest(config.formats))) for name in names]
    samples: list[dict[str, Any]] = [
        {"file": file, "index": i, "class": job.label(i), "class_name": job.class_name(job.label(i))} for i, file in enumerate(files)
    ]
    measured: dict[str, Any] = {"figures": _means(figures)} if figures else {}
    samples = [sample | row for sample, row in zip(samples, figures or [{}] * len(samples), strict=True)]
    record = job.settings() | _length(config) | measured | {"sources": job.sources(), "torch": torch.__version__, "samples": samples}
    atomic_write_text(config.out / "settings.json", json.dumps(record, indent=2) + "\n")


def _compare_pictures(job: SampleJob, config: SampleConfig, device: torch.device) -> list[dict[str, float]]:
    """PSNR in dB of each sample's first frame against its picture, and of what the autoencoder alone makes of that; pictures.png."""
    assert isinstance(job, PictureJob)
    figures, shown = [], []
    for index in range(config.num_videos):
        picture, seen = job.picture(index), job.seen_picture(index)
        first = first_frame(_long(job), index, config.out, device)
        values = {"first_frame_psnr": psnr(*_stills(picture, first)), "autoencoder_psnr": psnr(*_stills(picture, seen))}
        figures.append({name: value.item() for name, value in values.items()})
        if index < PICTURES_SHOWN:
            shown.append(torch.stack([picture, seen, first]))
    rows = to_uint8(torch.stack(shown, dim=1).flatten(0, 1)).cpu()
    write_png(config.out / "pictures.png", grid(rows, len(shown)))
    means = _means(figures)
    print(
        "PSNR of first frames against their pictures {first_frame_psnr:.2f} dB, of the autoencoder {autoencoder_psnr:.2f} dB".format(
            **means
        )
    )
    return figures


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _stills(*pictures: Tensor) -> list[Tensor]:
    """Pictures 3 h w -> clips 1 3 1 h w."""
    return [picture[None, :, None] for picture in pictures]


def _write_grid(job: SampleJob, config: SampleConfig, names: list[str], columns: int) -> None:
    """The first samples side by side, one column a class where that fits."""
    folder, form = config.out, exactest(config.formats)
    clips = [torch.from_numpy(np.stack(list(iterate(video_path(folder, name, form), form, job.fps)))) for name in names]
    shown = grid(torch.stack(clips).permute(0, 4, 1, 2, 3), columns)
    write_mp4(folder / "grid.mp4", shown, job.fps)
    if "gif" in config.formats:
        write_gif(folder / "grid.gif", shown, job.fps)
    write_png(folder / "grid.png", shown[:, 0])


def _write_strip(job: SampleJob, folder: Path) -> None:
    """How the first samples came about, one row each: moving, and as the picture of their first frames."""
    strip = job.strip()
    if strip is not None:
        shown = grid(to_uint8(strip.clips).cpu(), strip.moments)
        write_mp4(folder / "strip.mp4", shown, job.fps)
        write_png(folder / "strip.png", shown[:, 0])


if __name__ == "__main__":
    run_main(main)
