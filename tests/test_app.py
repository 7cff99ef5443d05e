"""Promises of `app`, driven by a real browser: answers, the slider, refusals, two tabs at once."""

import re
import signal
import urllib.error
import urllib.request

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'mlx-vlm-prune[app]'")

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.pruners import METHODS
from mlx_vlm_prune.scenes import CHECKPOINT, compose

from .app_site import PATIENCE, Site, answers, open_folder, open_tab, wait_for_figures, write
from .browser import start_browser
from .entry_points import ROOT
from .test_exploration import HOSTILE

N, SEED = 196, 1_000_000_007
QUESTION, OTHER = "What does the sign say?", "Is there a red star?"


@pytest.fixture(scope="module")
def browser():
    with start_browser() as running:
        yield running


@pytest.fixture(scope="module")
def sites():
    """All that were started; the last one runs, if any."""
    started: list[Site] = []
    yield started
    for site in started:
        site.process.kill()
        site.process.communicate()


@pytest.fixture
def site(browser, sites, tmp_path_factory):
    """One for all tests, or a new one where it was ended."""
    if not sites or sites[-1].process.poll() is not None:
        sites.append(Site(tmp_path_factory.mktemp("app")))
        sites[-1].wait()
    return sites[-1]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    file = tmp_path_factory.mktemp("scenes") / "scene.png"
    compose(SEED).image().save(file)
    return file


@pytest.fixture
def tab(browser, site):
    tab = open_tab(browser, site)
    yield tab
    tab.close()
    assert tab.faults == []


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


def test_another_model_is_opened_by_its_folder_and_asked(tab, scene):
    write(tab, OTHER)
    wait_for_figures(tab, "full", "")
    open_folder(tab, f" {CHECKPOINT} ")
    label = f"Model: {CHECKPOINT}, 196 visual tokens an image"
    tab.page.locator("#model").get_by_text(label).wait_for()
    for name in ("full", "pruned"):
        tab.page.wait_for_function(
            "(name) => !document.querySelector(`#${name}-chat .message-content`)"
            " && !document.querySelector(`#${name}-figures, #${name}-picture`)",
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


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_no_serious_fault_and_nothing_is_wider_than_the_screen(
    browser, site, scene, width, scheme
):
    """Before a question and behind an answer; on a phone the answers are below one another."""
    tab = open_tab(browser, site, width=width, scheme=scheme)
    assert tab.violations() == []
    write(tab, QUESTION, scene)
    wait_for_figures(tab, "full", "196 of 196")
    assert tab.violations() == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    full, pruned = (tab.page.locator(f"#{name}-chat").bounding_box() for name in ("full", "pruned"))
    assert (full["y"] + full["height"] <= pruned["y"]) == (width == 390)
    tab.close()
    assert tab.faults == []


# What an answer could want to load, each by what the policy calls it.
ADD = "document.head.append(Object.assign(document.createElement({!r}), {}))"
LOADS = {
    "img-src": "new Image().src = place",
    "connect-src": "fetch(place).catch(() => {})",
    "script-src-elem": ADD.format("script", "{ src: place }"),
    "style-src-elem": ADD.format("link", "{ rel: 'stylesheet', href: place }"),
    "frame-src": ADD.format("iframe", "{ src: place }").replace("head", "body"),
}


def test_the_policy_of_the_page_lets_nothing_be_loaded_from_elsewhere(tab):
    for directive, code in LOADS.items():
        blocked = tab.page.evaluate(
            """([code, place]) => new Promise((done) => {
              document.addEventListener("securitypolicyviolation",
                (event) => done([event.effectiveDirective, event.blockedURI]), { once: true });
              new Function("place", code)(place);
            })""",
            [code, f"http://elsewhere.invalid/{directive}"],
        )
        assert blocked[0] == directive and blocked[1].startswith("http://elsewhere.invalid")
    tab.faults.clear()  # which the browser blocked


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


def test_a_signal_while_the_model_is_read_leaves_no_file(sites, tmp_path):
    site = Site(tmp_path)
    sites.insert(0, site)  # to be killed with the others, if need be
    assert site.opening == f"{site.address} opens in some seconds with scenes (built in)\n"
    assert [*site.temporary.glob("mlx-vlm-prune-*")]
    assert site.end(signal.SIGTERM) == (128 + signal.SIGTERM, "", "")
    assert not [*site.temporary.glob("mlx-vlm-prune-*")]


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_no_file_is_left(browser, site, scene, sign, code):
    """The last test: it ends what the others asked."""
    tab = open_tab(browser, site)
    write(tab, QUESTION, scene)
    wait_for_figures(tab, "full", "196 of 196")
    assert [*site.temporary.iterdir()]
    ended, out, err = site.end(sign)
    assert (ended, out) == (code, ""), err
    known = ("note: auto: ", "calibrating ")  # and no fault
    assert all(line.startswith(known) for line in err.splitlines() if line.strip()), err
    left = {path.name for path in site.temporary.iterdir()}
    assert left <= {"mlx"}  # MLX's own, of what it compiled for this CPU
    assert not [*site.desk.iterdir()]
    tab.close()
