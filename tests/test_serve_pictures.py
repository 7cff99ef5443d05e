"""Promises of the pictures in a server's requests: URLs where allowed, and places among texts."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.inputs.image_urls import download

from .golden_requests import make_folder
from .image_site import PICTURE, Server, serving
from .serving import answer, data_uri, noise, question, serve, text_of

from mlx_vlm_prune.serving import pictures  # isort: skip - needs FastAPI
from mlx_vlm_prune.serving.refusals import Notes, RequestRefusedError  # isort: skip
from mlx_vlm_prune.serving.request_schema import check_body  # isort: skip
from mlx_vlm_prune.serving.turns import read_turns  # isort: skip

HOSTS = {"outside.example": "127.0.0.1", "inside.example": "10.0.0.7", "10.0.0.1": "10.0.0.1"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(make_folder(tmp_path_factory.mktemp("pictures")) / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def site() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def resolver(monkeypatch) -> None:
    """Names that lead to the site, which is on the loopback, and to a private address."""
    to_site = partial(
        download,
        is_allowed=lambda address: address.is_loopback,
        resolve=lambda host, port: [HOSTS[host]],
    )
    monkeypatch.setattr(pictures, "download", to_site)


def message(text: str, *urls: str) -> dict[str, Any]:
    """A question about pictures behind URLs."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_a_picture_comes_from_a_url_where_the_server_allows_it(loaded, site, resolver):
    base = f"http://outside.example:{site.server_port}"
    expected = generate(*loaded, "how many stars ?", PICTURE, max_tokens=6)
    with serve(*loaded, allow_url=True, max_images=3) as server:
        for url in (f"{base}/a.png", f"{base}/moved", f"{base}/a.png".replace("http", "HTTP")):
            content = server.chat(message("how many stars ?", url), max_tokens=6)
            assert text_of(content) == expected.text and content["warnings"] == []
        before = len(site.requests)
        twice = message("how many stars ?", *[f"{base}/a.png"] * 2)
        assert server.chat(twice, max_tokens=1)["usage"]["visual_tokens"] == 2 * loaded[0].N
        assert len(site.requests) == before + 1
        status, sentence = server.refusal(message("?", *[f"{base}/a.png"] * 4))
        assert status == 400 and sentence.startswith("there are 4 pictures")
        assert len(site.requests) == before + 1


REFUSED = {
    "named": "picture 1: http://outside.example:{}/named leads to 10.0.0.7, which is not a public",
    "private": "picture 1: http://outside.example:{}/private leads to ",
    "missing": "picture 1: http://outside.example:{}/missing answers with status 404",
    "text": "picture 1: http://outside.example:{}/text is not a PNG, JPEG",
    "large": "picture 1: http://outside.example:{}/large has more than the 50 MB allowed",
}


def test_a_url_that_leads_inside_or_to_no_picture_ends_its_request_alone(loaded, site, resolver):
    with serve(*loaded, allow_url=True) as server:
        for path, start in REFUSED.items():
            url = f"http://outside.example:{site.server_port}/{path}?key=secret"
            status, sentence = server.refusal(message("?", url))
            assert status == 400 and sentence.startswith(start.format(site.server_port)), sentence
            assert "secret" not in sentence and "\n" not in sentence
        inside = server.refusal(message("?", f"http://inside.example:{site.server_port}/a.png"))
        assert "leads to 10.0.0.7, which is not a public address" in inside[1]


def test_neither_this_machine_is_asked_nor_anybody_where_urls_are_not_allowed(loaded, site):
    before = len(site.requests)
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
        url = f"http://{host}:{site.server_port}/a.png"
        with serve(*loaded, allow_url=True) as server:
            assert "which is not a public address" in server.refusal(message("?", url))[1]
        with serve(*loaded) as server:
            assert "and this server fetches none" in server.refusal(message("?", url))[1]
    assert len(site.requests) == before


