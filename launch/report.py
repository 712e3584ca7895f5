"""One HTML page of a results folder: loss curves, reconstructions, generated clips and the figures.

`python -m launch.report RESULTS --samples FOLDER --out report.html`. Everything is inside the file: it needs no server and can be mailed.
"""

import argparse
import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.files import atomic_write_bytes

STAGES = {
    "cmd": (("autoencoder", "Autoencoder"), ("content", "Content model"), ("motion", "Motion model")),
    "hvdm": (("autoencoder", "Hybrid autoencoder"), ("denoiser", "Denoiser")),
    "latte": (("autoencoder", "Frame VAE"), ("denoiser", "Denoiser")),
    "pvdm": (("autoencoder", "Triplane autoencoder"), ("denoiser", "Denoiser")),
    "vidm": (("content", "Content generator"), ("motion", "Motion generator")),
}
"""System -> its stages and their titles."""
OPTIONAL = {("hvdm", "autoencoder"), ("latte", "autoencoder"), ("pvdm", "autoencoder"), ("vidm", "content")}
"""Stages that somebody else may have trained."""
CAPTIONS = {
    "reconstruction": "held-out clips or frames, each above its reconstruction",
    "content_frame": "their content frames",
    "content_samples": "generated content frames",
    "motion_samples": "held-out clips, each above a generated motion of its content frame",
    "samples": "generated clips or frames",
    "next": "the first frame, the one before, the true frame and the generated one",
    "video": "generated videos that begin with the first frames of clips",
}
SETTINGS = "settings.json"
"""What sample.py writes beside its samples."""
SHOWN = 64
"""Clips of a folder that the page shows, at most."""
STRIP = "how the first clips came about: their first frames, estimated at several steps of the sampling"
FILM = "how the first videos go on: frames at even distances"
PICTURES = "the pictures, what the autoencoder alone makes of them, and the first frames of the videos"
TITLES = {
    "short": "Generated clips",
    "long": "Long videos: {num_frames} frames, clip after clip",
    "image": "Videos that begin at a picture: {num_frames} frames",
    "i2v": "Videos that begin at a picture: {num_frames} frames",  # as it was called
    "frames": "Generated videos: {num_frames} frames, one after the other",
}
FRAME_AFTER_FRAME = {"vidm"}
"""Systems that have no clips, but frames."""
FIGURES = {
    "first_frame_psnr": "PSNR of first frames against their pictures, dB",
    "autoencoder_psnr": "PSNR of what the autoencoder alone makes of the pictures, dB",
    "motion": "motion of the videos",
}
MEDIA_TYPES = {".gif": "image/gif", ".png": "image/png", ".mp4": "video/mp4"}
PREVIEWS = (".gif", ".png")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1e21; }
h2 { border-bottom: 1px solid #d8dadd; padding-bottom: .2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; } td { font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: .4rem 1rem .4rem 0; vertical-align: top; } figcaption { color: #5f6368; font-size: 13px; }
img, video { image-rendering: pixelated; border: 1px solid #d8dadd; } svg text { font: 11px system-ui, sans-serif; fill: #5f6368; }
"""


def newest_runs(results: Path) -> dict[tuple[str, str], Path]:
    """(system, stage) -> its newest run folder that holds metrics, oldest first."""
    runs: dict[tuple[str, str], Path] = {}
    for path in sorted(results.glob("*/metrics.jsonl")):
        key = _stage_of(path.parent)
        runs.pop(key, None)
        runs[key] = path.parent
    return runs


def _stage_of(run: Path) -> tuple[str, str]:
    """(system, stage) of a run; empty where it does not say."""
    place = run / "config.yaml"
    config = (yaml.safe_load(place.read_text()) or {}) if place.is_file() else {}
    return str(config.get("system", "")), str(config.get("stage", ""))


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, oldest first."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.strip()]


def curve(points: Sequence[tuple[float, float]], label: str, width: int = 300, height: int = 150) -> str:
    """An SVG line chart on a logarithmic value axis (linear where a value is not positive)."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2:
        return ""
    logarithmic = all(y > 0 for _, y in points)
    values = [math.log10(y) if logarithmic else y for _, y in points]
    low, high = min(values), max(values)
    span, last, left, top = (high - low) or 1.0, points[-1][0], 46, 8
    plot_width, plot_height = width - left - 8, height - top - 24
    path = " ".join(
        f"{left + plot_width * x / last:.1f},{top + plot_height * (high - value) / span:.1f}"
        for (x, _), value in zip(points, values, strict=True)
    )
    ends = [(high, top + 8), (low, top + plot_height)]
    ticks = "".join(f'<text x="2" y="{y}">{(10**value if logarithmic else value):.3g}</text>' for value, y in ends)
    return (
        f'<figure><svg width="{width}" height="{height}"><rect x="{left}" y="{top}" width="{plot_width}" height="{plot_height}" '
        f'fill="none" stroke="#d8dadd"/>{ticks}<text x="{left}" y="{height - 8}">0</text>'
        f'<text x="{width - 8}" y="{height - 8}" text-anchor="end">step {last:.0f}</text>'
        f'<polyline points="{path}" fill="none" stroke="#1a73e8" stroke-width="1.5"/></svg>'
        f"<figcaption>{html.escape(label)}</figcaption></figure>"
    )


def picture(path: Path, caption: str, height: int) -> str:
    """An image, a GIF or an mp4 of the disk, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{MEDIA_TYPES[path.suffix]};base64,{data}"
    text = html.escape(caption)
    shown = f'<img src="{source}" height="{height}" alt="{text}">'
    if path.suffix == ".mp4":
        shown = f'<video src="{source}" height="{height}" autoplay loop muted controls></video>'
    return f"<figure>{shown}<figcaption>{text}</figcaption></figure>"


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Two columns: name and value."""
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(_number(value))}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def stage_section(title: str, run: Path) -> str:
    """Curves, last figures and newest previews of one run."""
    lines = read_metrics(run)
    train = [line for line in lines if "loss" in line]
    if not train:
        return f"<h2>{title}</h2><p>No step was logged yet in {html.escape(str(run))}.</p>"
    losses = [name for name in train[-1] if name.split("/")[0] in ("loss", "train")]
    curves = "".join(curve([(line["step"], line[name]) for line in train if name in line], name) for name in losses)
    last: dict[str, object] = {}
    for line in lines:
        last.update(line)
    samples = run / "samples"
    newest: dict[str, Path] = {}
    for path in sorted(path for suffix in PREVIEWS for path in samples.glob(f"*{suffix}")):
        newest[path.stem.split("_", 2)[-1]] = path
    shown = "".join(picture(path, CAPTIONS.get(name, name), 280) for name, path in newest.items())
    return f"<h2>{title}</h2>{shown}<div>{curves}</div><details><summary>Last figures</summary>{table(last.items())}</details>"


def samples_section(folder: Path) -> str:
    """The generated clips as they play, with the settings that made them."""
    settings = _json(folder / SETTINGS)
    mode = settings.get("mode", "short")
    long = mode != "short"
    patterns = ("[0-9]*.mp4",) if long else ("[0-9]*.gif", "sample_output_*.gif")
    clips = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not clips:
        raise UserError(
            f"{folder} holds no {'video' if long else 'GIF'}: run sample.py {'' if long else 'with --gif '}into this folder first"
        )
    plain = [(name, value) for name, value in settings.items() if isinstance(value, str | int | float)]
    shown = "".join(picture(path, path.stem, 128) for path in clips[:SHOWN])
    for name, caption in (("pictures.png", PICTURES), ("strip.png", STRIP), ("film.png", FILM)):
        if (folder / name).is_file():
            shown += f"<div>{picture(folder / name, caption, 320)}</div>"
    kind = "frames" if settings.get("system") in FRAME_AFTER_FRAME else mode
    title = TITLES[kind].format(**settings) + (f", class {settings['dynamics']} of motion" if "dynamics" in settings else "")
    found = settings.get("figures", {}) | _json(folder / "motion.json")
    measured = [(told, found[name]) for name, told in FIGURES.items() if name in found]
    return f"<h2>{title}</h2>{shown}{table(measured) if measured else ''}<details><summary>Settings</summary>{table(plain)}</details>"


def _json(place: Path) -> dict[str, Any]:
    """What sample.py or evaluate.py wrote beside samples; empty where it is not there."""
    return dict(json.loads(place.read_text())) if place.is_file() else {}


def build(results: Path, samples: Sequence[Path], figures: Path | None) -> str:
    """The page as text. `samples`: folders of clips, and of long videos."""
    parts = []
    if figures is not None:
        values = json.loads(figures.read_text())
        parts.append(
            "<h2>Reconstruction of held-out clips</h2>" + table((k, v) for k, v in values.items() if not isinstance(v, dict | list))
        )
    parts += [samples_section(folder) for folder in samples]
    runs = newest_runs(results)
    system = _system(samples[0], runs)
    for stage, title in STAGES[system]:
        run = runs.get((system, stage))
        if run is not None:
            before = _started_from(run)
            if before is not None:
                parts.append(stage_section(title, before))
                title = f"{title}: {run.name}, which went on from {before.name}"
            parts.append(stage_section(title, run))
        elif (system, stage) not in OPTIONAL:
            raise UserError(f"{results} holds no run of the {stage} stage: train it first")
    return f'<!doctype html><meta charset="utf-8"><title>Kinoform</title><style>{STYLE}</style><h1>Kinoform</h1>' + "".join(parts)


def _started_from(run: Path) -> Path | None:
    """The run whose weights a run began with, where it is beside it and logged something."""
    place = run / "config.yaml"
    config = (yaml.safe_load(place.read_text()) or {}) if place.is_file() else {}
    given = (config.get("model") or {}).get("init_from") or ""
    found = [folder for folder in run.parent.iterdir() if folder.name in Path(given).parts and (folder / "metrics.jsonl").is_file()]
    return found[0] if found and found[0] != run else None


def _system(samples: Path, runs: Mapping[tuple[str, str], Path]) -> str:
    """The system of the samples; where they do not say, that of the newest run."""
    settings = _json(samples / SETTINGS)
    known = [system for system, _ in runs if system in STAGES]
    return settings["system"] if settings.get("system") in STAGES else known[-1] if known else next(iter(STAGES))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="results folder that holds the runs of all stages")
    parser.add_argument(
        "--samples",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        help="folders that sample.py wrote: of clips with GIFs, of long videos, of videos that begin at pictures",
    )
    parser.add_argument("--figures", type=Path, help="JSON that evaluate.py reconstruct wrote")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    args = parser.parse_args()
    atomic_write_bytes(args.out, build(args.results, args.samples, args.figures).encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    from launch.run import run_main

    run_main(main)
