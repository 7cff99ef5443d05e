"""Promises of `serve`: the answers of `generate`, by what each request says of its budget."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from PIL import Image

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.models.towers.vit import VisionTower
from mlx_vlm_prune.scenes import compose

from .serving import Served, answer, data_uri, noise, question, serve, text_of

WORDS = "What colour is the star?"
SCENES = [compose(1_000_000_100 + n).image() for n in range(3)]


@pytest.fixture(scope="module")
def scenes():
    return load(dtype="float32")


@pytest.fixture(scope="module")
def served(scenes):
    with serve(*scenes, max_images=3) as server:
        yield server


@pytest.fixture(scope="module")
def pruning(scenes):
    """A server that prunes where a request says nothing."""
    with serve(*scenes, method="norm", is_pruning=True, keep_ratio=0.5, api_key="k") as server:
        yield server


def test_an_answer_is_that_of_generate_and_its_usage_says_what_was_read(served, scenes):
    options = {"pruner": "divprune", "keep_tokens": 20}
    alone = generate(*scenes, WORDS, SCENES[0], **options, max_tokens=12)
    content = served.chat(question(WORDS, SCENES[0]), visual_tokens=20, max_tokens=12)
    usage = content["usage"]
    assert text_of(content) == alone.text != ""
    assert content["choices"][0]["finish_reason"] == alone.finish_reason
    assert usage["prompt_tokens"] == alone.prompt_tokens
    assert usage["completion_tokens"] == alone.generation_tokens
    assert usage["total_tokens"] == alone.prompt_tokens + alone.generation_tokens
    assert (usage["visual_tokens"], usage["visual_tokens_kept"]) == (scenes[0].N, 20)
    parts = usage["ttft_ms"]
    names = {"request", "queue", "image", "vision", "pruner", "prefill", "total"}
    assert set(parts) == names
    assert parts["total"] == pytest.approx(sum(parts.values()) - parts["total"], rel=0.02, abs=0.5)
    assert content["warnings"] == [] and content["model"] == "tiny"


def test_a_stream_has_the_same_text_in_pieces_and_its_figures_where_they_are_wanted(served):
    whole = served.chat(question(WORDS, SCENES[1]), max_tokens=12)
    body = {"messages": [question(WORDS, SCENES[1])], "max_tokens": 12, "stream": True}
    for options in ({}, {"stream_options": {"include_usage": True}}):
        status, content = served.call("/v1/chat/completions", body | options)
        events = content.decode().split("\n\n")
        assert status == 200 and events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        texts = [choice["delta"].get("content", "") for c in chunks for choice in c["choices"]]
        assert "".join(texts) == text_of(whole) != ""
        assert chunks[-1 - bool(options)]["choices"][0]["finish_reason"] == "stop"
        if options:
            stable = ("prompt_tokens", "completion_tokens", "visual_tokens_kept")
            assert chunks[-1]["choices"] == []
            assert [chunks[-1]["usage"][n] for n in stable] == [whole["usage"][n] for n in stable]


def kept(server: Served, *pictures: Any, detail: str | None = None, **more: Any) -> int:
    options = {} if detail is None else {"detail": detail}
    content = server.chat(question(WORDS, *pictures, **options), max_tokens=1, **more)
    return content["usage"]["visual_tokens_kept"]


def test_a_request_comes_before_the_command_line_and_that_before_the_model(served, pruning, scenes):
    N = scenes[0].N
    low = max(64, N // 9) if N > 64 else N
    one = SCENES[0]
    assert kept(served, one) == kept(served, one, detail="auto") == N
    assert kept(pruning, one) == kept(pruning, one, detail="auto") == N // 2
    assert kept(pruning, one, detail="high") == N
    assert kept(served, one, detail="low") == kept(pruning, one, detail="low") == low
    for server in (served, pruning):
        assert kept(server, one, visual_tokens=9) == 9
        assert kept(server, one, keep_ratio=0.25, detail="high") == N // 4
        assert kept(server, one, visual_tokens=10 * N) == N  # a cap
        assert kept(server, one, one, visual_tokens=9) == 18  # of each image
    assert kept(pruning, one, pruner="none") == N
    assert kept(pruning, one, pruner="uniform") == N // 2
    content = pruning.chat(question(WORDS, one), visual_tokens=16, pruner="avgpool", max_tokens=1)
    assert content["usage"]["pruner"] == "avgpool"


def test_without_a_picture_a_budget_says_nothing(served):
    content = served.chat(question("hello"), visual_tokens=3, max_tokens=2)
    assert content["usage"]["visual_tokens"] == 0 and content["warnings"] == []


PICTURE = partial(noise, 64, 64)
BROKEN = {"url": "data:image/png;base64,iVBORw0KGgo="}


def linked(url: Any) -> dict[str, Any]:
    link = url if isinstance(url, dict) else {"url": url}
    return {"role": "user", "content": [{"type": "image_url", "image_url": link}]}


REFUSED = {
    "broken base64": (linked("data:image/png;base64,@@"), {}, "picture 1: the data URI is damaged"),
    "no picture": (linked(BROKEN), {}, "picture 1: the data URI"),
    "thin": (question("?", noise(1, 2000)), {}, "picture 1: it has 2000 x 1 pixels; the longer"),
    "a path": (linked(__file__), {}, "picture 1: it is no data: URI"),
    "a URL": (linked("http://127.0.0.1/a.png"), {}, "picture 1: it is a URL, and this server"),
    "many": (question("?", *map(PICTURE, range(4))), {}, "there are 4 pictures; a request may"),
    "no field": ({"role": "user"}, {}, "messages[0] has no content"),
    "role": ({"role": "robot", "content": "?"}, {}, "messages[0].role: input should be 'system'"),
    "answer": (answer("?"), {}, "messages must be questions of the user and answers of the"),
    "budgets": (question("?"), {"visual_tokens": 3, "keep_ratio": 0.5}, "give one of visual_tok"),
    "cap": (question("?"), {"visual_tokens": 0}, "visual_tokens is 0; it must be a whole number"),
    "ratio": (question("?"), {"keep_ratio": 1.5}, "keep_ratio is 1.5; it must be above 0"),
    "text": (question("?"), {"visual_tokens": "9"}, "visual_tokens: input should be a valid int"),
    "pruner": (question("?", PICTURE()), {"pruner": "nom"}, "no pruner is called 'nom'"),
    "contradiction": (question("?"), {"pruner": "none", "visual_tokens": 3}, "visual_tokens needs"),
    "tokens": (question("?"), {"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    "heat": (question("?"), {"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
    "milliseconds": (question("?"), {"budget_ms": 0.0}, "budget_ms is 0.0; it must be"),
    "unknown": (question("?"), {"strict": True, "visual_token": 3}, "visual_token is not possible"),
    "tools": (question("?"), {"strict": True, "tools": [{}]}, "tools is not possible here"),
    "long": (question("star " * 40_000), {}, "the prompt has 40"),
    "mark": (question("<image> ?"), {"strict": True}, "the words have <image>, which was left out"),
    "no text": (
        {"role": "user", "content": [{"type": "text"}]},
        {},
        "messages[0].content[0].text: field required",
    ),
    "a number": (linked({"url": 3}), {}, "messages[0].content[0].image_url.url: input should be"),
    "stops": (question("?"), {"stop": ["a"] * 17}, "stop: list should have at most 16 items"),
    "a long stop": (question("?"), {"stop": "a" * 1001}, "stop[0]: string should have at most 10"),
    "a long name": (question("?"), {"pruner": "a" * 1001}, "pruner: string should have at most 10"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_ends_in_one_sentence(name, served):
    message, options, start = REFUSED[name]
    status, sentence = served.refusal(message, **options)
    assert status == 400 and sentence.startswith(start), sentence
    assert "\n" not in sentence


def test_a_body_that_is_no_request_is_refused(served):
    path = "/v1/chat/completions"

    def refused(body: Any, **headers: str) -> tuple[int, str]:
        status, content = served.call(path, body, **headers)
        return status, json.loads(content)["error"]["message"]

    assert refused(b"{")[0] == 400
    assert refused(b"[]") == (400, "the body is no JSON object")
    assert refused(b"[" * 100_000) == (400, "the body is nested too deeply")
    assert refused({}) == (400, "messages: field required")
    assert refused({}, content_type="text/plain")[0] == 415
    assert refused(b" " * 100_000_000) == (413, "the body is larger than 64 MB")
    half = "\ud800"  # of a character
    for content in ({"messages": [question("?")], half: 1}, {"messages": [question(half)]}):
        assert refused(content)[0] == 400
    assert text_of(served.chat(question(WORDS, SCENES[0])))  # and others are answered


def test_what_is_not_followed_is_a_warning_or_strictly_a_refusal(scenes):
    with serve(*scenes, max_pixels=2_000) as server:
        message = question(WORDS, SCENES[0], detail="low", size="large")
        more = {"model": "gpt", "visual_token": 3, "tools": [{}], "user": "u", "n": 1}
        content = server.chat(message, **more, max_tokens=1)
        assert content["warnings"] == [
            "model is 'gpt'; this server has 'tiny' alone",
            "messages[0].content[0].image_url.size is not possible here and was ignored",
            "tools is not possible here and was ignored",
            "visual_token is not possible here and was ignored",
            "picture 1 has 224 x 224 pixels and the server allows 2000; it is read as 44 x 44",
        ]
        assert server.refusal(question("?"), model="gpt", strict=True)[0] == 404
        assert "the server allows 2000" in server.refusal(question("?", SCENES[0]), strict=True)[1]
        mixed = question("?", noise(32, 32), detail="low")
        for detail in ("auto", "high"):
            mixed["content"].insert(0, question("?", noise(32, 32, 1), detail=detail)["content"][0])
            (warning,) = server.chat(mixed, max_tokens=1)["warnings"]
            assert "different details" in warning and warning.endswith(f"with detail {detail}")
        assert "different details" in server.refusal(mixed, strict=True)[1]
        many = {f"field_{n}": 1 for n in range(30)}
        warnings = server.chat(question("?"), max_tokens=1, **many)["warnings"]
        assert len(warnings) == 21 and warnings[-1] == "10 more fields are not possible here"


def test_detail_low_without_a_method_is_a_warning(pruning):
    message = question(WORDS, SCENES[0], detail="low")
    content = pruning.chat(message, pruner="none", max_tokens=1)
    assert content["usage"]["visual_tokens_kept"] == content["usage"]["visual_tokens"]
    (warning,) = content["warnings"]
    assert warning == "detail low needs a pruner other than none: all visual tokens are kept"
    assert pruning.refusal(message, pruner="none", strict=True) == (400, warning)


def test_a_photograph_that_is_decoded_at_a_part_of_its_size_is_said_to_be(served):
    large = question(WORDS)
    link = {"url": data_uri(Image.new("RGB", (5_000, 5_200)), "JPEG")}
    large["content"].insert(0, {"type": "image_url", "image_url": link})
    (warning,) = served.chat(large, max_tokens=1)["warnings"]
    assert warning.startswith("picture 1 has 5000 x 5200 pixels and the server allows 25000000; it")
    assert warning.endswith("is read as 2500 x 2600")


def test_turns_read_the_rows_again_that_are_the_same(served, scenes, monkeypatch):
    calls, run = [], VisionTower.__call__
    monkeypatch.setattr(VisionTower, "__call__", lambda *a: calls.append(1) or run(*a))
    picture = compose(1_000_000_300).image()
    options = {"pruner": "divprune", "max_tokens": 8}
    first = served.chat(question(WORDS, picture), visual_tokens=12, **options)
    talk = [question(WORDS, picture), answer(text_of(first)), question("Is it red?")]
    second = served.chat(*talk, visual_tokens=12, **options)
    assert len(calls) == 1
    reused = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert reused > 12 and reused >= first["usage"]["prompt_tokens"] - 12
    other = served.chat(*talk, visual_tokens=13, **options)  # the budget is part of every key
    assert len(calls) == 1
    assert other["usage"]["visual_tokens_kept"] == 13
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] < 12
    with serve(*scenes, cache_bytes=0) as forgetful:
        for tokens, content in ((12, second), (13, other)):
            fresh = forgetful.chat(*talk, visual_tokens=tokens, **options)
            assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert text_of(fresh) == text_of(content)
    assert len(calls) == 3


REQUESTS = [
    {"visual_tokens": 9}, {"keep_ratio": 0.5, "pruner": "cdpruner"}, {}, {"pruner": "fastv"},
    {"visual_tokens": 16, "pruner": "avgpool"}, {"temperature": 2.0, "seed": 7, "top_p": 0.9},
    {"pruner": "divprune+restore", "keep_ratio": 0.25}, {"temperature": 1.5, "top_k": 5},
]  # fmt: skip


def test_requests_with_other_budgets_share_a_batch_and_are_answered_as_alone(served, scenes):
    pytest.importorskip("mlx_lm", reason="top_k is mlx-lm's")
    jobs = [(question(WORDS, SCENES[n % 3]), n) for n in range(len(REQUESTS))]

    def ask(job: Any) -> str:
        message, n = job
        return text_of(served.chat(message, **REQUESTS[n], max_tokens=10))

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as clients:
        for _ in range(2):
            assert list(clients.map(ask, jobs)) == alone
    names = {"visual_tokens": "keep_tokens"}
    for (_, n), text in zip(jobs, alone, strict=True):
        options = {names.get(name, name): value for name, value in REQUESTS[n].items()}
        assert generate(*scenes, WORDS, SCENES[n % 3], **options, max_tokens=10).text == text


def test_a_key_is_wanted_for_answers_alone(pruning):
    path = "/v1/models"
    assert pruning.call(path)[0] == 200
    status, content = pruning.call(path, authorization="Bearer no")
    assert (status, json.loads(content)["error"]["type"]) == (401, "authentication_error")
    assert Served(pruning.port).post(question("?"))[0] == 401
    assert Served(pruning.port).call("/health")[0] == 200


def test_models_health_and_metrics(served):
    _, models = served.call("/v1/models")
    (model,) = json.loads(models)["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert json.loads(served.call("/v1/models/tiny")[1])["id"] == "tiny"
    assert served.call("/v1/models/other")[0] == 404
    assert json.loads(served.call("/health")[1])["status"] == "ok"
    before = (
        served.metric('requests_total{status="200"}'),
        served.metric("visual_tokens_kept_total"),
    )
    served.chat(question(WORDS, SCENES[0]), visual_tokens=9, max_tokens=1)
    after = served.metric('requests_total{status="200"}'), served.metric("visual_tokens_kept_total")
    assert (after[0] - before[0], after[1] - before[1]) == (1, 9)
    _, text = served.call("/metrics")
    for line in text.decode().splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"\})? [\d.]+', line), line


def openai_client(server: Served) -> Any:
    """OpenAI's own client of a server."""
    openai = pytest.importorskip("openai", reason="openai's client is not installed")
    http = openai.DefaultHttpxClient(trust_env=False)
    url = f"http://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(base_url=url, api_key="k", http_client=http, max_retries=0)


