"""`preprocess.py shards`: videos -> shards."""

import argparse
import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from datasets.commands.options import DIGITS, clip_rules
from datasets.commands.parser import Progress
from datasets.prepare.build import Outcome, SetInfo, Task, build
from datasets.prepare.parts import WORK, Part, locked
from datasets.prepare.report import REPORT, read_report, summary
from datasets.prepare.writer import remove_set
from datasets.shards import FORMAT, INDEX
from datasets.sources import SourceOptions, detect, list_videos
from datasets.sources.base import Listing
from datasets.synthetic import LICENCE, DigitsConfig, make_digits
from utils.errors import ConfigError, UserError


def run_shards(args: argparse.Namespace) -> None:
    """`preprocess.py shards`: lists the videos, makes this task's parts, prints the report when the set is complete."""
    started = time.monotonic()
    torch.set_num_threads(1)
    task, parts = _task(args)
    root, name, licence = _source(args)
    rules = clip_rules(args)
    if args.dataset_name == DIGITS:
        if args.overwrite:
            _clear(args.out)
        make_digits(root, DigitsConfig(args.num_videos, rules.size, args.video_frames, args.digits, args.seed))
    layout, listing = _list(args, root)
    if args.overwrite and args.dataset_name != DIGITS:
        _clear(args.out)  # not before the new set's videos are found: a slip must not cost the old one
    info = SetInfo(
        name=_printable(name or (layout if layout == "UCF101" else root.resolve().stem if root.is_file() else root.resolve().name)),
        source=layout,
        licence=_printable(licence, 2000),
        split=args.split,
        seed=args.seed,
        shard_samples=args.shard_size,
        shard_bytes=args.shard_mib << 20,
        dedupe=args.dedupe,
        parts=parts,
    )
    with Progress(len(listing.videos), "video") as bar:
        workers = min(args.workers, len(listing.videos))
        outcome = build(
            listing,
            rules,
            info,
            args.out,
            workers=workers,
            progress=lambda videos, tally: bar.update(videos, f", {tally.clips} clips in finished shards"),
            task=task,
        )
    _tell(args, outcome, task, layout, listing, time.monotonic() - started)


def _printable(text: str, limit: int = 200) -> str:
    """One line of text that any terminal and any reader of index.json can take."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:limit]


def _task(args: argparse.Namespace) -> tuple[Task, int]:
    """Which task this is, and the number of parts. ConfigError for numbers that do not go together."""
    if args.task_id is None and args.num_tasks > 1:
        raise ConfigError(f"--num-tasks {args.num_tasks}: say which of them this is with --task-id, from 0 to {args.num_tasks - 1}")
    index = args.task_id or 0
    if index >= args.num_tasks:
        raise ConfigError(f"--task-id {index}: must be below --num-tasks {args.num_tasks}; tasks are counted from 0")
    if args.num_tasks > 1 and args.overwrite:
        raise ConfigError(
            "--overwrite with --num-tasks: tasks would delete each other's work; delete the folder before the first one starts"
        )
    if args.num_tasks > 1 and args.dataset_name == DIGITS:
        raise ConfigError(f"--dataset-name {DIGITS} is made by one task: leave --num-tasks away")
    return Task(index, args.num_tasks), args.parts or args.num_tasks


def _source(args: argparse.Namespace) -> tuple[Path, str, str]:
    """Source folder, name of the data set (empty: by the folder), licence line."""
    root = args.source or args.source_flag
    if args.dataset_name == DIGITS:
        if root is not None:
            raise ConfigError(f"--dataset-name {DIGITS} makes its own videos: drop the source folder {root}")
        return args.out / "source", args.name or DIGITS, args.licence or LICENCE
    if root is None:
        raise ConfigError(f"say which folder of videos to take, or --dataset-name {DIGITS}")
    if args.source and args.source_flag and args.source != args.source_flag:
        raise ConfigError(f"two source folders: {args.source} and {args.source_flag}")
    if root.exists() and args.out.exists() and root.samefile(args.out):
        raise ConfigError(f"--out {args.out} is the source folder: choose another")
    return root, args.name, args.licence


def _list(args: argparse.Namespace, root: Path) -> tuple[str, Listing]:
    """The layout's name and the videos."""
    digits = args.dataset_name == DIGITS
    options = SourceOptions(
        split=args.split,
        fold=args.fold,
        split_lists=args.split_lists,
        val_fraction=args.val_fraction,
        exclude=None if digits else args.out,
        captions=args.captions,
        filter=args.filter,
    )
    layout = "folder" if digits else args.dataset_name
    if layout == "auto":
        layout = detect(root, options.exclude)
    return layout, list_videos(root, layout, options, args.seed)


def _tell(args: argparse.Namespace, outcome: Outcome, task: Task, layout: str, listing: Listing, seconds: float) -> None:
    """Prints what came of it. UserError when too many videos gave no clip."""
    if outcome.missing:
        made = f"{outcome.made.clips} clips of {outcome.made.videos} videos in {seconds:.1f} s"
        print(f"task {task.index} of {task.count} is done ({made}); {outcome.missing} parts of the set are still to be made: {args.out}")
        return
    report = read_report(args.out)
    if report is None:
        raise UserError(f"{args.out} is complete, but {REPORT} is gone: preprocess.py inspect {args.out} describes the set without it")
    print(summary(report))
    classes = f"{len(listing.classes)} classes" if listing.classes else "no classes"
    print(
        f"{report['clips']} clips of {report['used']} of {report['videos']} videos, {classes}, layout {layout}, "
        f"{'was complete already' if outcome.was_complete else f'in {seconds:.1f} s'}: {args.out} (details in {REPORT})"
    )
    rejected = 1 - report["used"] / report["videos"]
    if rejected > args.max_rejects:
        raise UserError(
            f"{report['videos'] - report['used']} of {report['videos']} videos ({rejected:.1%}) gave no clip, more than "
            f"--max-rejects {args.max_rejects:g}: the set is complete, {args.out / REPORT} says why they are not in it"
        )


def _clear(out: Path) -> None:
    """Deletes a shard set, and nothing that preprocess.py did not write. UserError when a process is still writing it."""
    with ExitStack() as stack:
        try:
            for folder in sorted((out / WORK).glob("part-*")):
                stack.enter_context(locked(Part(out, int(folder.name.removeprefix("part-")) or None, 0, 0)))
        except OSError as error:
            raise UserError(f"cannot delete the set in {out}: {error.strerror}") from None
        if (out / WORK).exists() or next(out.glob("shard-*.tar"), None) or _is_index(out / INDEX):
            remove_set(out)
            shutil.rmtree(out / WORK, ignore_errors=True)
    if (out / "source" / "digits.json").exists():
        shutil.rmtree(out / "source")


def _is_index(path: Path) -> bool:
    """Whether there is an index.json that a shard set left. UserError for one of another program."""
    try:
        is_ours = json.loads(path.read_bytes())["format"] == FORMAT
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"--overwrite: {path} is not of a shard set: choose another --out, or delete it yourself")
    return True
