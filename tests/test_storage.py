"""Remote files: fetched once for all processes, checked, kept within a bound; what stalls, ends early or is not there is said in a line."""

import contextlib
import errno
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datasets import storage as storage_module
from datasets.cache import Cache
from datasets.storage import CacheConfig, LocalStorage, MissingFile, RemoteStorage, Storage, check_name, open_storage
from utils.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parent.parent
DATA = {f"{letter}.tar": letter.encode() * 100_000 for letter in "abcdefgh"}
SHA = {name: hashlib.sha256(data).hexdigest() for name, data in DATA.items()}


class Handler(BaseHTTPRequestHandler):
    """/ok/NAME sends a file, /stall/ half of it and then nothing, /short/ half of it, /flaky/ only from the third time on."""

    server: "Server"

    def do_GET(self) -> None:
        how, _, name = self.path.partition("?")[0].strip("/").partition("/")
        self.server.asked.append(self.path)
        self.server.logins.append(self.headers.get("Authorization"))
        data = DATA.get(name)
        if data is None or (how == "flaky" and len(self.server.asked) < 3):
            self.send_error(404 if data is None else 503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) if how in ("ok", "flaky") else len(data) // 2])
        if how in ("stall", "slow"):
            self.wfile.flush()
            self.server.over.wait(60 if how == "stall" else 1)
            if how == "slow":
                self.wfile.write(data[len(data) // 2 :])

    def log_message(self, *args: object) -> None:
        return None


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.logins: list[str | None] = []
        self.over = threading.Event()

    def url(self, how: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{how}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def config(tmp_path: Path) -> CacheConfig:
    return CacheConfig(cache_dir=str(tmp_path / "cache"), fetch_timeout=1.0, fetch_retries=1)


def fetch(storage: Storage, name: str) -> bytes:
    file = storage.open(name, len(DATA[name]), SHA[name])
    with os.fdopen(file, "rb") as stream:
        return stream.read()


def refused(storage: Storage, name: str = "a.tar", kind: type[UserError] = UserError) -> str:
    with pytest.raises(kind) as caught:
        fetch(storage, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept(config: CacheConfig) -> list[str]:
    return sorted(path.name for path in config.folder().iterdir() if path.name != "lock")


def on_disk(config: CacheConfig) -> int:
    total = 0
    for path in config.folder().iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_file_is_fetched_once(server: Server, config: CacheConfig) -> None:
    storage = open_storage(server.url("ok"), config)
    assert fetch(storage, "a.tar") == DATA["a.tar"] == fetch(pickle.loads(pickle.dumps(storage)), "a.tar")
    assert storage.fetch("a.tar", 100_000, SHA["a.tar"]).read_bytes() == DATA["a.tar"]
    assert server.asked == ["/ok/a.tar"] and kept(config) == [SHA["a.tar"]]
    assert storage.read("b.tar", 100_000, SHA["b.tar"]) == DATA["b.tar"] and storage.size("b.tar") is None


@pytest.mark.parametrize(
    ("how", "words", "attempts"),
    [
        ("stall", r"no bytes for 1 s \(2 attempts\)", 2),
        ("short", r"the connection ended after 50000 of 100000 bytes \(2 attempts\)", 2),
        ("ok", "", 1),
        ("flaky", r"HTTP 503 .* \(2 attempts\)", 2),
    ],
)
def test_what_a_server_does_is_said(server: Server, config: CacheConfig, how: str, words: str, attempts: int) -> None:
    storage = open_storage(server.url(how), config)
    began = time.monotonic()
    if words:
        assert re.search(rf"cannot fetch {server.url(how)}/a.tar: {words}", refused(storage))
        assert kept(config) == [], "nothing half fetched stays"
        with pytest.raises(UserError, match=words) if how != "flaky" else contextlib.nullcontext():
            storage.read("a.tar", 1 << 20)  # the third answer of the flaky one is good
    else:
        assert fetch(storage, "a.tar") == DATA["a.tar"]
    assert len(server.asked) == attempts + (bool(words) and (1 if how == "flaky" else 2))
    assert time.monotonic() - began < 8


def test_a_file_that_is_not_there_is_asked_for_once(server: Server, config: CacheConfig) -> None:
    with pytest.raises(MissingFile, match=r"none.tar: HTTP 404 Not Found$"):
        open_storage(server.url("ok"), config).open("none.tar", 5, "0" * 64)
    assert len(server.asked) == 1


def test_a_server_that_is_away_is_named(config: CacheConfig) -> None:
    with Server() as server:
        url = server.url("ok")
    assert "refused" in refused(open_storage(url, config))


def test_foreign_and_oversized_bytes_are_not_kept(server: Server, config: CacheConfig) -> None:
    storage = open_storage(server.url("ok"), config)
    with pytest.raises(UserError, match=r"b.tar: it does not match index.json \(sha256\)"):
        storage.open("b.tar", 100_000, SHA["a.tar"])
    with pytest.raises(UserError, match=r"more than the 99999 bytes"):
        storage.open("a.tar", 99_999, SHA["a.tar"])
    with pytest.raises(UserError, match=r"100000 of 100001 bytes came"):
        storage.open("a.tar", 100_001, SHA["a.tar"])
    with pytest.raises(UserError, match="more than the 5000 bytes it may have"):
        storage.read("a.tar", 5000)
    assert kept(config) == []
    assert "more than the" in refused(open_storage("pipe:cat /dev/zero; echo {}", config)), "an endless source ends"


def test_secrets_reach_the_server_and_no_message(server: Server, config: CacheConfig) -> None:
    url = server.url("ok").replace("//", "//us%40er:pass@") + "?token=xyz"
    storage = open_storage(url, config)
    fetch(storage, "a.tar")
    assert server.asked == ["/ok/a.tar?token=xyz"] and server.logins == ["Basic dXNAZXI6cGFzcw=="]
    assert storage.describe("a.tar") == f"{server.url('ok')}/a.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name, data in DATA.items():
        (folder / name).write_bytes(data)
    return folder


def test_pipe_and_file_and_folder(folder: Path, config: CacheConfig) -> None:
    assert fetch(open_storage(f"pipe:cat '{folder}'/{{}}", config), "a.tar") == DATA["a.tar"]
    for location in (folder, f"file:{folder}".replace(" ", "%20"), f"file://{folder}".replace(" ", "%20")):
        storage = open_storage(location, config)
        assert isinstance(storage, LocalStorage) and storage.capacity is None
        assert fetch(storage, "b.tar") == DATA["b.tar"] and storage.fetch("b.tar", 0, "") == folder / "b.tar"
        with pytest.raises(MissingFile, match=r"none\.tar is missing"):
            storage.read("none.tar", 5)
    assert kept(config) == [SHA["a.tar"]]


def test_what_a_command_says_last_is_the_cause(config: CacheConfig) -> None:
    storage = open_storage("pipe:echo trying >&2; echo no such bucket: {} >&2; exit 3", config)
    assert refused(storage).endswith("no such bucket: a.tar (2 attempts)")
    assert refused(open_storage("pipe:exit 3; {}", config)).endswith("the command ended with status 3 (2 attempts)")
    assert "50 of 100000 bytes came" in refused(open_storage("pipe:head -c 50 /dev/zero; : {}", config))


def test_a_command_that_stalls_is_killed_with_all_it_started(tmp_path: Path, config: CacheConfig) -> None:
    note = tmp_path / "pids"
    storage = open_storage(f"pipe:printf x; (sleep 100; : {{}}) & echo $! >> {note}; sleep 100", config)
    began = time.monotonic()
    assert "no bytes for 1 s (2 attempts)" in refused(storage)
    assert time.monotonic() - began < 6
    until = time.monotonic() + 5
    while any(runs(pid) for pid in note.read_text().split()):
        assert time.monotonic() < until, "what the command started lives on"
        time.sleep(0.05)


def runs(pid: str) -> bool:
    """Whether a process is there, and not only its entry waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_closing_ends_a_transfer_at_once(config: CacheConfig) -> None:
    storage = open_storage("pipe:sleep 100; : {}", CacheConfig(config.cache_dir, fetch_timeout=50))
    threading.Timer(0.3, storage.close).start()
    began = time.monotonic()
    assert "stopped" in refused(storage) and time.monotonic() - began < 3


def test_other_schemes_go_through_gopen(folder: Path, config: CacheConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow_import = CacheConfig(config.cache_dir, fetch_timeout=60, fetch_retries=0)
    monkeypatch.setenv("GOPEN_REWRITE", f"toy://bucket={folder}")
    assert fetch(open_storage("toy://bucket", slow_import), "a.tar") == DATA["a.tar"]
    assert "ValueError: other://bucket/b.tar: no gopen handler" in refused(open_storage("other://bucket", slow_import), "b.tar")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs the command aws" in refused(open_storage("s3://bucket/set", slow_import), "c.tar")
    (tmp_path / "aws").write_text(f'#!/bin/sh\n[ "$1 $2 $5" = "s3 cp -" ] && exec /bin/cat \'{folder}\'/${{4##*/}}\n')
    (tmp_path / "aws").chmod(0o755)
    assert fetch(open_storage("s3://bucket/set", slow_import), "c.tar") == DATA["c.tar"]


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("pipe:cat /data", r"must hold \{\}"),
        ("file://host/data", "names a file of this machine"),
    ],
)
def test_locations_that_cannot_be(location: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_storage(location)


def test_commands_may_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    with pytest.raises(ConfigError, match="WDS_SECURE"):
        open_storage("pipe:cat /data/{}")


TOO_MUCH = [{"cache_gib": float("inf")}, {"fetch_timeout": float("inf")}]


@pytest.mark.parametrize(
    "setting", [{"cache_gib": 0.0}, {"fetch_timeout": -1.0}, {"fetch_retries": -1}, {"cache_gib": float("nan")}, *TOO_MUCH]
)
def test_numbers_that_cannot_be(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(setting)).replace("_", "-")):
        open_storage("http://host/set", CacheConfig(**setting))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/b", "..", "a..b", "", "-rf", ".a", "a b", "a;b", "a$b", "a\n", "pipe:x", 5, "x" * 300]
)
def test_names_of_an_index_are_plain(name: object, tmp_path: Path, config: CacheConfig) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        check_name(name)
    for storage in (open_storage(tmp_path), open_storage("pipe:echo {}", config), open_storage("http://127.0.0.1:1/x", config)):
        with pytest.raises(ValueError, match="not a plain file name"):
            storage.open(name, 1, "0" * 64)  # type: ignore[arg-type]


FETCH = """
import sys
from datasets.storage import CacheConfig, open_storage
storage = open_storage(sys.argv[1], CacheConfig(sys.argv[2], fetch_timeout=20))
print("go", flush=True)
storage.open(sys.argv[3], 100_000, sys.argv[4])
"""


def fetcher(url: str, config: CacheConfig, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url, config.cache_dir, name, SHA[name]], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )


def test_of_many_processes_one_downloads(server: Server, config: CacheConfig) -> None:
    children = [fetcher(server.url("slow"), config, "a.tar") for _ in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    assert server.asked == ["/slow/a.tar"] and kept(config) == [SHA["a.tar"]]
    for child in children:
        child.stdout.close()  # type: ignore[union-attr]


def test_what_a_killed_fetch_leaves_is_removed(server: Server, config: CacheConfig) -> None:
    for name in ("a.tar", "b.tar"):
        with fetcher(server.url("stall"), config, name) as child:
            until = time.monotonic() + 20
            while not (config.folder() / f"{SHA[name]}.part").exists() and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.1)
            child.send_signal(signal.SIGKILL)
    assert f"{SHA['a.tar']}.part" not in kept(config) and f"{SHA['b.tar']}.part" in kept(config), "the second has cleared the first's away"
    storage = open_storage(server.url("ok"), config)
    assert fetch(storage, "b.tar") == DATA["b.tar"] and fetch(storage, "c.tar") == DATA["c.tar"]
    assert kept(config) == sorted(SHA[name] for name in ("b.tar", "c.tar"))


def small(config: CacheConfig, files: float) -> CacheConfig:
    return CacheConfig(config.cache_dir, cache_gib=files * 100_000 / 2**30, fetch_timeout=5, fetch_retries=0)


def test_the_least_recently_used_goes(server: Server, config: CacheConfig) -> None:
    storage = open_storage(server.url("ok"), small(config, 3.5))
    first = storage.open("a.tar", 100_000, SHA["a.tar"])
    for name in ("b.tar", "c.tar", "a.tar", "d.tar", "e.tar"):
        fetch(storage, name)
        assert on_disk(config) <= 350_000
    assert kept(config) == sorted(SHA[name] for name in ("a.tar", "d.tar", "e.tar"))
    fetch(storage, "f.tar"), fetch(storage, "g.tar"), fetch(storage, "h.tar")
    assert kept(config) == sorted(SHA[name] for name in ("f.tar", "g.tar", "h.tar"))
    assert os.pread(first, 200_000, 0) == DATA["a.tar"], "an open file can be read to the end"
    os.close(first)
    assert Counter(server.asked)["/ok/a.tar"] == 1


def test_the_bound_holds_while_many_fetch(server: Server, config: CacheConfig) -> None:
    bound, most, over = small(config, 2.5), 0, threading.Event()
    storage = open_storage(server.url("slow"), bound)
    config.folder().mkdir(parents=True)

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, on_disk(config))

    watcher = threading.Thread(target=watch)
    watcher.start()
    wrong: list[str] = []

    def one(name: str) -> None:
        if fetch(storage, name) != DATA[name]:
            wrong.append(name)

    threads = [threading.Thread(target=one, args=(name,)) for name in list(DATA)[:5]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    over.set()
    watcher.join()
    assert not wrong and len(server.asked) == 5 and 100_000 <= most <= 250_000


def test_those_who_wait_for_a_file_share_its_failure(server: Server, config: CacheConfig) -> None:
    storage, words = open_storage(server.url("stall"), config), list[str]()
    threads = [threading.Thread(target=lambda: words.append(refused(storage))) for _ in range(6)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(server.asked) == 2 and time.monotonic() - began < 5, "two attempts for all, not for each"
    assert len(words) == 6 and len(set(words)) == 1 and "no bytes for 1 s (2 attempts)" in words[0]
    assert kept(config) == []
    assert "2 attempts" in refused(storage) and len(server.asked) == 4, "who comes later tries again"


def test_a_file_larger_than_the_cache_is_refused_with_the_size_to_give(server: Server, config: CacheConfig) -> None:
    storage = open_storage(server.url("ok"), small(config, 0.5))
    assert "use --cache-gib 1 or more" in refused(storage, kind=ConfigError)
    assert server.asked == []


def test_a_cache_that_cannot_be_written_is_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    storage = RemoteStorage(server.url("ok"), CacheConfig(str(tmp_path / "file" / "cache")))
    assert re.search("cannot use the cache .*: Not a directory; .*--cache-dir", refused(storage))

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    good = CacheConfig(str(tmp_path / "good"))
    assert "No space left on device; free space there" in refused(RemoteStorage(server.url("ok"), good))
    assert kept(good) == []


def test_a_part_of_another_size_is_fetched_again(server: Server, config: CacheConfig) -> None:
    storage = open_storage(server.url("ok"), config)
    fetch(storage, "a.tar")
    (config.folder() / SHA["a.tar"]).write_bytes(b"cut")
    assert fetch(storage, "a.tar") == DATA["a.tar"]
    assert Cache(config.folder(), 10).lookup("none") is None