def test_downloads_have_bounds_and_leave_the_server_free(loaded, site, resolver, monkeypatch):
    base = f"http://outside.example:{site.server_port}"
    with serve(*loaded, allow_url=True, timeout=0.7) as server, ThreadPoolExecutor(1) as other:
        waiting = other.submit(server.post, message("?", f"{base}/slow-body"))
        assert server.call("/health")[0] == 200 and not waiting.done()
        status, content = waiting.result()
        assert status in (400, 504) and "seconds" in content["error"]["message"]
    monkeypatch.setattr(pictures, "MAX_BODY_BYTES", len(PICTURE) + 1)
    with serve(*loaded, allow_url=True) as server:
        assert server.chat(message("?", f"{base}/a.png"), max_tokens=1)
        status, sentence = server.refusal(message("?", f"{base}/a.png", f"{base}/moved"))
        assert (status, sentence) == (413, "the URLs have more than 0 MB together")


def turns(*messages: dict[str, Any], places: bool = True, strict: bool = False) -> Any:
    """The texts, the numbers of the pictures' texts, and the warnings."""
    notes = Notes(strict)
    body = check_body(json.loads(json.dumps({"messages": messages})))
    read = read_turns(body.messages, places, notes)
    return read.texts, [n for n, _ in read.pictures], notes.warnings


def parts(*contents: str) -> dict[str, Any]:
    """A question of texts and of pictures, which are "*"."""
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    texts = [picture if text == "*" else {"type": "text", "text": text} for text in contents]
    return {"role": "user", "content": texts}


def test_pictures_keep_their_places_among_texts():
    assert turns(parts("*", "*", "a")) == (["", "a"], [1, 1], [])
    assert turns(parts("a", "b", "*")) == (["", "a\nb"], [1], [])
    assert turns(parts("A:", "*", "B:", "*")) == (["", "A:\n<image>\nB:\n<image>"], [1, 1], [])
    assert turns(parts("*", "or", "*")) == (["", "<image>\nor\n<image>"], [1, 1], [])
    texts, images, (warning,) = turns(parts("A:", "*", "B:", "*"), places=False)
    assert (texts, images) == (["", "A:\nB:"], [1, 1]) and "template says where" in warning
    with pytest.raises(RequestRefusedError, match="template says where pictures and videos go"):
        turns(parts("*", "or", "*"), places=False, strict=True)


def test_marks_in_words_are_places_of_pictures_or_are_left_out_with_a_warning():
    assert turns(parts("*", "an <image> here")) == (["", "an <image> here"], [1], [])
    left_out = ["the words have <image>, which was left out: it marks no picture here"]
    assert turns(parts("an <image> here")) == (["", "an  here"], [], left_out)
    assert turns(parts("*", "<image>"), places=False) == (["", ""], [1], left_out)
    assert turns(parts("<image> a", "*", "b"))[0] == ["", " a\n<image>\nb"]
    system = {"role": "system", "content": "no <image>"}
    talk = turns(system, parts("a"), answer("<image>!"), parts("b"))
    assert talk == (["no ", "a", "!", "b"], [], 2 * left_out)


def test_messages_of_one_role_behind_each_other_are_one_turn():
    talk = [parts("a"), parts("*", "b"), answer("c"), answer("d"), parts("e")]
    assert turns(*talk) == (["", "<image>".join(["a\n", "\nb"]), "c\nd", "e"], [1], [])
    systems = [{"role": "system", "content": "s"}, {"role": "developer", "content": "t"}]
    assert turns(systems[0], parts("a"), systems[1])[0] == ["s\nt", "a"]
    for wrong in ([answer("a"), parts("b")], [parts("a"), answer("b")], [systems[0]]):
        with pytest.raises(RequestRefusedError, match="begin and end with a question"):
            turns(*wrong)


def test_a_model_of_ours_reads_them_there(loaded):
    images = [noise(70, 80, seed) for seed in range(2)]
    link = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    texts = [{"type": "text", "text": text} for text in ("star", "red")]
    content = [texts[0], link[0], texts[1], link[1]]
    expected = generate(*loaded, "star\n<image>\nred\n<image>", images, max_tokens=8)
    with serve(*loaded) as server:
        served = server.chat({"role": "user", "content": content}, max_tokens=8)
        assert text_of(served) == expected.text != ""
        assert served["usage"]["prompt_tokens"] == expected.prompt_tokens
        first = question("star", images[0])
        joined = server.chat(first, question("red", images[1]), max_tokens=8)
        in_one = [link[0], texts[0], link[1], texts[1]]
        one = server.chat({"role": "user", "content": in_one}, max_tokens=8)
        assert text_of(joined) == text_of(one) and joined["warnings"] == []
