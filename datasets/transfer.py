"""Bytes of a remote file, in chunks, from whatever serves it; one that stops sending is given up, not waited for.

http and https are read with the standard library, so that no curl is needed. `pipe:COMMAND` runs in a shell. All other schemes go to
`webdataset.gopen` (gs, hf, ais, sftp, ...; s3 to the `aws` command line where gopen does not know it), in a process of its own:
it and all that it starts are killed together when no byte comes, which a stream of gopen held in this process would not allow.
"""

import base64
import contextlib
import http.client
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

CHUNK = 1 << 20
POLL = 0.5
"""Seconds between two looks whether the transfer is to stop."""
STDERR_TAIL = 4096
FINAL_STATUS = frozenset({400, 401, 403, 404, 405, 410, 414})
"""Answers of an HTTP server that asking again does not change."""

# The URL comes through standard input: arguments of a process can be read by every user of the machine.
GOPEN = """
import os, shutil, sys
url = sys.stdin.read()
from webdataset.gopen import gopen, gopen_schemes
if url.startswith("s3://") and "s3" not in gopen_schemes:
    if shutil.which("aws") is None:
        sys.exit("s3: needs the command aws on PATH (or give pipe:COMMAND with {} for the file's name)")
    os.execvp("aws", ["aws", "s3", "cp", "--only-show-errors", url, "-"])
try:
    with gopen(url, "rb") as stream:
        shutil.copyfileobj(stream, sys.stdout.buffer, 1 << 20)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class TransferError(Exception):
    """Why a transfer failed, in one line. `final`: trying again will not help; `missing`: there is no such file."""

    def __init__(self, cause: str, *, final: bool = False, missing: bool = False) -> None:
        super().__init__(" ".join(cause.split()))
        self.final, self.missing = final or missing, missing


def chunks(url: str, timeout: float, stopped: Callable[[], bool]) -> Iterator[bytes]:
    """The bytes of `url` (http, https, pipe:COMMAND or what webdataset.gopen opens) in pieces of at most CHUNK.

    Raises TransferError when the source cannot be reached, sends nothing for `timeout` seconds, ends with an error or too early, or
    when `stopped()` turns true.
    """
    scheme = url.partition(":")[0].lower()
    if scheme in ("http", "https"):
        source = _http(url, timeout)
    elif scheme == "pipe":
        source = _process(["/bin/sh", "-c", url.partition(":")[2]], "", timeout, stopped)
    else:
        source = _process([sys.executable, "-P", "-c", GOPEN], url, timeout, stopped)
    for chunk in source:
        if stopped():
            raise TransferError("stopped", final=True)
        yield chunk


def _http(url: str, timeout: float) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(_request(url), timeout=timeout) as response:
            expected, count = response.headers.get("Content-Length"), 0
            while chunk := response.read1(CHUNK):
                count += len(chunk)
                yield chunk
            if expected is not None and count != int(expected):
                raise TransferError(f"the connection ended after {count} of {expected} bytes")
    except urllib.error.HTTPError as error:
        missing = error.code in (404, 410)
        raise TransferError(f"HTTP {error.code} {error.reason}", final=error.code in FINAL_STATUS, missing=missing) from None
    except TimeoutError:
        raise TransferError(f"no bytes for {timeout:g} s") from None
    except urllib.error.URLError as error:
        stalled = isinstance(error.reason, TimeoutError)
        raise TransferError(f"no answer for {timeout:g} s" if stalled else str(error.reason)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise TransferError(f"{type(error).__name__}: {error}") from None


def _request(url: str) -> urllib.request.Request:
    """A request of `url`; `user:password@` becomes a header, which is not sent on to where a redirect leads."""
    parts = urllib.parse.urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)))
    if at:
        token = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _process(argv: list[str], told: str, timeout: float, stopped: Callable[[], bool]) -> Iterator[bytes]:
    """Standard output of a command that gets `told` on standard input, from a session of its own, killed as one when it stalls."""
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdin and child.stdout and child.stderr
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(told.encode())
                child.stdin.close()
            tail = bytearray()
            yield from _output(child, tail, timeout, stopped)
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TransferError(f"the command sent all it had and did not end for {timeout:g} s") from None
        finally:
            # Before the child is waited for: until then its number, and so that of its group, is not given to another process.
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        if status:
            lines = tail.decode(errors="replace").strip().splitlines()
            raise TransferError(lines[-1] if lines else f"the command ended with status {status}")


def _output(child: subprocess.Popen[bytes], tail: bytearray, timeout: float, stopped: Callable[[], bool]) -> Iterator[bytes]:
    """What `child` writes to standard output; the end of its standard error goes to `tail`."""
    assert child.stdout and child.stderr
    out, err = child.stdout.fileno(), child.stderr.fileno()
    with selectors.DefaultSelector() as ready:
        ready.register(out, selectors.EVENT_READ)
        ready.register(err, selectors.EVENT_READ)
        heard = time.monotonic()
        while ready.get_map():
            found = {int(key.fd) for key, _ in ready.select(min(POLL, timeout))}
            if err in found:
                text = os.read(err, CHUNK)
                tail[:] = (tail + text)[-STDERR_TAIL:]
                if not text:
                    ready.unregister(err)
            if out in found:
                data = os.read(out, CHUNK)
                heard = time.monotonic()
                if not data:
                    ready.unregister(out)
                else:
                    yield data
                    heard = time.monotonic()  # what the reader did with it is not the source's delay
            elif time.monotonic() - heard > timeout:
                raise TransferError(f"no bytes for {timeout:g} s")
            if stopped():
                raise TransferError("stopped", final=True)
