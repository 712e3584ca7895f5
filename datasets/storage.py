"""Where a shard set lies: a local folder, a URL, or a command that prints a file. Remote files come through a cache on this machine.

    /data/set or file:/data/set          read in place
    https://host/set, http://...         standard library; a query (an access token) is kept, put behind the file's name
    s3://  gs://  hf://  ais://  ...     whatever `webdataset.gopen` opens; s3 through the `aws` command line
    "pipe:ssh host cat /data/set/{}"     a shell command, {} stands for the file's name

Locations come from the user only. File names come from index.json, which may be anybody's: they are plain names (`check_name`), with
no folder, scheme or character that a shell or URL reads as anything else.
"""

import hashlib
import math
import os
import random
import re
import shlex
import stat
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from datasets.cache import Cache
from datasets.transfer import TransferError, chunks
from utils.errors import ConfigError, UserError

T = TypeVar("T")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
HASH = re.compile(r"[0-9a-f]{64}")
MAX_TIMEOUT = 86400
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first and, doubling, any further attempt of a transfer."""


class MissingFile(UserError):
    """The storage has no such file."""


@dataclass(frozen=True)
class CacheConfig:
    """How files of a remote shard set are fetched and kept."""

    cache_dir: str = ""
    """Folder of the cache; empty: kinoform under $XDG_CACHE_HOME or ~/.cache."""
    cache_gib: float = 64.0
    """Most that the cache may hold, in GiB; all processes of a machine share it."""
    fetch_timeout: float = 60.0
    """Seconds without a byte after which a transfer is given up."""
    fetch_retries: int = 4
    """Further attempts of a transfer that failed."""

    def folder(self) -> Path:
        """Where cached files lie."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kinoform"
        return Path(self.cache_dir).expanduser() if self.cache_dir else base

    def validate(self) -> None:
        """ConfigError for numbers that cannot be."""
        if not 0 < self.cache_gib < math.inf:
            raise ConfigError(f"--cache-gib {self.cache_gib} must be a number above 0")
        if not 0 < self.fetch_timeout <= MAX_TIMEOUT:
            raise ConfigError(f"--fetch-timeout {self.fetch_timeout} must be above 0 and at most {MAX_TIMEOUT} seconds")
        if self.fetch_retries < 0:
            raise ConfigError(f"--fetch-retries {self.fetch_retries} is negative: use 0 or more")


class Storage(Protocol):
    """Files of one shard set. May be pickled, and used by any number of threads."""

    @property
    def capacity(self) -> int | None:
        """Bytes that fetched files may take together; None: they lie here already."""

    def read(self, name: str, limit: int, sha256: str = "") -> bytes:
        """A small file, whole. MissingFile when there is none; UserError when it is larger than `limit`, another one than `sha256`
        says, or cannot be read."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where that is known only when it is fetched. MissingFile when there is none."""

    def open(self, name: str, nbytes: int, sha256: str) -> int:
        """A descriptor to read the file, fetched before if need be; the caller closes it. UserError when that cannot be."""

    def fetch(self, name: str, nbytes: int, sha256: str) -> Path:
        """As `open`, but where the file lies now: a later fetch may remove it from the cache again."""

    def check_room(self, nbytes: int, what: str) -> None:
        """ConfigError when the cache may not hold `nbytes` at once, saying `what` needs them."""

    def describe(self, name: str = "") -> str:
        """The file, or the set, for messages."""

    def close(self) -> None:
        """Ends transfers that other threads wait for: they raise UserError within a second (http: within `fetch_timeout`)."""


def open_storage(location: str | Path, cache: CacheConfig | None = None) -> Storage:
    """The storage at a folder, URL or `pipe:` command. Nothing is read yet. ConfigError for one that cannot be."""
    text, config = str(location), cache or CacheConfig()
    scheme = text.partition(":")[0].lower()
    if scheme == "file" and text.partition(":")[1]:
        parts = urllib.parse.urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{text}: a file: URL names a file of this machine; write file:///{parts.netloc}{parts.path}")
        return LocalStorage(Path(urllib.request.url2pathname(parts.path)))
    config.validate()
    if text.startswith("pipe:"):
        if "{}" not in text:
            raise ConfigError(f"{text}: the command must hold {{}} where the file's name goes, as in pipe:ssh host cat /data/set/{{}}")
        if os.environ.get("WDS_SECURE", "0") not in ("", "0"):
            raise ConfigError(f"{text}: WDS_SECURE forbids commands; unset it, or use a folder or URL")
        return RemoteStorage(text, config)
    if "://" in text and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        return RemoteStorage(text, config)
    return LocalStorage(Path(text))


def check_name(name: object) -> str:
    """`name` itself when it is a plain file name; ValueError otherwise."""
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{str(name)[:80]!r} is not a plain file name")
    return name


