"""A page that shows the videos of a folder: one file beside them, which needs no server, no network and nothing else.

python -m utils.gallery FOLDER     writes FOLDER/index.html; videos are shown by class where sample.py wrote the folder, else by sub-folder
"""

import html
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from utils.errors import UserError
from utils.files import atomic_write_text

PAGE = "index.html"
SETTINGS = "settings.json"
"""What sample.py writes beside its samples."""
VIDEOS = (".mp4", ".webm", ".mov", ".m4v", ".gif")
"""What browsers play. Of several files of one name the first kind is shown."""
OVERVIEWS = ("grid", "strip", "film", "pictures")
"""Names of the files in which sample.py shows several samples at once."""

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #ffffff; --line: #dedfe2; --text: #1b1d20; --soft: #676c73; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --card: #1e2125; --line: #33373d; --text: #e7e8ea; --soft: #9aa0a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1.6rem 1.2rem 4rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .7rem; }
h2 span, .facts { color: var(--soft); font-weight: 400; }
.facts { margin: .2rem 0 1rem; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .55rem .9rem; margin: .6rem 0; }
summary { cursor: pointer; } table { border-collapse: collapse; margin-top: .5rem; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: .15rem 1.2rem .15rem 0; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 400; white-space: nowrap; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--size, 150px), 1fr)); gap: .8rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
figure video, figure img { display: block; width: 100%; min-height: 3rem; image-rendering: pixelated; background: var(--line); }
figcaption { padding: .3rem .6rem; font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .3rem .9rem; font-size: 13px; } a { color: inherit; }
label { font-size: 13px; color: var(--soft); } input { vertical-align: middle; }
details img, details video { max-width: 100%; image-rendering: pixelated; margin-top: .5rem; }
"""
# Videos are loaded and played while they are seen; folders of pictures are shown frame by frame.
SCRIPT = """
const seen = new IntersectionObserver(entries => { for (const { target, isIntersecting } of entries) {
  target.shown = isIntersecting;
  if (target.tagName !== "VIDEO") continue;
  if (isIntersecting) { if (!target.src) target.src = target.dataset.src; target.play().catch(() => {}); } else target.pause();
} }, { rootMargin: "200px" });
document.querySelectorAll("video[data-src], img[data-frames]").forEach(item => seen.observe(item));
// Of small videos the controls cover most: they are there when one is pointed at.
document.querySelectorAll("video").forEach(item => {
  for (const event of ["mouseenter", "focus", "click"]) item.addEventListener(event, () => { item.controls = true; });
  for (const event of ["mouseleave", "blur"]) item.addEventListener(event, () => { item.controls = false; });
});
let tick = 0;
setInterval(() => { tick += 1; document.querySelectorAll("img[data-frames]").forEach(item => { if (item.shown) {
  const frames = JSON.parse(item.dataset.frames); item.src = frames[tick % frames.length];
} }); }, 1000 / FPS);
document.getElementById("size").oninput = event =>
  document.documentElement.style.setProperty("--size", event.target.value + "px");
"""


@dataclass(frozen=True)
class Shown:
    """A video of the page."""

    path: Path
    """A file, or a folder of pictures."""
    group: str
    caption: str


def write_gallery(folder: Path) -> Path:
    """Write the page of a folder, and say where it is. Raises UserError where there is nothing to show."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    settings = _settings(folder)
    shown = list(_samples(folder, settings)) or list(_videos_below(folder))
    if not shown:
        raise UserError(f"{folder} holds no videos: {', '.join(VIDEOS)} and folders of pictures are shown")
    page = folder / PAGE
    atomic_write_text(page, _page(folder, settings, shown))
    return page


