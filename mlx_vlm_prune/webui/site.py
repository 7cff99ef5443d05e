"""The page as an application for a server, which no other machine and no other page reaches."""

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, Response
from fastapi.datastructures import Headers
from fastapi.middleware.trustedhost import TrustedHostMiddleware

from .model_thread import Models, ModelThread
from .page import CSS, FONT, Page

# The page loads nothing from elsewhere, whatever an answer or a file name holds.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; base-uri 'self'; form-action 'none'; frame-ancestors 'self'"
)
LARGEST_FILE = "50mb"
HOSTS = ["127.0.0.1", "localhost"]
# Gradio fetches these for whoever asks; the page asks for files that it holds itself.
FETCHES = ("/file=http", "/proxy=")


def build_site(models: Models, thread: ModelThread, folder: Path, max_tokens: int) -> FastAPI:
    """The page of the app; what is uploaded and drawn lies in the folder."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    app.add_middleware(WithinPolicy)
    page = Page(models, thread, folder, max_tokens)
    return gr.mount_gradio_app(
        app, page.blocks, path="/", server_name=HOSTS[0], footer_links=[], ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, max_file_size=LARGEST_FILE,
        theme=theme(), css=CSS,
    )  # fmt: skip


def theme() -> gr.themes.Base:
    """Gradio's own colours, with text that is dark enough to be read, and the system's fonts."""
    plain = gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace"))
    quiet = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
    return plain.set(**quiet)


def is_of_another_page(headers: Headers) -> bool:
    """Did a page of another site send a request? Its browser says so, a program says nothing. A
    link to the app may be followed from anywhere."""
    origin, is_link = headers.get("origin"), headers.get("sec-fetch-mode") == "navigate"
    if origin is not None:
        return origin != f"http://{headers.get('host')}"
    return headers.get("sec-fetch-site") == "cross-site" and not is_link


class WithinPolicy:
    """Refuses what another page sends and what would fetch from elsewhere, and forbids the page
    to."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        is_fetch = any(part in scope["path"] for part in FETCHES)
        if is_fetch or is_of_another_page(Headers(scope=scope)):
            await Response(status_code=403)(scope, receive, send)
            return

        headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        # Gradio would compress all of its scripts for each tab, though they stay on this machine.
        await self.app({**scope, "headers": headers}, receive, send_with_policy)
