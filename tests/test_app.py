"""The web page: what it asks of the networks, and the page itself in a real browser."""

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import app
from datasets.stored_video import count_frames
from pipelines.studio import Studio, Wish
from tests import cmd_family, hvdm_exports, pvdm_exports, vidm_exports
from tests.browser import browser, requested, waited
from tests.distributed import ROOT, environment
from tests.sampling import CPU, config, make
from utils.errors import ConfigError, UserError

NO_GRADIO = "no gradio here: pip install -r requirements-optional.txt"


@pytest.fixture(scope="module")
def cmd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cmd")
    cmd_family.family(root)
    return root


def quiet(share: float, text: str) -> None:
    assert 0 <= share <= 1 and text


# ---- what the page asks


def test_a_video_is_the_one_that_sample_writes(cmd: Path, tmp_path: Path) -> None:
    studio, told = Studio(config(cmd), tmp_path / "page", CPU), []
    assert studio.classes == ["one", "two", "three"] and studio.modes == ("short",) and studio.guided
    made, settings = studio.make(Wish(label="two", seed=5, steps=3, guidance=2), lambda share, text: told.append((share, text)))
    out = make(tmp_path / "out", cmd, "--classes", "two", "--seed", 5, "--steps", 3, "--guidance-scale", 2, "--num-videos", 1)
    assert made.read_bytes() == (out / made.name).read_bytes()
    record = json.loads((out / "settings.json").read_text())
    assert settings["class"] == "two" and all(record[name] == settings[name] for name in ("seed", "content", "motion", "sha256"))
    assert [round(share, 3) for share, _ in told] == [0.167, 0.333, 0.5, 0.667, 0.833, 1] and told[0][1] == "step 1 of 3"
    studio.make(Wish(steps=1), quiet)
    assert made.is_file(), "the video that is being looked at is still there"
    studio.make(Wish(steps=1), quiet)
    assert not made.exists()


def test_long_videos_and_pictures(tmp_path: Path) -> None:
    pvdm_exports.family(tmp_path / "pvdm")
    long = Studio(config(tmp_path / "pvdm"), tmp_path / "a", CPU)
    path, settings = long.make(Wish(mode="long", frames=7, steps=2), quiet)
    out = make(tmp_path / "out", tmp_path / "pvdm", "--mode", "long", "--num-frames", 7, "--steps", 2, "--num-videos", 1)
    assert path.read_bytes() == (out / path.name).read_bytes() and settings["num_frames"] == 7
    picture = tmp_path / "out" / "grid.png"
    for system, write in (("hvdm", hvdm_exports.family), ("vidm", vidm_exports.family)):
        write(tmp_path / system)
        path, settings = Studio(config(tmp_path / system), tmp_path / system / "b", CPU).make(
            Wish(mode="image", image=str(picture), steps=2), quiet
        )
        assert count_frames(path) == settings["num_frames"] and settings["images_sha256"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("short", "one", 0, 0, "euler", 1, 0, None), "error: sampler euler: the model's process is ddpm"),
        (("short", "nine", 0, 2, "auto", 1, 0, None), "error: --classes nine: no such class"),
        (("short", "one", 0, 2, "auto", 1, 99, None), "error: --num-frames 99"),
        (("short", "one", 0, -2, "auto", 1, 0, None), "error: --steps -2: at least 1"),
        (("short", "one", 0, 2, "auto", None, 0, None), "done"),
    ],
)
def test_errors_are_one_line_on_the_page(cmd: Path, tmp_path: Path, values: tuple[Any, ...], said: str) -> None:
    video, settings, status = app._generate(Studio(config(cmd), tmp_path, CPU), values, quiet)
    assert status.startswith(said) and "\n" not in status
    assert (video is None) == (settings is None) == (said != "done")


