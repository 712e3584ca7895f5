"""A web page on this machine that generates videos with a trained system.

  python app.py RUNS                     then open http://127.0.0.1:7860
  python app.py RUNS --port 7861 --weights model --precision bf16

RUNS is the --results-dir of training, as for sample.py, whose other settings are taken too. The page is served to this
machine alone, and asks nothing of any other. It needs gradio: pip install -r requirements-optional.txt
"""

import os
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import torch

from launch.run import run_main
from pipelines.batches import out_of_memory
from pipelines.studio import Studio, Wish
from pipelines.systems import load_sampling
from utils.errors import ConfigError, UserError

HOST, PORT = "127.0.0.1", 7860
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_SSR_MODE": "False"}
"""Of gradio: it counts its users, and looks for newer versions of itself, unless it is told not to."""
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'"
"""What the browser may load: nothing from elsewhere."""
MAX_UPLOAD = "64mb"
"""Of a picture that is given; a larger one is refused."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


class OwnFilesOnly:
    """An ASGI application that serves its own page alone: nothing that another page's script sends, nothing loaded from other machines."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if foreign(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"sent by a page of another origin\n"})
            return

        async def answer(message: Scope) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, answer)


def foreign(scope: Scope) -> bool:
    """Whether a browser says that a page of another origin sent this request: a form or a script may send to any address."""
    headers = scope.get("headers", ())
    host = next((value for name, value in headers if name == b"host"), b"")
    return any(name == b"origin" and value != b"http://" + host for name, value in headers)


def main() -> None:
    """Parse, read the networks, and serve the page until Ctrl-C."""
    argv, port = _take_port(sys.argv[1:])
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nSettings of sample.py: python sample.py --help")
        raise SystemExit(0 if argv else 2)
    config = load_sampling(["--run", *argv] if not argv[0].startswith("-") else argv, "app.py", __doc__ or "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="kinoform-") as folder, _listen(port) as listening:
        application = build(Studio(config, Path(folder), device), Path(folder))
        import uvicorn

        print(f"http://{HOST}:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(application, log_level="warning")).run(sockets=[listening])


def _take_port(argv: list[str]) -> tuple[list[str], int]:
    """The command line without --port, and its value. Raises ConfigError."""
    rest, port, pending = [], str(PORT), iter(argv)
    for token in pending:
        if token == "--port" or token.startswith("--port="):
            port = token.partition("=")[2] or next(pending, "")
        else:
            rest.append(token)
    if not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--port {port}: a number from 1 to 65535, or 0 for one that is free")
    return rest, int(port)


def _listen(port: int) -> socket.socket:
    """A socket of this machine alone. Raises UserError when the port is taken."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()  # who connects before the server has begun waits for it
    except OSError as error:
        listening.close()
        raise UserError(f"--port {port}: {error.strerror}; choose another") from None
    return listening


def build(studio: Studio, folder: Path) -> Any:
    """The page as an ASGI application. Raises UserError without gradio."""
    os.environ.update(QUIET | {"GRADIO_TEMP_DIR": str(folder / "page")})
    try:
        import gradio
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}): pip install -r requirements-optional.txt") from None
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    options = {"theme": theme, "footer_links": [], "ssr_mode": False, "pwa": False, "max_file_size": MAX_UPLOAD}
    gradio.mount_gradio_app(application, _page(gradio, studio), path="/", server_name=HOST, **options)
    application.add_middleware(OwnFilesOnly)
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return application


def _page(gradio: Any, studio: Studio) -> Any:
    """What there is to choose on the left, the video and its settings on the right."""

    def generate(*values: Any, progress: Any = gradio.Progress()) -> tuple[str | None, dict[str, Any] | None, str]:  # noqa: B008
        return _generate(studio, values, lambda share, text: progress(share, desc=text))

    config = studio.config
    with gradio.Blocks(title="Kinoform", analytics_enabled=False) as page:
        gradio.Markdown(f"# Kinoform\n{config.system}, {config.run or 'own networks'}, on {studio.device}")
        with gradio.Row():
            with gradio.Column(scale=1):
                mode = gradio.Radio(list(studio.modes), value=config.mode, label="mode", elem_id="mode")
                label = gradio.Dropdown(studio.classes, value=next(iter(studio.classes), None), label="class", visible=bool(studio.classes))
                seed = gradio.Number(config.seed, precision=0, label="seed", elem_id="seed")
                frames = gradio.Number(config.num_frames, precision=0, label="frames", info="0: as in training", elem_id="frames")
                steps = gradio.Number(config.steps or 0, precision=0, label="steps", info="0: the usual number", elem_id="steps")
                sampler = gradio.Dropdown(studio.samplers, value=config.sampler, label="sampler")
                guidance = gradio.Number(config.guidance, label="guidance", info="1: none", elem_id="guidance", visible=studio.guided)
                asked = config.mode == "image"
                image = gradio.Image(type="filepath", sources=["upload"], label="picture", visible=asked, elem_id="picture")
                button = gradio.Button("Generate", variant="primary", elem_id="generate")
            with gradio.Column(scale=2):
                video = gradio.Video(label="video", autoplay=True, loop=True, interactive=False, elem_id="video", buttons=["download"])
                status = gradio.Markdown("", elem_id="status")
                settings = gradio.JSON(label="settings", elem_id="settings")
        mode.change(lambda chosen: gradio.update(visible=chosen == "image"), mode, image, show_progress="hidden")
        chosen = [mode, label, seed, steps, sampler, guidance, frames, image]
        button.click(generate, chosen, [video, settings, status], concurrency_limit=1, show_progress_on=[video])
    return page.queue()


def _generate(studio: Studio, values: tuple[Any, ...], told: Callable[[float, str], None]) -> tuple[str | None, dict[str, Any] | None, str]:
    """(video, settings, status line) of what was chosen; an error is the status line alone."""
    mode, label, seed, steps, sampler, guidance, frames, image = values
    wish = Wish(
        mode=mode,
        label=label or "",
        seed=int(seed or 0),
        steps=int(steps) if steps else None,
        sampler=sampler,
        guidance=guidance if studio.guided else None,
        frames=int(frames or 0),
        image=image or "",
    )
    try:
        path, settings = studio.make(wish, told)
    except UserError as error:
        return None, None, f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None, None, f"error: {studio.device.type} memory does not hold this video: fewer frames, or --precision bf16"
    return str(path), settings, " ".join(["done", *settings.get("notes", [])])


if __name__ == "__main__":
    run_main(main)
