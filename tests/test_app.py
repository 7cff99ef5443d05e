"""Promises of `app`, driven by a real browser: answers, the slider, refusals, two tabs at once."""

import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from time import monotonic, sleep

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'mlx-vlm-prune[app]'")

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.pruners import METHODS
from mlx_vlm_prune.scenes import CHECKPOINT, compose

from .browser import Tab, start_browser
from .entry_points import ROOT
from .test_exploration import HOSTILE

N, SEED = 196, 1_000_000_007
QUESTION, OTHER = "What does the sign say?", "Is there a red star?"
PATIENCE = 60  # seconds
DOCS = (ROOT / "docs/app.md").read_text(encoding="utf-8")


class Site:
    """A running app, in a folder of its own, with a folder for temporary files."""

    def __init__(self, desk: Path, temporary: Path, is_awaited: bool = True):
        (command,) = re.findall(r"^(mlx-vlm-prune app .*)$", DOCS, re.M)
        words = shlex.split(command.replace(" --model my-model", ""))[1:]
        temporary.mkdir()
        home = {"TMPDIR": str(temporary), "MLX_VLM_PRUNE_CACHE": str(desk.parent / "cache")}
        seconds = {"MLX_VLM_PRUNE_CALIBRATION_SECONDS": "0.1"}
        self.temporary, self.desk = temporary, desk
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_vlm_prune", *words, "--port", "0"], cwd=desk,
            env={**os.environ, "PYTHONPATH": str(ROOT), **home, **seconds},
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stderr
        self.address = self.process.stderr.readline().split()[0] if is_awaited else ""

    def end(self, with_signal: int) -> tuple[int, str, str]:
        """Exit code and what else was written."""
        self.process.send_signal(with_signal)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def browser():
    with start_browser() as running:
        yield running


@pytest.fixture(scope="module")
def site(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "desk").mkdir()
    site = Site(folder / "desk", folder / "temporary")
    yield site
    site.process.kill()
    site.process.communicate()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    file = tmp_path_factory.mktemp("scenes") / "scene.png"
    compose(SEED).image().save(file)
    return file


def open_tab(browser, site, **options) -> Tab:
    tab = Tab(browser, site.address, ready="#question textarea", **options)
    tab.page.set_default_timeout(1000 * PATIENCE)
    return tab


@pytest.fixture
def tab(browser, site):
    tab = open_tab(browser, site)
    yield tab
    tab.close()
    assert tab.faults == []


def write(tab: Tab, text: str, *files: Path) -> None:
    """A question with pictures, and Enter."""
    if files:
        tab.page.locator("#question input[type=file]").set_input_files([*files])
        tab.page.locator("#question .thumbnail-item").nth(len(files) - 1).wait_for()
    tab.page.locator("#question textarea").fill(text)
    tab.page.locator("#question textarea").press("Enter")


def wait_for_figures(tab: Tab, name: str, beginning: str) -> None:
    tab.page.wait_for_function(
        "([id, start]) => document.querySelector(id).value.startsWith(start)",
        arg=[f"#{name}-figures textarea", beginning],
    )


def answers(tab: Tab, name: str) -> list[str]:
    """What stands in a chat: questions and answers in turn."""
    return tab.page.locator(f"#{name}-chat .message-content").all_inner_texts()


@pytest.fixture(scope="module")
def model():
    return load()


def test_a_question_is_answered_twice_and_the_slider_answers_it_anew(tab, scene, model):
    write(tab, QUESTION, scene)
    wait_for_figures(tab, "full", "196 of 196 visual tokens (100%); ")
    wait_for_figures(tab, "pruned", "98 of 196 visual tokens (50%); ")
    image = Image.open(scene)
    for name, options in (
        ("full", {}), ("pruned", {"keep_ratio": 0.5, "caution": False}),
    ):  # fmt: skip
        result = generate(*model, QUESTION, image, **options)
        assert answers(tab, name) == [f"{QUESTION}\n(with 1 picture)", result.text]
        assert tab.page.locator(f"#{name}-picture img").count() == 1
    before = tab.page.locator("#pruned-picture img").get_attribute("src")
    tab.page.locator("#percent input[type=range]").fill("25")
    wait_for_figures(tab, "pruned", "49 of 196 visual tokens (25%); ")
    result = generate(*model, QUESTION, image, keep_ratio=0.25, caution=False)
    assert answers(tab, "pruned")[-1] == result.text
    assert tab.page.locator("#pruned-picture img").get_attribute("src") != before


