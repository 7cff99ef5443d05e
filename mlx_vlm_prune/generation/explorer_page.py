"""The page that shows what answers kept: one HTML file, put together from those in `explorer/`.

What a prompt, an answer or a file name holds stands in one block of JSON, in which no character can
end the block; the scripts put it on the page as text. The page's policy lets no other script run
and nothing be loaded.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "explorer"
SCRIPTS = ("data.js", "picture.js", "charts.js", "answers.js", "page.js")
# Characters that would end a block of JSON in HTML, or a line in JavaScript.
ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render_page(content: Mapping[str, Any]) -> str:
    """The page of `Exploration.as_json`."""
    style = read_part("page.css")
    script = "\n".join(['(() => {\n"use strict";', *map(read_part, SCRIPTS), "})();"])
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}';"
        f" script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    title = f"What was kept: {content['prompt'] or content['answers'][0]['pruner']}"
    parts = {
        "policy": policy,
        "title": escape(title.encode("utf-8", "replace").decode()),
        "style": style,
        "data": script_json(content),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], read_part("page.html"))


def script_json(content: Mapping[str, Any]) -> str:
    """JSON that can stand in a script element, whatever its texts hold."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.translate(ESCAPED)


def read_part(name: str) -> str:
    """A file of the page."""
    return (FOLDER / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