def test_memory_that_runs_out_is_one_line_on_the_page(cmd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(Studio, "make", fail)
    status = app._generate(Studio(config(cmd), tmp_path, CPU), ("short", "one", 0, 1, "auto", 1, 0, None), quiet)[2]
    assert status.startswith("error: cpu memory does not hold this video")


def test_the_port_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert app._take_port(["RUNS", "--port", "81", "--seed", "2"]) == (["RUNS", "--seed", "2"], 81)
    assert app._take_port(["RUNS", "--port=0"]) == (["RUNS"], 0)
    with pytest.raises(ConfigError, match="--port x: a number"):
        app._take_port(["--port", "x"])
    with socket.socket() as taken:
        taken.bind((app.HOST, 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another"):
            app._listen(taken.getsockname()[1])


def test_sampling_does_not_need_gradio() -> None:
    """Nor is it read with the page's module, before there is something to show."""
    script = (
        "import sys; sys.modules['gradio'] = None; import sample, app; assert not any(name.startswith('gradio.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), check=True, timeout=60)


def ask(application: Any, kind: str, headers: dict[str, str]) -> list[Any]:
    """What an application answers to a request of these headers: the status or the closing code, and the names of the headers."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(application(scope, receive, send))
    return [sent[0].get("status", sent[0].get("code")), *(name for name, _ in sent[0].get("headers", ()))]


@pytest.mark.parametrize(
    ("origin", "served"),
    [
        ({}, True),
        ({"origin": "http://127.0.0.1:7860"}, True),
        ({"origin": "http://127.0.0.1:81"}, False),
        ({"origin": "https://127.0.0.1:7860"}, False),
        ({"origin": "https://elsewhere.org"}, False),
        ({"origin": "null"}, False),
    ],
)
def test_what_a_page_of_another_origin_sends_is_refused(origin: dict[str, str], served: bool) -> None:
    """Scripts and forms of any page can send to this machine, and the browser says for whom."""
    reached = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guarded = app.OwnFilesOnly(application)
    headers = {"host": "127.0.0.1:7860"} | origin
    assert ask(guarded, "http", headers) == ([200, b"content-security-policy"] if served else [403, b"content-type"])
    assert served or ask(guarded, "websocket", headers) == [1008]
    assert len(reached) == served


# ---- the page


@pytest.fixture
def address(cmd: Path, tmp_path: Path) -> Iterator[str]:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip(NO_GRADIO)
    command = [sys.executable, "app.py", str(cmd), "--port", "0", "--num-videos", "1"]
    said = (tmp_path / "said").open("w+")
    child = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=said)
    assert child.stdout is not None
    try:
        line = child.stdout.readline()  # empty where it ended
        assert line.startswith(f"http://{app.HOST}:"), Path(said.name).read_text()
        yield line.strip()
    finally:
        child.terminate()
        child.communicate(timeout=30)
        said.close()


def set_number(driver: Any, name: str, value: object) -> None:
    """Type a number into a field of the page."""
    from selenium.webdriver.common.keys import Keys

    field = driver.find_element("css selector", f"#{name} input")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(value), Keys.TAB)


@pytest.mark.slow
def test_uploads_are_of_the_own_page_and_of_bounded_size(address: str) -> None:
    def upload(origin: str, size: int) -> int:
        body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(size) + b"\r\n--b--\r\n"
        headers = {"Origin": origin, "Content-Type": "multipart/form-data; boundary=b"}
        request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert upload(address, 8) == 200
    assert upload("https://elsewhere.org", 8) == 403
    assert upload(address, 65 << 20) == 413


@pytest.mark.slow
def test_the_page_in_a_browser(address: str, tmp_path: Path) -> None:
    """A seed is set and Generate is pressed: there is a video that plays, and its settings; then an error, in one line."""
    with browser(tmp_path / "profile") as driver:
        driver.get(address)
        waited(driver, "return document.querySelector('#generate') && document.querySelector('#seed input')", 60)
        set_number(driver, "seed", 7)
        set_number(driver, "steps", 3)
        driver.find_element("css selector", "#generate").click()
        waited(
            driver, "const video = document.querySelector('#video video'); return video && video.readyState >= 2 && video.videoWidth", 60
        )
        seen = driver.execute_script(
            "const video = document.querySelector('#video video'); return [video.videoWidth, video.videoHeight, video.duration]"
        )
        assert seen[:2] == [24, 16] and seen[2] == pytest.approx(4 / 8, abs=0.05)
        waited(driver, "return document.querySelector('#status').innerText.includes('done')")
        shown = waited(
            driver, "return document.querySelector('#settings').innerText.includes('seed') && document.querySelector('#settings').innerText"
        )
        assert "7" in shown.partition("seed")[2][:12]
        driver.save_screenshot(str(tmp_path / "page.png"))
        set_number(driver, "frames", 99)
        driver.find_element("css selector", "#generate").click()
        said = waited(driver, "const said = document.querySelector('#status').innerText; return said.includes('error') && said")
        assert said.strip().startswith("error: --num-frames 99") and "\n" not in said.strip()
        asked, answered = requested(driver)
        assert any(url.startswith(address) for url in answered)
        assert not {url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:"))}