def test_the_menu_explains_each_method_by_its_own_file(tab, scene):
    write(tab, OTHER, scene)
    wait_for_figures(tab, "pruned", "98 of 196")
    tab.page.get_by_label("Method").click()
    option = tab.page.get_by_role("option", name=f"uniform: {METHODS['uniform'].summary}")
    option.click()
    tab.page.get_by_text(METHODS["uniform"].summary, exact=True).wait_for()
    tab.page.wait_for_function(
        "() => !document.querySelector('#pruned-figures textarea').value.includes('196 of 196')"
    )


def test_a_refused_picture_is_a_sentence_and_the_chat_goes_on(tab, scene, tmp_path):
    (tmp_path / "my cat.png").write_bytes(b"no picture at all")
    write(tab, QUESTION, tmp_path / "my cat.png")
    notice = tab.page.locator("#notice textarea")
    notice.wait_for()
    assert re.fullmatch("my cat.png is not a PNG, .* image", notice.input_value())
    assert answers(tab, "full") == answers(tab, "pruned") == []
    tab.page.locator("#question .delete-button").click()
    write(tab, QUESTION, scene)
    wait_for_figures(tab, "full", "196 of 196")
    notice.wait_for(state="hidden")


def test_two_tabs_at_once_get_what_each_gets_alone(browser, site, scene, model):
    tabs = [open_tab(browser, site) for _ in range(2)]
    for tab, question in zip(tabs, (QUESTION, OTHER), strict=True):
        write(tab, question, scene)
    for tab, question in zip(tabs, (QUESTION, OTHER), strict=True):
        wait_for_figures(tab, "full", "196 of 196")
        result = generate(*model, question, Image.open(scene), keep_ratio=0.5, caution=False)
        assert answers(tab, "pruned") == [f"{question}\n(with 1 picture)", result.text]
        tab.close()
        assert tab.faults == []


def test_nothing_that_was_typed_is_executed_or_loaded(tab, scene, tmp_path):
    text = "\n".join([*HOSTILE[:-1], "![x](http://example.com/x.png) [y](http://example.com)"])
    file = tmp_path / "<img src=x onerror='window.pwned = 1'>.png"
    file.write_bytes(b"no picture at all")
    write(tab, text, file)
    notice = tab.page.locator("#notice textarea")
    notice.wait_for()
    tab.page.locator("#question .delete-button").click()
    tab.faults.clear()  # the browser could not draw that file in the field either
    write(tab, text, scene)
    wait_for_figures(tab, "full", "196 of 196")
    assert answers(tab, "full")[0].split() == f"{text} (with 1 picture)".split()
    assert tab.page.locator("#full-chat img, #full-chat a").count() == 0
    assert tab.page.evaluate("window.pwned") is None


def open_folder(tab: Tab, name: str) -> None:
    """Type the folder of a model, and open it."""
    tab.page.locator("#model button").first.click()
    folder = tab.page.get_by_label("Folder of a model")
    folder.fill(name)
    folder.press("Enter")
    tab.page.get_by_role("button", name="Open the model").click()


def test_another_model_is_opened_by_its_folder_and_asked(tab, scene):
    write(tab, OTHER)
    tab.page.wait_for_function("() => document.querySelector('#full-figures textarea').value")
    open_folder(tab, f" {CHECKPOINT} ")
    label = f"Model: {CHECKPOINT}, 196 visual tokens an image"
    tab.page.locator("#model").get_by_text(label).wait_for()
    for name in ("full", "pruned"):
        tab.page.wait_for_function(
            "(name) => !document.querySelector(`#${name}-chat .message-content`)"
            " && document.querySelector(`#${name}-figures textarea`).value === ''",
            arg=name,
        )
    tab.page.get_by_label("Method").click()
    tab.page.get_by_role("option", name=f"norm: {METHODS['norm'].summary}").click()
    write(tab, QUESTION, scene)
    wait_for_figures(tab, "full", "196 of 196")
    model, processor = load(CHECKPOINT)
    for name, options in (("full", {}), ("pruned", {"pruner": "norm", "keep_ratio": 0.5})):
        result = generate(model, processor, QUESTION, Image.open(scene), **options)
        assert answers(tab, name) == [f"{QUESTION}\n(with 1 picture)", result.text]


