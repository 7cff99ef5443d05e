"""Take the pictures of the app, a page of `explore` and the gallery that docs/ shows.

In Chromium, 1280 and 390 pixels wide:

python -m benchmarks.screenshots --only app
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from mlx_vlm_prune import explore
from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence
from mlx_vlm_prune.checkpoints.reading.files import atomic_path

from .gallery_page import PAGE
from .page_fluidity import chromium
from .report import ROOT
from .server_process import server_process

WIDE, PHONE = 1280, 390
READY = "html[data-ready]"
PATIENCE = 120_000  # ms
PATCH = 66  # which is pointed at, of 14 x 14
EXPLORED = [
    "--pruner", "divprune", "cls_attention+sparsevlm", "tome",
    "--keep-ratio", "0.75", "0.5", "0.25", "--max-tokens", "8", "--no-predict",
]  # fmt: skip


def take_app(browser: Any) -> None:
    """A question about a drawn scene, answered. Its figures are this machine's, and left out."""
    with server_process([sys.executable, "-m", "mlx_vlm_prune", "app", "--port", "0"]) as (_, url):
        for name, width in (("app", WIDE), ("app-phone", PHONE)):
            page = open_page(browser, url, "#question textarea", width)
            page.locator("#examples button").nth(1).click()
            page.locator("#question .thumbnail-item").first.wait_for()
            page.locator("#question textarea").press("Enter")
            page.locator("#full-picture img").wait_for()
            page.add_style_tag(content=":has(> .figures) { display: none !important; }")
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)  # until what moves has come to rest
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
            with atomic_path(ROOT / f"docs/{name}.jpg", replace=True) as temporary:
                picture.save(temporary, format="JPEG", quality=85, optimize=True)
            page.context.close()


def take_explore(browser: Any) -> None:
    """Two methods' pages at half of the tokens, with a patch that is pointed at."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        explore.main([*EXPLORED, "--out", str(file)])
        for name, width, height in (("explore", WIDE, 970), ("explore-phone", PHONE, 910)):
            page = open_page(browser, file.as_uri(), READY, width, height)
            page.locator("#budget").fill("1")
            page.locator("#budget").blur()
            box = page.locator("canvas").first.bounding_box()
            row, column = divmod(PATCH, 14)
            page.mouse.move(
                box["x"] + (column + 0.5) * box["width"] / 14,
                box["y"] + (row + 0.5) * box["height"] / 14,
            )
            save_png(page, name)


def take_gallery(browser: Any) -> None:
    """A photograph by two methods, and on a phone what is there at first."""
    page = open_page(browser, PAGE.as_uri(), READY, WIDE, 970)
    page.get_by_label("Picture", exact=True).select_option("3")
    page.get_by_label("Method, side A").select_option("cls_attention")
    page.get_by_label("Method, side B").select_option("tome")
    save_png(page, "gallery")
    save_png(open_page(browser, PAGE.as_uri(), READY, PHONE, 1500), "gallery-phone")


def open_page(browser: Any, address: str, ready: str, width: int, height: int = 900) -> Any:
    """A tab, once what `ready` selects is there."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="light", reduced_motion="reduce"
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.locator(ready).wait_for()
    return page


def save_png(page: Any, name: str) -> None:
    """What the tab shows, in 256 colours; the tab is closed."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256, kmeans=3)
    with atomic_path(ROOT / f"docs/{name}.png", replace=True) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
    page.context.close()


PAGES = {"app": take_app, "explore": take_explore, "gallery": take_gallery}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a UserError ends in one sentence and exit code 2."""
    p = Parser("benchmarks.screenshots", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument(
        "--only",
        nargs="+",
        choices=PAGES,
        default=[],
        help="only the pictures of these pages (default: all)",
    )
    with in_one_sentence():
        args = p.parse_args(argv)
        with chromium() as browser:
            for name in args.only or PAGES:
                PAGES[name](browser)


if __name__ == "__main__":
    main()
