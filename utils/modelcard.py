"""README.md of weights that are shared: what they are, what they were trained on and how they are loaded, with the hub's front matter."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from utils.yamlfile import dump_yaml

LIBRARY = "kinoform"
UNKNOWN = "unknown"
"""Licence of weights of which nobody has said one; the hub knows this word."""
LICENSES = (
    "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0",
    "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m", "gpl-3.0", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "openrail++", "unknown",
    "unlicense",
)  # fmt: skip
"""Those of the hub's identifiers that weights usually have; any other licence is `other` there, with a name of its own."""
_TRAINING = {"batch": "batch", "learning_rate": "learning rate", "precision": "arithmetic", "ema_decay": "decay of the average"}


def front_matter(license: str, tags: Sequence[str]) -> str:
    """The YAML block that the hub reads. `license`: an identifier of the hub, or any other line."""
    known = license.lower() in LICENSES
    named = {"license": license.lower()} if known else {"license": "other", "license_name": _slug(license)}
    return (
        f"---\n{dump_yaml({'library_name': LIBRARY, **named, 'tags': [LIBRARY, 'video-generation', *filter(None, map(_slug, tags))]})}---\n"
    )


def export_card(card: Mapping[str, Any], files: Sequence[str]) -> str:
    """README.md of an export with this card and these weights files: one network of a system."""
    system, stage = str(card.get("system", "")), str(card.get("stage", ""))
    license = str(card.get("license", UNKNOWN))
    kept = [("model.safetensors", "the last weights"), ("ema.safetensors", "their moving average, which is what is used where it is there")]
    parts = [
        front_matter(license, (system, stage)),
        f"# {' '.join(filter(None, (system, stage))) or 'weights'}\n",
        "One network of a video generator, trained with Kinoform.\n",
        table([("system", system), ("stage", stage), ("licence", license), *_trained_on(card), *_training(card)]),
        _figures(card),
        "## Files\n",
        "\n".join(f"- `{name}`: {what}" for name, what in kept if name in files),
        "- `config.json`: the network's sizes, what it was trained on, and the digests of the files above\n",
        "## Use\n",
        "With the other networks of its system, from the folder of the runs:\n",
        "    python sample.py RUNS --out samples\n    python -m pipelines.pretrained save RUNS FOLDER\n",
        "Its tensors alone, in a checkout of Kinoform:\n",
        '    from utils.weights import read_export\n\n    state, card, sha256 = read_export("FOLDER_OF_THIS_FILE")\n',
    ]
    return "\n".join(filter(None, parts))


def family_card(system: str, parts: Mapping[str, Mapping[str, Any]], license: str) -> str:
    """README.md of a saved folder of all networks of a system; `parts`: stage -> card."""
    sections = []
    for stage, card in parts.items():
        figures = _figures(card).replace("## Evaluation", f"Evaluation of {stage}:")
        sections += [
            f"## {stage}\n",
            table([("licence", str(card.get("license", UNKNOWN))), *_trained_on(card), *_training(card)]),
            figures,
        ]
    text = [
        front_matter(license, (system,)),
        f"# {system}\n",
        f"A video generator trained with Kinoform: {', '.join(parts)}, each in a folder of its own.\n",
        "    python sample.py FOLDER_OR_HUB_ID --out samples\n",
        "or, in a checkout of Kinoform:\n",
        "    from pipelines.pretrained import from_pretrained\n",
        '    pipeline = from_pretrained("FOLDER_OR_HUB_ID")\n    clips = pipeline.generate([0, 1], seed=0)    # b 3 t h w in [-1, 1]\n',
        *sections,
    ]
    return "\n".join(filter(None, text))


def table(rows: Sequence[tuple[str, str]]) -> str:
    """A markdown table of two columns, without the rows that say nothing."""
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows if value]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _trained_on(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the data."""
    data = card.get("data")
    if not isinstance(data, Mapping) or not data.get("dataset"):
        return []
    rows = [("data", str(data["dataset"]) + (f" (sha256 {str(data['digest'])[:12]}...)" if data.get("digest") else ""))]
    rows.append(("licence of the data", str(data.get("licence") or "none noted")))
    if {"n_frames", "image_size"} <= data.keys():
        size = "x".join(str(data["image_size"]).strip("[]()").split(", "))
        rows.append(("clips", f"{data['n_frames']} frames of {size}" + (f" at {data['fps']} a second" if "fps" in data else "")))
    if data.get("classes"):
        rows.append(("classes", str(len(data["classes"]))))
    return rows


def _training(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of how long and how it was trained, and of what it began with."""
    training, rows = card.get("training") or {}, []
    if "step" in card:
        rows.append(("steps", f"{card['step']}" + (f" ({card['samples']} samples)" if "samples" in card else "")))
    rows += [(name, f"{training[key]}") for key, name in _TRAINING.items() if training.get(key)]
    if "source" in card:
        rows.append(("converted from", f"{card['source'].get('file', '')} (sha256 {card['source'].get('sha256', '')[:12]}...)"))
        for name, told in (card["source"].get("filled") or {}).items():
            what = f"{len(told['tensors'])} of {told['from']} (sha256 {told['sha256'][:12]}...)"
            rows.append((f"tensors of {name} that the file lacked", what))
    return rows


def _figures(card: Mapping[str, Any]) -> str:
    """Why these weights were kept, and the figures of each kind with how they were measured."""
    best, parts = card.get("best"), []
    if best:
        reached = f"{best['metric']}, {best['value']:.6g}"
        parts.append(f"These weights were kept because their {reached}, is the best of the run's evaluations.\n")
    for kind in ("evaluation", "score"):
        measured = card.get(kind) or {}
        if measured.get("values"):
            rows = [(name, f"{value:.6g}") for name, value in measured["values"].items()]
            parts += [f"After step {measured['step']}, {measured['protocol']}.\n", table(rows)]
    return "\n".join(["## Evaluation\n", *parts]) if parts else ""


def _cell(text: str) -> str:
    """A text that stays in its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")
