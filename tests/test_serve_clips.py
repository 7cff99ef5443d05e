"""A clip in a request to the server: answered as `generate` answers, or refused in a sentence."""

import base64
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mlx_vlm_prune import generate, load

from . import host_folders
from .serving import answer, noise, question, serve, text_of  # skips without FastAPI
from .test_video import animation, film

from mlx_vlm_prune.serving import app  # isort: skip - needs FastAPI
from mlx_vlm_prune.serving.clips import open_clip  # isort: skip
from mlx_vlm_prune.serving.open_requests import OpenRequests  # isort: skip
from mlx_vlm_prune.serving.refusals import Notes, RequestRefusedError  # isort: skip
from mlx_vlm_prune.serving.request_schema import VideoUrl  # isort: skip
from mlx_vlm_prune.serving.settings import ServerSettings  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
WORDS = {"type": "text", "text": "w7 w9"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("videos")
    film(home / "clip.avi", 20, 10)
    animation(home / "clip.gif", 10, 100)
    return home


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return host_folders.checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def served(folder):
    with serve(*load(folder)) as server:
        yield server


def link(file: Path) -> str:
    kind = {"avi": "x-msvideo"}.get(file.suffix[1:], file.suffix[1:])
    return f"data:video/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def about(file: Path | str, **more: float) -> dict:
    """A question about a clip."""
    url = file if isinstance(file, str) else link(file)
    video = {"type": "video_url", "video_url": {"url": url, **more}}
    return {"role": "user", "content": [video, WORDS]}


def linked(kind: str, url: Any) -> dict:
    """A question about what is behind a URL."""
    return {"role": "user", "content": [{"type": kind, kind: url}, WORDS]}


@pytest.mark.parametrize("name", ["clip.avi", "clip.gif"])
@pytest.mark.parametrize("more", [{}, {"pruner": "evs", "keep_ratio": 0.5}, {"visual_tokens": 5}])
def test_a_clip_is_answered_as_generate_answers(served, loaded, home, name, more):
    budget = {"keep_tokens" if key == "visual_tokens" else key: n for key, n in more.items()}
    alone = generate(
        *loaded, "w7 w9", video=home / name, fps=3, max_frames=4, max_tokens=5, **budget
    )
    reply = served.chat(about(home / name, fps=3, max_frames=4), max_tokens=5, **more)
    usage = reply["usage"]
    assert text_of(reply) == alone.text and "warnings" in reply and not reply["warnings"]
    assert usage["visual_tokens"] == alone.visual_tokens > usage["completion_tokens"]
    assert usage["visual_tokens_kept"] == alone.visual_tokens_kept
    assert (usage["pruner"], usage.get("auto")) == (alone.pruner, alone.auto)
    assert usage["prompt_tokens"] == alone.prompt_tokens


def test_a_link_may_be_a_text_and_a_conversation_reads_its_clip_once(served, home):
    bare = {"type": "video_url", "video_url": link(home / "clip.avi")}
    first = {"role": "user", "content": [WORDS, bare]}
    before = served.chat(first, max_tokens=4)
    assert text_of(before) == text_of(served.chat(about(home / "clip.avi"), max_tokens=4))
    rest = (answer(text_of(before)), {"role": "user", "content": "w3"})
    after = served.chat(first, *rest, max_tokens=4)
    assert after["usage"]["visual_tokens"] == before["usage"]["visual_tokens"]
    assert after["usage"]["prompt_tokens"] > before["usage"]["prompt_tokens"]


def test_a_data_uri_and_bytes_are_clips_in_python_too(loaded, home):
    answers = [
        generate(*loaded, "w7", video=video, max_tokens=3, pruner="evs")
        for file in (home / "clip.avi", home / "clip.gif")
        for video in (file, file.read_bytes(), link(file))
    ]
    texts = [each.text for each in answers]
    assert texts[0] == texts[1] == texts[2] and texts[3] == texts[4] == texts[5]
    assert all(each.visual_tokens > each.visual_tokens_kept for each in answers)


def test_frames_are_made_as_small_as_the_server_says(folder, home):
    with serve(*load(folder), max_pixels=48 * 36) as server:
        reply = server.chat(about(home / "clip.avi"), max_tokens=1)
        sentence = "the video has 64 x 48 pixels and the server allows 1728; it is read as 48 x 36"
        assert reply["warnings"] == [sentence]
        assert server.refusal(about(home / "clip.avi"), strict=True) == (400, sentence)


def test_a_time_is_no_budget_of_a_clip(served, home):
    assert served.chat(about(home / "clip.avi"), max_tokens=1, strict=True)["warnings"] == []
    reply = served.chat(about(home / "clip.avi"), max_tokens=1, budget_ms=50, pruner="evs")
    assert reply["usage"]["visual_tokens_kept"] == reply["usage"]["visual_tokens"]
    assert reply["warnings"] == [
        "budget_ms is for pictures: all visual tokens of the video were kept"
    ]


def test_nothing_of_a_clip_stays_on_the_disk(served, home, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert served.chat(about(home / "clip.avi"), max_tokens=1)
    damaged = link(home / "clip.avi")[:200]
    assert "the video: the data URI is damaged" in served.refusal(about(damaged))[1]
    assert not [*tmp_path.iterdir()]


def test_what_is_no_clip_is_refused_in_a_sentence_and_harms_no_other(served, home):
    clip = about(home / "clip.avi")
    words = {"role": "user", "content": "w3"}
    cases = [
        ([about(str(home / "clip.avi"))], "the video: it is no data: URI, and local files are"),
        ([about("http://example.org/a.mp4")], "the video: it is a URL, and this server fetches"),
        ([about("data:,words")], "the video: the data URI is not an MP4, MOV, MKV, WebM or AVI"),
        ([about("data:;base64,?")], "the video: the data URI is damaged"),
        ([about(home / "clip.avi", fps=0)], "the video: fps is 0.0; it must be above 0"),
        ([about(home / "clip.avi", max_frames=0)], "the video: max_frames is 0; it must be"),
        ([clip, answer("w1"), clip], "a chat has one video; there are 2"),
        ([words, answer("w1"), clip], "the video must come with the first question"),
        ([clip, answer("w1"), question("w3", noise(30, 30))], "about a video or about pictures"),
        ([{**clip, "role": "system"}, words], "messages[0] of the system has a picture or a video"),
        ([about("")], "the video: its url is empty"),
        ([linked("image_url", link(home / "clip.avi"))], "it is a video; send it as video_url"),
        ([linked("video_url", 7)], "messages[0].content[0].video_url: must be a JSON object"),
        ([clip, answer("<|video_pad|>"), words], "leave <|video_pad|> out of the prompt"),
    ]
    for messages, sentence in cases:
        status, refusal = served.refusal(*messages, max_tokens=1)
        assert (status, sentence in refusal) == (400, True), refusal
    for pruner, sentence in (
        ("uniform", "uniform cannot prune a clip"),
        ("tome", "inside the tow"),
    ):
        assert sentence in served.refusal(clip, pruner=pruner, keep_ratio=0.5)[1]
    assert served.chat(clip, max_tokens=1)


def test_a_model_that_reads_no_clips_says_so_before_it_is_decoded(tmp_path):
    damaged = about("data:video/mp4;base64,AAAA")
    with serve(*load()) as server:
        sentence = "the model reads no video: give some of its frames as images"
        assert server.refusal(damaged) == (400, sentence)
    with serve(*load(host_folders.checkpoint("llava", tmp_path))) as server:
        assert "the model reads no video: " in server.refusal(damaged)[1]


def test_a_clip_is_streamed_between_words_and_behind_a_system_message(served, home):
    parts = [{"type": "text", "text": "w7"}, *about(home / "clip.gif")["content"]]
    messages = [{"role": "system", "content": "w4"}, {"role": "user", "content": parts}]
    whole = served.chat(*messages, max_tokens=3)
    (warning,) = whole["warnings"]
    assert "template says where pictures and videos go" in warning
    body = {"messages": messages, "max_tokens": 3, "stream": True}
    status, content = served.call("/v1/chat/completions", body)
    lines = [line[6:] for line in content.decode().splitlines() if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
    assert status == 200 and "".join(deltas) == text_of(whole)


def test_a_clip_that_ends_early_is_said_to(served, home):
    content = (home / "clip.avi").read_bytes()
    url = (
        f"data:video/x-msvideo;base64,{base64.b64encode(content[: len(content) * 2 // 3]).decode()}"
    )
    (warning,) = served.chat(about(url, fps=10), max_tokens=1)["warnings"]
    assert re.fullmatch(r"the last \d+ of 20 frames of the video cannot be read", warning)


@pytest.mark.parametrize("name", ["clip.avi", "clip.gif"])
def test_the_memory_of_frames_is_bounded_and_given_back(folder, home, name, monkeypatch):
    monkeypatch.setattr(app, "MAX_OPEN_BYTES", 3 * 64 * 48 * 6)
    with serve(*load(folder)) as server:
        clip = about(home / name, fps=10, max_frames=8)
        sentence = "the video: what it shows takes more than 0 MB in memory"
        status, refusal = server.refusal(clip)
        assert (status, refusal) == (413, sentence.removeprefix("the video: "))
        monkeypatch.setattr(app, "MAX_OPEN_BYTES", 1_000_000)
    with serve(*load(folder)) as server:
        for _ in range(4):
            assert server.chat(clip, max_tokens=1)


def test_a_clip_ends_when_nobody_waits(home):
    requests = OpenRequests(1, 10**9)
    with requests.open(60) as request:
        pass
    notes, settings = Notes(False), ServerSettings("tiny")
    for name in ("clip.avi", "clip.gif"):
        clip = VideoUrl(url=link(home / name))
        with pytest.raises(RequestRefusedError, match="nobody waits for the request any more"):
            open_clip(clip, {}, settings, request, notes)
