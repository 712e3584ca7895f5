"""The systems that `sample.py` can generate with, and how it tells which one is meant."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from models.official import hvdm_unet, pvdm_unet, vidm
from pipelines.cmd_sample import CMDSampleConfig, CMDSampleJob
from pipelines.hvdm_sample import HVDMSampleConfig, HVDMSampleJob
from pipelines.jobs import SampleConfig, SampleJob
from pipelines.latte_sample import LatteSampleConfig, LatteSampleJob
from pipelines.loading import is_official
from pipelines.pvdm_sample import PVDMSampleConfig, PVDMSampleJob
from pipelines.runs import systems_in
from pipelines.vidm_sample import VIDMSampleConfig, VIDMSampleJob
from utils.config import load_config, load_yaml
from utils.errors import ConfigError, UserError
from utils.weights import load_tensors, read_card


class System(NamedTuple):
    """A system as far as generation is concerned."""

    config: type[SampleConfig]
    job: Callable[..., SampleJob]
    """Of settings, a device, and the networks where they are there already."""


SYSTEMS: dict[str, System] = {
    "cmd": System(CMDSampleConfig, CMDSampleJob),
    "latte": System(LatteSampleConfig, LatteSampleJob),
    "pvdm": System(PVDMSampleConfig, PVDMSampleJob),
    "hvdm": System(HVDMSampleConfig, HVDMSampleJob),
    "vidm": System(VIDMSampleConfig, VIDMSampleJob),
}


def load_sampling(argv: Sequence[str], prog: str, about: str) -> SampleConfig:
    """The settings of the system that is named, that trained the given runs, or that alone knows the given flags.

    `--help` without a system explains all of them, and exits. Raises ConfigError or UserError in one line.
    """
    schemas = {name: system.config for name, system in SYSTEMS.items()}
    system = _told(argv)
    if not system and {"-h", "--help"} & set(argv):
        for name in SYSTEMS:
            try:
                load_config(schemas, ["--system", name, "--help"], prog=f"{prog} --system {name}", description=about)
            except SystemExit:
                about = ""
        raise SystemExit(0)
    config = load_config(schemas, [*(("--system", system) if system else ()), *argv], prog=prog, description=about)
    if not system and not config.run:
        *others, last = SYSTEMS
        known = f"{', '.join(others)} or {last}"
        raise ConfigError(f"what to sample from? give --run FOLDER (the --results-dir of training), or --system {known} and its models")
    return config


def with_run(argv: Sequence[str]) -> list[str]:
    """A command line whose bare first argument is the value of --run: that works under torchrun too, which may take --run for its own."""
    first = argv[0] if argv else ""
    return ["--run", *argv] if first and not first.startswith("-") and "=" not in first else list(argv)


def _told(argv: Sequence[str]) -> str:
    """The system that the command line or its recipes mean; empty when nothing tells."""
    given: dict[str, str] = {}
    for name, value in _settings(argv):
        given |= {key.replace("-", "_"): str(text) for key, text in load_yaml(value).items()} if name == "config" else {name: value}
    if "system" in given:
        return given["system"]
    run = next((given[name] for name in ("run", "results_dir") if given.get(name)), "")
    trained = systems_in(run) if run else []
    if len(trained) > 1:
        raise UserError(f"--run {run} holds runs of {' and '.join(trained)}: say with --system which of them generates")
    networks = (_of_network(name, given[name]) for name in (*_DENOISER, *_GENERATORS) if given.get(name))
    system = trained[0] if trained else next((system for system in networks if system in SYSTEMS), "")
    if system:
        return system
    if run:
        raise UserError(f"--run {run}: no finished run in it (finished: it has export/config.json); train it, or give other networks")
    known = {name: len(given.keys() & _names(system.config)) for name, system in SYSTEMS.items()}
    most = [name for name, count in known.items() if count == max(known.values())]
    return most[0] if len(most) < len(SYSTEMS) else ""


_DENOISER = ("denoiser", "ckpt", "second_model")
"""Names of the setting that says which denoiser, in the systems that have one."""
_GENERATORS = ("motion", "content")
"""In those that have two."""


_UNETS = {"pvdm": pvdm_unet, "hvdm": hvdm_unet}
"""Systems whose released denoisers are told by their names."""


def _of_network(name: str, path: str) -> str:
    """The system of the network of a setting: its card says it, or the names in an official checkpoint; empty where nothing is there."""
    if not Path(path).exists():
        return ""
    if not is_official(path):
        return str(read_card(path).get("system", ""))
    checkpoint = load_tensors(path)
    if name in _GENERATORS:
        return "vidm" if vidm.is_motion(checkpoint) or vidm.is_content(checkpoint) else "cmd"
    return next((system for system, release in _UNETS.items() if release.is_unet(checkpoint)), "latte")


def _settings(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of what a command line sets; a value that follows its name is the token after it."""
    for token, following in zip(argv, [*argv[1:], ""], strict=False):
        name, has_value, value = token.partition("=")
        if token.startswith("--") or has_value:
            yield name.removeprefix("--").replace("-", "_").removeprefix("no_"), value if has_value else following


def _names(schema: type[SampleConfig]) -> set[str]:
    """How the settings of a schema may be called, without those that it only refuses."""
    own = [item for item in dataclasses.fields(schema) if item.name not in schema.lacks]
    return {item.name for item in own} | {alias.replace("-", "_") for item in own for alias in item.metadata.get("aliases", ())}