def _settings(folder: Path) -> dict[str, Any]:
    """What sample.py wrote beside its samples; empty where there is nothing of the kind."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _samples(folder: Path, settings: Mapping[str, Any]) -> Iterator[Shown]:
    """The samples that the settings list, of those that are there."""
    for sample in settings.get("samples", []):
        stem = re.sub(r"\.(mp4|gif)$", "", str(sample["file"]))
        path = next((folder / f"{stem}{ending}" for ending in (*VIDEOS, "") if (folder / f"{stem}{ending}").exists()), None)
        if path is not None:
            label, name = sample.get("class"), sample.get("class_name") or ""
            group = "" if label is None else f"{label} {name}".strip()
            yield Shown(path, group, f"{sample.get('index', stem)}")


def _videos_below(folder: Path) -> Iterator[Shown]:
    """All videos below a folder, by path; a folder of pictures without videos beside them is one too."""
    files = sorted(place for place in folder.rglob("*") if not any(part.startswith(".") for part in place.relative_to(folder).parts))
    videos: dict[Path, Path] = {}
    for place in sorted((place for place in files if place.suffix.lower() in VIDEOS), key=lambda path: VIDEOS.index(path.suffix.lower())):
        videos.setdefault(place.with_suffix(""), place)
    holders = {place.parent for place in videos.values()}
    for place in files:
        if place.is_dir() and place not in holders and any(place.glob("*.png")):
            videos.setdefault(place, place)
    for stem, place in sorted(videos.items()):
        if not (place.parent == folder and stem.name in OVERVIEWS):
            parent = place.parent.relative_to(folder).as_posix()
            yield Shown(place, "" if parent == "." else parent, stem.name)


def _page(folder: Path, settings: Mapping[str, Any], shown: list[Shown]) -> str:
    groups: dict[str, list[Shown]] = {}
    for item in shown:
        groups.setdefault(item.group, []).append(item)
    system = settings.get("system")
    title = f"Videos of {system}, seed {settings.get('seed')}" if system else f"Videos of {folder.resolve().name}"
    facts = [f"{len(shown)} videos", *([f"{len(groups)} groups"] if len(groups) > 1 else []), *_facts(settings)]
    links = [f'<a href="#group-{number}">{html.escape(name or "others")}</a>' for number, name in enumerate(groups)]
    sections = [_section(folder, number, name, items) for number, (name, items) in enumerate(groups.items())]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="facts">{html.escape(", ".join(facts))}</p>',
        '<p><label>size <input id="size" type="range" min="60" max="600" value="150"></label></p>',
        _settings_table(settings),
        _overviews(folder) if settings else "",
        f"<nav>{''.join(links)}</nav>" if len(links) > 1 else "",
        *sections,
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    script = SCRIPT.replace("FPS", f"{float(settings.get('fps') or 10):g}")
    body = "\n".join(filter(None, parts))
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n<script>{script}</script></body></html>\n"
    )


def _facts(settings: Mapping[str, Any]) -> Iterator[str]:
    """What the heading says of the settings."""
    frames = settings.get("num_frames") or settings.get("n_frames")
    if frames:
        yield f"{frames} frames"
    if settings.get("fps"):
        yield f"{settings['fps']:g} a second"


def _section(folder: Path, number: int, name: str, items: list[Shown]) -> str:
    heading = f'<h2 id="group-{number}">{html.escape(name)} <span>{len(items)}</span></h2>' if name else f'<h2 id="group-{number}"></h2>'
    return f'{heading}\n<div class="videos">\n' + "\n".join(_figure(folder, item) for item in items) + "\n</div>"


def _figure(folder: Path, item: Shown) -> str:
    caption = f"<figcaption>{html.escape(item.caption)}</figcaption>"
    name = html.escape(item.path.name, quote=True)
    if item.path.is_dir():
        frames = [_link(folder, place) for place in sorted(item.path.glob("*.png"))]
        listed = html.escape(json.dumps(frames), quote=True)
        return f'<figure><img src="{frames[0] if frames else ""}" data-frames="{listed}" alt="{name}" loading="lazy">{caption}</figure>'
    if item.path.suffix.lower() == ".gif":
        return f'<figure><img src="{_link(folder, item.path)}" alt="{name}" loading="lazy">{caption}</figure>'
    link = _link(folder, item.path)
    player = f'<video data-src="{link}" title="{name}" preload="none" loop muted playsinline tabindex="0"></video>'
    return f'<figure>{player}<noscript><a href="{link}">{name}</a></noscript>{caption}</figure>'


def _overviews(folder: Path) -> str:
    """The pictures that show several samples at once."""
    found = [folder / f"{name}.png" for name in OVERVIEWS if (folder / f"{name}.png").is_file()]
    shown = "".join(f'<p><img src="{_link(folder, place)}" alt="{place.stem}" loading="lazy"></p>' for place in found)
    return f"<details><summary>Overviews: {', '.join(place.stem for place in found)}</summary>{shown}</details>" if found else ""


def _settings_table(settings: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in _rows(settings))
    return f"<details><summary>Settings</summary><table>{rows}</table></details>" if rows else ""


def _rows(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of each setting; what is inside a group bears the group's name. Without the samples themselves."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{parent}{name} ")
        elif name != "samples":
            yield f"{parent}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _link(folder: Path, place: Path) -> str:
    """A relative link. Escaped twice over: as a link, and as an attribute."""
    return html.escape(quote(place.relative_to(folder).as_posix()), quote=True)


def main(argv: list[str]) -> int:
    """The command line: the exit status."""
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv in (["-h"], ["--help"]) else 2
    try:
        print(write_gallery(Path(argv[0])))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