def test_another_folder_is_refused_in_a_sentence(tab):
    open_folder(tab, "nowhere")
    notice = tab.page.locator("#notice textarea")
    notice.wait_for()
    assert notice.input_value() == "there is no folder nowhere"


def test_milliseconds_are_a_budget_too(tab, scene):
    tab.page.get_by_label("milliseconds").check()
    tab.page.locator("#ms input").fill("100000")
    write(tab, QUESTION, scene)
    tab.page.locator("#notice textarea").wait_for()
    assert tab.page.locator("#notice textarea").input_value().startswith("Budget: 100000 ms -> ")


def test_an_example_fills_in_a_question(tab):
    tab.page.locator(".gallery-item").first.click()
    tab.page.locator("#question .thumbnail-item").first.wait_for()
    tab.page.locator("#question textarea").press("Enter")
    wait_for_figures(tab, "full", "196 of 196")


def test_on_a_phone_nothing_is_wider_than_the_screen(browser, site, scene):
    tab = open_tab(browser, site, width=390)
    write(tab, QUESTION, scene)
    wait_for_figures(tab, "full", "196 of 196")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [tab.page.locator(f"#{name}-chat").bounding_box() for name in ("full", "pruned")]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    tab.close()
    assert tab.faults == []


def send(site: Site, path: str, headers: dict[str, str], content: bytes | None = None) -> int:
    """The status of a request."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{site.address}{path}", content, headers)
    try:
        with opener.open(request, timeout=PATIENCE) as reply:
            return reply.status
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code


def test_only_this_machine_and_its_own_page_reach_the_app(site):
    port = site.address.rpartition(":")[2]
    assert site.address == f"http://127.0.0.1:{port}"
    for path, headers in (
        ("/", {"Host": "evil.example"}), ("/gradio_api/file=http://127.0.0.1:1/x", {}),
        (f"/gradio_api/file={ROOT}/README.md", {}),
    ):  # fmt: skip
        assert send(site, path, headers) in (400, 403), path


def test_a_page_of_another_site_can_send_nothing(site):
    """As a browser sends it: a form with a file needs nobody's leave."""
    form = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="stranger.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nwords\r\n--x--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    port = site.address.rpartition(":")[2]
    for origin in (
        "https://evil.example",
        "http://127.0.0.1:1",
        f"https://127.0.0.1:{port}",
        "null",
    ):
        assert send(site, "/gradio_api/upload", {**kind, "Origin": origin}, form) == 403, origin
    assert not [*site.temporary.rglob("stranger.txt")]
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert send(site, "/config", {**elsewhere, "Sec-Fetch-Mode": "no-cors"}) == 403
    assert send(site, "/", {**elsewhere, "Sec-Fetch-Mode": "navigate"}) == 200  # a link to it
    assert send(site, "/gradio_api/upload", {**kind, "Origin": site.address}, form) == 200
    assert [*site.temporary.rglob("stranger.txt")]


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_no_file_is_left(browser, scene, tmp_path, sign, code):
    (tmp_path / "desk").mkdir()
    site = Site(tmp_path / "desk", tmp_path / "temporary")
    tab = open_tab(browser, site)
    write(tab, QUESTION, scene)
    wait_for_figures(tab, "full", "196 of 196")
    assert [*site.temporary.iterdir()]
    ended, out, err = site.end(sign)
    assert (ended, out) == (code, ""), err
    assert all(line.startswith("note: auto: ") for line in err.splitlines())  # no fault
    left = {path.name for path in site.temporary.iterdir()}
    assert left <= {"mlx"}  # MLX's own, of what it compiled for this CPU
    assert not [*site.desk.iterdir()]
    tab.close()


def test_a_signal_while_the_model_is_read_leaves_no_file(tmp_path):
    (tmp_path / "desk").mkdir()
    site = Site(tmp_path / "desk", tmp_path / "temporary", is_awaited=False)
    end = monotonic() + PATIENCE
    while not [*site.temporary.glob("mlx-vlm-prune-*")] and monotonic() < end:
        sleep(0.01)
    assert site.end(signal.SIGTERM) == (128 + signal.SIGTERM, "", "")
    assert not [*site.temporary.glob("mlx-vlm-prune-*")]
