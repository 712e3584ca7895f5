"""The hub: what is asked of it and what never is. A small server on this machine stands in for it; uploads go to a stub of its client."""

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from unittest.mock import create_autospec

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from pipelines.hub import PATTERNS, fetch
from pipelines.pretrained import from_pretrained, main
from pipelines.systems import load_sampling
from tests.distributed import ROOT, environment
from tests.pvdm_exports import family
from utils.errors import UserError

COMMIT = "c0ffee" + "0" * 34
FETCH = "import sys; from pipelines.hub import fetch; print(fetch(*sys.argv[1:]))"


class Hub(BaseHTTPRequestHandler):
    """The three addresses that a download asks for: a revision, its list of files, and a file."""

    folder: ClassVar[Path]
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        for revision in ("main", "v1", COMMIT):
            if path == f"/api/models/me/model/revision/{revision}":
                names = sorted(str(place.relative_to(self.folder)) for place in self.folder.rglob("*") if place.is_file())
                return self.answer({"id": "me/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
            if path == f"/api/models/me/model/tree/{revision}":
                return self.answer([self.entry(place) for place in sorted(self.folder.rglob("*")) if place.is_file()])
        if path.startswith(f"/me/model/resolve/{COMMIT}/"):
            return self.send(200, (self.folder / path.removeprefix(f"/me/model/resolve/{COMMIT}/")).read_bytes())
        return self.send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def entry(self, place: Path) -> dict[str, object]:
        data = place.read_bytes()
        oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        return {"type": "file", "path": str(place.relative_to(self.folder)), "size": len(data), "oid": oid}

    def answer(self, value: object) -> None:
        self.send(200, json.dumps(value).encode())

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        tag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        for name, value in {"Content-Length": str(len(data)), "ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved folder, with things beside it that nobody should want."""
    folder = tmp_path_factory.mktemp("hub")
    family(folder / "runs")
    main(["save", str(folder / "runs"), str(folder / "saved")])
    for name in ("model.py", "pytorch_model.bin", "denoiser/evil.pt", "weights.pickle"):
        (folder / "saved" / name).write_text("raise SystemExit('this was run')")
    return folder / "saved"


@pytest.fixture
def endpoint(saved: Path) -> Iterator[str]:
    Hub.folder = saved
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def process(*command: str, endpoint: str, home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    variables = environment(HF_ENDPOINT=endpoint, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", **extra)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, env=variables, cwd=home)


def test_networks_come_from_the_hub_and_nothing_that_could_run(saved: Path, endpoint: str, tmp_path: Path) -> None:
    done = process("-c", FETCH, "me/model@v1", endpoint=endpoint, home=tmp_path)
    assert done.returncode == 0, done.stderr
    place = Path(done.stdout.strip())
    wanted = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.suffix in (".json", ".safetensors", ".md")}
    assert {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()} == wanted and len(wanted) == 8
    assert any("revision/v1" in path or "tree/v1" in path for path in Hub.asked)
    assert not [path for path in Hub.asked if "resolve" in path and path.endswith((".py", ".bin", ".pt", ".pickle"))]
    assert from_pretrained(place).system == "pvdm"

    flags = ["--out", "out", "--num-samples", "1", "--steps", "1"]
    done = process(str(ROOT / "sample.py"), "me/model", *flags, endpoint=endpoint, home=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out/000000.mp4").is_file(), done.stderr
    done = process(str(ROOT / "sample.py"), "me/other", *flags, endpoint=endpoint, home=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "error: me/other: no such folder; as a repository of the Hugging Face hub: there is no me/other, or it is private" in done.stderr
    done = process("-c", FETCH, "me/model@v1", endpoint="http://127.0.0.1:9", home=tmp_path, HF_HUB_CACHE=str(tmp_path / "empty"))
    assert done.returncode == 1 and "me/model@v1: no such folder; as a repository of the Hugging Face hub: not downloaded" in done.stderr
    assert "the hub cannot be asked (" in done.stderr


def test_a_folder_of_that_name_comes_first_and_without_a_network_it_is_one_line(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    (tmp_path / "me/model").symlink_to(saved)
    assert fetch("me/model") == Path("me/model") and fetch("some/where/else") == Path("some/where/else")
    with pytest.raises(UserError, match="revision v1: only repositories of the hub have them, me/model is none"):
        from_pretrained("me/model", revision="v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^me/another: no such folder; as a .* hub: not downloaded before, and HF_HUB_OFFLINE") as caught:
        from_pretrained("me/another")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./me/model", "../me/model", "/me/model", "model", "some/where/else"])
def test_what_is_no_name_of_a_repository_is_not_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.hub._download", lambda *asked: pytest.fail(f"{asked} was asked for"))
    with pytest.raises(UserError, match="^" + re.escape(f"{name}: no such folder, and no <owner>/<name> on the Hugging Face hub")):
        from_pretrained(name)
    with pytest.raises(UserError, match=r"^--run \S+: no such folder, and no <owner>/<name>"):
        load_sampling(["--run", name], "sample.py", "")


def test_what_is_uploaded(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the signatures of the real client; what the hub then does is not tried."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = "https://hub/me/model"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    main(["push", str(saved), "me/model", "--private"])
    assert capsys.readouterr().out == "https://hub/me/model\n"
    api.create_repo.assert_called_once_with("me/model", private=True, exist_ok=True)
    told = api.upload_folder.call_args.kwargs
    assert (told["repo_id"], told["folder_path"], told["allow_patterns"]) == ("me/model", saved, PATTERNS)
    assert told["delete_patterns"] == ["*.safetensors"], "weights of an earlier upload do not stay"
    assert PATTERNS == ["*.json", "*.safetensors", "*.md"]

    from_pretrained(saved).push_to_hub("me/model", weights="used")
    assert not Path(api.upload_folder.call_args.kwargs["folder_path"]).exists(), "written for the upload only"
    api.upload_folder.side_effect = OSError("no route\nto host")
    with pytest.raises(UserError, match=r"cannot be uploaded to me/model: no route$"):
        main(["push", str(saved), "me/model"])
    for name in ("model", "a/b/c", "me/model@v1", "https://hub/me"):
        with pytest.raises(UserError, match="is no name of a repository"):
            main(["push", str(saved), name])
