"""An autoencoder that does not serve the later stages is refused in one line, whatever is wrong with it."""

import dataclasses
import re
from pathlib import Path

import pytest

from tasks.clips import VaeConfig
from tasks.diffusion_task import AutoencoderSourceConfig, open_first_stage
from tests.cmd_family import CLIPS, autoencoder_task, content_task, export
from utils.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder, a content model on it, and an autoencoder that has not been exported yet."""
    root = tmp_path_factory.mktemp("runs")
    ae = export(autoencoder_task(), root / "000-cmd-autoencoder")
    export(content_task(ae), root / "001-cmd-content")
    (root / "002-cmd-autoencoder").mkdir()
    (root / "002-cmd-autoencoder" / "identity").touch()
    return root


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, "which autoencoder? give --ae FOLDER"),
        ("nowhere", {}, "nowhere does not exist: give a run folder, or its export/"),
        ("002-cmd-autoencoder", {}, "002-cmd-autoencoder is a run that has no export yet"),
        ("001-cmd-content", {}, "001-cmd-content is an export of 'cmd content', a 'cmd autoencoder' is wanted here"),
        ("000-cmd-autoencoder", {}, "000-cmd-autoencoder takes clips of 4x16x24 (frames x height x width), these are 8x32x32"),
        ("000-cmd-autoencoder", {"mode": "latent"}, "--mode latent: the autoencoder"),
        ("000-cmd-autoencoder", {"embed_dim": 7}, "--embed-dim 7: the autoencoder"),
    ],
)
def test_an_autoencoder_that_does_not_serve(runs: Path, name: str, options: dict[str, object], message: str) -> None:
    clips = dataclasses.replace(CLIPS, n_frames=8, image_size=(32, 32))
    source = AutoencoderSourceConfig(path=str(runs / name) if name else "", **options)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_first_stage(source, VaeConfig(), clips)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_named(runs: Path, tmp_path: Path) -> None:
    export(autoencoder_task(), tmp_path / "run")
    weights = tmp_path / "run" / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=re.escape(str(weights))) as caught:
        open_first_stage(AutoencoderSourceConfig(path=str(tmp_path / "run")), VaeConfig(), CLIPS)
    assert "\n" not in str(caught.value)
