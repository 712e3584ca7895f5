"""The page that shows a folder of videos: read as HTML, and in a real browser from the disk."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.video_files import write_video
from tests import cmd_family
from tests.browser import browser, requested, waited
from tests.sampling import make
from utils import gallery
from utils.errors import UserError
from utils.gallery import write_gallery

NAMES = ["a&b", 'quote"s', "<b>bold", "per%20cent", "plain"]
MARKUP = st.text(st.sampled_from("<>&\"'/=;!-#% ab\u00e9\u4e2d"), min_size=1, max_size=8).map(str.strip).filter(bool)


class Page(HTMLParser):
    """Elements of a page, in order, with their attributes; every one is closed in order."""

    VOID = ("meta", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str, attribute: str) -> list[str]:
        return [str(values[attribute]) for name, values in self.elements if name == tag and attribute in values]


def read(folder: Path) -> Page:
    return Page((folder / gallery.PAGE).read_text())


def clip(level: int = 100) -> torch.Tensor:
    return torch.full((3, 4, 16, 24), level, dtype=torch.uint8)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gallery")
    cmd_family.family(root / "runs")
    return make(root / "out", root / "runs", "--steps", 2, "--num-videos", 5)


def test_samples_are_shown_by_class_with_their_settings(samples: Path) -> None:
    page = read(samples)
    record = json.loads((samples / "settings.json").read_text())
    by_class = sorted(record["samples"], key=lambda sample: sample["class"])
    assert page.all("video", "data-src") == [sample["file"] for sample in by_class]
    assert {values["preload"] for name, values in page.elements if name == "video"} == {"none"}
    shown = " ".join(page.text)
    for text in ("0 one", "1 two", "2 three", "Videos of cmd, seed 0", "5 videos", record["sha256"]["ae"], record["torch"]):
        assert text in shown
    assert page.all("img", "src") == ["grid.png"] and not page.all("script", "src") and not page.all("link", "href")


def test_a_folder_of_any_videos(tmp_path: Path) -> None:
    """By sub-folder; names that are no HTML and no links; one form of each video; folders of pictures frame by frame."""
    for name in NAMES:
        write_video(tmp_path / name / "clip.mp4", "mp4", clip(), 8)
    (tmp_path / "plain" / "clip.gif").write_bytes(b"the same as a GIF")
    write_video(tmp_path / "frames of one", "png", clip(), 8)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.mp4").write_bytes(b"")
    assert gallery.main([str(tmp_path)]) == 0
    page = read(tmp_path)
    assert sorted(map(unquote, page.all("video", "data-src"))) == sorted(f"{name}/clip.mp4" for name in NAMES)
    frames = json.loads(page.all("img", "data-frames")[0])
    assert [unquote(frame) for frame in frames] == [f"frames of one/{number:06d}.png" for number in range(4)]
    text = (tmp_path / gallery.PAGE).read_text()
    assert write_gallery(tmp_path).read_text() == text


@example(names=["<b>", "</script>", "a&b", "a&amp;b", '"x', "<!--"])
@given(names=st.lists(MARKUP, min_size=1, unique=True))
def test_whatever_a_class_is_called_it_is_text(names: list[str]) -> None:
    """No name can open an element, or end an attribute."""
    items = [gallery.Shown(Path("/x") / f"{number}.mp4", name, name) for number, name in enumerate(names)]
    page = Page(gallery._page(Path("/x"), {"system": names[0], "samples": [], "note": names}, items))
    assert len(page.all("video", "data-src")) == len(names)
    read_as = [text.strip() for text in page.text]
    assert all(read_as.count(name) >= 2 for name in names), "the heading and the caption"
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "label", "input", "nav", "a", "div", "span", "script"),
        *("figure", "figcaption", "video", "noscript", "details", "summary", "table", "tr", "th", "td"),
    }


def test_what_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="holds no videos"):
        write_gallery(tmp_path)
    assert gallery.main([str(tmp_path / "nowhere")]) == 1 and capsys.readouterr().err == f"error: {tmp_path / 'nowhere'}: no such folder\n"
    assert gallery.main([]) == 2 and gallery.main(["--help"]) == 0


def test_samples_that_are_missing_are_left_out(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_bytes((samples / "settings.json").read_bytes())
    (tmp_path / "000001-class001.mp4").write_bytes((samples / "000001-class001.mp4").read_bytes())
    write_gallery(tmp_path)
    assert read(tmp_path).all("video", "data-src") == ["000001-class001.mp4"]


@pytest.mark.slow
def test_the_page_in_a_browser(samples: Path, tmp_path: Path) -> None:
    """From the disk, without a server: videos play while they are seen, the size can be changed, nothing else is asked for."""
    with browser(tmp_path / "profile") as driver:
        driver.get((samples / gallery.PAGE).as_uri())
        playing = "[...document.querySelectorAll('video')].filter(video => video.readyState >= 2 && !video.paused).length"
        assert waited(driver, f"return {playing} >= 5 && {playing}") == 5
        driver.save_screenshot(str(tmp_path / "page.png"))
        width = "return document.querySelector('figure').offsetWidth"
        before = driver.execute_script(width)
        driver.execute_script("const size = document.getElementById('size'); size.value = 400; size.dispatchEvent(new Event('input'))")
        assert driver.execute_script(width) > before
        asked = {url for url in requested(driver)[0] if not url.startswith(("chrome:", "data:"))}
        assert asked and all(url.startswith(samples.as_uri()) for url in asked)