@dataclass(frozen=True)
class LocalStorage:
    """A folder of this machine."""

    folder: Path
    capacity: int | None = None

    def read(self, name: str, limit: int, sha256: str = "") -> bytes:
        size = self.size(name)
        if size > limit:
            raise UserError(f"{self.describe(name)} has {size} bytes, more than the {limit} it may have")
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.describe(name)}: {error.strerror}") from None
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"{self.describe(name)} does not match index.json: it is damaged; copy it again or rerun preprocess.py")
        return data

    def size(self, name: str) -> int:
        path = self.folder / check_name(name)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFile(f"{path} is missing") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a file")
        return status.st_size

    def open(self, name: str, nbytes: int, sha256: str) -> int:
        try:
            return os.open(self.folder / check_name(name), os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {self.folder / name}: {error.strerror}") from None

    def fetch(self, name: str, nbytes: int, sha256: str) -> Path:
        return self.folder / check_name(name)

    def check_room(self, nbytes: int, what: str) -> None:
        return None

    def describe(self, name: str = "") -> str:
        return str(self.folder / name)

    def close(self) -> None:
        return None


@dataclass
class RemoteStorage:
    """Files behind a URL or `pipe:` command, through the cache."""

    location: str
    config: CacheConfig
    closed: bool = False
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = Cache(self.config.folder(), int(self.config.cache_gib * 2**30))

    @property
    def capacity(self) -> int | None:
        return self.cache.capacity

    def read(self, name: str, limit: int, sha256: str = "") -> bytes:
        def attempt() -> bytes:
            data = bytearray()
            for chunk in chunks(self.url(name), self.config.fetch_timeout, self._stopped):
                data += chunk
                if len(data) > limit:
                    raise TransferError(f"it has more than the {limit} bytes it may have", final=True)
            if not data:
                raise TransferError("nothing came")
            if sha256 and hashlib.sha256(data).hexdigest() != sha256:
                raise TransferError("it does not match index.json (sha256): damaged, or of another version of the set")
            return bytes(data)

        return self._retried(name, attempt)

    def size(self, name: str) -> int | None:
        return None

    def open(self, name: str, nbytes: int, sha256: str) -> int:
        def attempt(file: int) -> None:
            self._retried(name, lambda: self._download(name, file, nbytes, sha256))

        return self.cache.open(_cache_name(sha256), nbytes, attempt, self._stopped)

    def fetch(self, name: str, nbytes: int, sha256: str) -> Path:
        os.close(self.open(name, nbytes, sha256))
        return self.cache.folder / _cache_name(sha256)

    def check_room(self, nbytes: int, what: str) -> None:
        self.cache.check_room(nbytes, what)

    def describe(self, name: str = "") -> str:
        """Without user, password and query, which may be secrets."""
        if self.location.startswith("pipe:"):
            return self.location.replace("{}", name) if name else self.location
        parts = urllib.parse.urlsplit(self.location)
        host = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{host}{parts.path.rstrip('/')}" + (f"/{name}" if name else "")

    def close(self) -> None:
        self.closed = True

    def url(self, name: str) -> str:
        """What to open for the file `name`."""
        check_name(name)
        if self.location.startswith("pipe:"):
            return self.location.replace("{}", shlex.quote(name))
        parts = urllib.parse.urlsplit(self.location)
        return urllib.parse.urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}", fragment=""))

    def _stopped(self) -> bool:
        return self.closed

    def _download(self, name: str, file: int, nbytes: int, sha256: str) -> None:
        """One attempt: the file's bytes into the descriptor `file`, checked."""
        digest, count = hashlib.sha256(), 0
        for chunk in chunks(self.url(name), self.config.fetch_timeout, self._stopped):
            if count + len(chunk) > nbytes:
                raise TransferError(f"more than the {nbytes} bytes that index.json says came")
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                written = os.pwrite(file, view, count)
                count, view = count + written, view[written:]
        if count != nbytes:
            raise TransferError(f"{count} of {nbytes} bytes came")
        if digest.hexdigest() != sha256:
            raise TransferError("it does not match index.json (sha256): damaged, or of another version of the set")

    def _retried(self, name: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, made again after a pause when it fails. UserError naming the file and the last cause."""
        for number in range(self.config.fetch_retries + 1):
            try:
                return attempt()
            except TransferError as error:
                last = error
            if last.final or number == self.config.fetch_retries:
                break
            self._pause(min(FIRST_PAUSE * 2**number, LONGEST_PAUSE))
        times = "" if number == 0 else f" ({number + 1} attempts)"
        kind = MissingFile if last.missing else UserError
        raise kind(f"cannot fetch {self.describe(name)}: {last}{times}")

    def _pause(self, seconds: float) -> None:
        # Processes that failed together do not come back together.
        until = time.monotonic() + seconds * random.SystemRandom().uniform(0.75, 1.25)
        while not self.closed and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def _cache_name(sha256: str) -> str:
    if not HASH.fullmatch(sha256):
        raise ValueError(f"{sha256[:80]!r} is not a sha256")
    return sha256