def test_openais_own_client_is_answered(served, pruning):
    messages: Any = [question(WORDS, SCENES[0], detail="low")]
    with openai_client(served) as ours:
        assert [model.id for model in ours.models.list()] == ["tiny"]
        whole = ours.chat.completions.create(model="tiny", messages=messages, max_tokens=9)
        assert whole.usage.visual_tokens_kept <= 64 and whole.usage.ttft_ms["total"] > 0
        stream = ours.chat.completions.create(
            model="tiny", messages=messages, max_tokens=9, stream=True,
            stream_options={"include_usage": True}, extra_body={"visual_tokens": 9},
        )  # fmt: skip
        chunks = list(stream)
        assert chunks[-1].usage.visual_tokens_kept == 9
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(pieces)
    with openai_client(pruning) as ours:
        answered = ours.with_options(api_key="k").chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": data_uri(SCENES[0])[:9]}]
        )
        assert answered.choices[0].message.role == "assistant"


def test_openais_own_client_is_refused_and_warned(served, pruning):
    openai = pytest.importorskip("openai", reason="openai's client is not installed")
    messages: Any = [question(WORDS, SCENES[0], detail="low")]
    with openai_client(served) as ours:
        create = ours.chat.completions.create
        with pytest.raises(openai.BadRequestError, match="picture 1: it is no data: URI"):
            create(model="tiny", messages=[linked("a.png")])
        body = {"strict": True}
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny' alone"):
            create(model="no", messages=messages, extra_body=body)
        with pytest.raises(openai.BadRequestError, match="logit_bias is not possible here"):
            bias = {"logit_bias": {"3": 1}}
            create(model="tiny", messages=messages, extra_body=body | bias)
        twice = [messages[0], {"role": "user", "content": "Answer in one word."}]
        warned = create(
            model="other", messages=twice, max_tokens=1, presence_penalty=0.5, stop=["§"]
        )
        assert [warning.split()[0] for warning in warned.warnings] == ["model", "presence_penalty"]
        with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
            ours.models.retrieve("other")
        with pytest.raises(openai.NotFoundError, match="Not Found"):
            ours.embeddings.create(model="tiny", input="text")
    with openai_client(pruning) as ours, pytest.raises(openai.AuthenticationError):
        ours.with_options(api_key="no").models.list()
