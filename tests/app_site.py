"""A running app, and a tab with its page, as a user works with it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from .browser import PATIENCE, Browser, Tab
from .entry_points import ROOT

DOCS = (ROOT / "docs/app.md").read_text(encoding="utf-8")


class Site:
    """A running app, in a folder of its own, with a folder for temporary files. `opening` is the
    line that it writes at once."""

    def __init__(self, folder: Path):
        (command,) = re.findall(r"^(mlx-vlm-prune app .*)$", DOCS, re.M)
        words = shlex.split(command.replace(" --model my-model", ""))[1:]
        self.temporary, self.desk = folder / "temporary", folder / "desk"
        self.temporary.mkdir()
        self.desk.mkdir()
        home = {"TMPDIR": str(self.temporary), "MLX_VLM_PRUNE_CACHE": str(folder / "cache")}
        seconds = {"MLX_VLM_PRUNE_CALIBRATION_SECONDS": "0.1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_vlm_prune", *words, "--port", "0"], cwd=self.desk,
            env={**os.environ, "PYTHONPATH": str(ROOT), **home, **seconds},
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stderr
        self.opening = self.process.stderr.readline()
        self.address = self.opening.split()[0]

    def wait(self) -> None:
        """Until it is open."""
        line = self.process.stderr.readline()
        assert line == f"{self.address} in a browser of this machine; Ctrl-C ends\n"

    def end(self, with_signal: int) -> tuple[int, str, str]:
        """Exit code and what else was written."""
        self.process.send_signal(with_signal)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


def open_tab(browser: Browser, site: Site, **options) -> Tab:
    return Tab(browser, site.address, ready="#question textarea", **options)


def write(tab: Tab, text: str, *files: Path) -> None:
    """A question with pictures, and Enter."""
    if files:
        tab.page.locator("#question input[type=file]").set_input_files([*files])
        tab.page.locator("#question .thumbnail-item").nth(len(files) - 1).wait_for()
    tab.page.locator("#question textarea").fill(text)
    tab.page.locator("#question textarea").press("Enter")


def wait_for_figures(tab: Tab, name: str, beginning: str) -> None:
    tab.page.wait_for_function(
        "([id, start]) => document.querySelector(id)?.value.startsWith(start)",
        arg=[f"#{name}-figures textarea", beginning],
    )


def answers(tab: Tab, name: str) -> list[str]:
    """What stands in a chat: questions and answers in turn."""
    return tab.page.locator(f"#{name}-chat .message-content").all_inner_texts()


def open_folder(tab: Tab, name: str) -> None:
    """Type the folder of a model, and open it."""
    tab.page.locator("#model button").first.click()
    folder = tab.page.get_by_label("Folder of a model")
    folder.fill(name)
    folder.press("Enter")
    folder.blur()  # what was typed is the value now, before the button is clicked
    tab.page.get_by_role("button", name="Open the model").click()
