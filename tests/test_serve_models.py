"""Promises of `serve` with LLaVAs, language models of mlx-lm's and models of mlx-vlm's."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.arguments import build_serve_parser
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.serve import settings_of

from . import backbones, llava
from .serving import (
    Served,
    ServerSettings,
    answer,
    build_server,
    noise,
    question,
    serve,
    text_of,
)

PICTURES = [noise(80, 90, 1), noise(120, 60, 2)]
HOSTS = ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"]
OURS = ["own llava", "qwen3", "llama", "mamba"]
METHODS = [
    {}, {"visual_tokens": 5}, {"keep_ratio": 0.5, "pruner": "norm"},
    {"keep_ratio": 0.25, "pruner": "divprune"}, {"pruner": "avgpool", "visual_tokens": 4},
]  # fmt: skip
INSIDE = [{"keep_ratio": 0.25, "pruner": f"{name}+divprune"} for name in ("patch_norm", "ipcv")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model and its processor by its kind, loaded once."""
    models: dict[str, Any] = {}

    def of_kind(kind: str) -> Any:
        if kind in models:
            return models[kind]
        home = tmp_path_factory.mktemp("models")
        if kind == "own llava":
            folder = llava.write(llava.random_model(), home)
        elif kind in OURS:
            pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
            folder = backbones.write(kind, home)
        else:
            pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
            from . import host_folders

            folder = host_folders.checkpoint(kind, home)
        models[kind] = load(folder, dtype="float32")
        return models[kind]

    return of_kind


def words(kind: str) -> list[str]:
    return ["w7 w9", "w3 w11 w4 w8"] if kind in HOSTS else ["how many stars ?", "is it red ?"]


def ask(server: Served, text: str, n: int, **options: Any) -> tuple[str, int, int]:
    pictures = [PICTURES[n % 2]] if n % 4 < 3 else []
    content = server.chat(question(text, *pictures), **options)
    usage = content["usage"]
    return text_of(content), usage["prompt_tokens"], usage["visual_tokens_kept"]


def alone(model: Any, text: str, n: int, options: dict[str, Any]) -> tuple[str, int, int]:
    """The same by `generate`."""
    options = dict(options)
    if (tokens := options.pop("visual_tokens", None)) is not None:
        options["keep_tokens"] = tokens
    image = [PICTURES[n % 2]] if n % 4 < 3 else []
    whole = generate(*model, text, image, **options)
    return whole.text, whole.prompt_tokens, whole.visual_tokens_kept


@pytest.mark.parametrize("method", ["score_prune", "mlp"])
def test_a_learned_method_answers_first_in_the_servers_thread(method):
    with serve(*load()) as server:
        usage = server.chat(question("Is it red?", PICTURES[0]), pruner=method, keep_ratio=0.25)
        assert usage["usage"]["visual_tokens_kept"] == 49


def test_an_answer_ends_at_a_stop_text_however_it_is_cut_into_pieces():
    message = question("What colour is the star?", compose(1_000_000_100).image())
    with serve(*load(dtype="float32")) as served:
        whole = text_of(served.chat(message))
        assert len(whole) >= 4
        body = {"messages": [message], "stop": ["§", stop := whole[2:4]]}
        status, content = served.call("/v1/chat/completions", body)
        assert (status, text_of(json.loads(content))) == (200, whole[: whole.find(stop)])
        status, content = served.call("/v1/chat/completions", body | {"stream": True})
        pieces = re.findall(r'"content": "([^"]*)"', content.decode())
        assert (status, "".join(pieces)) == (200, whole[: whole.find(stop)])


@pytest.mark.parametrize("kind", [*OURS, *HOSTS])
def test_requests_of_all_kinds_share_a_batch_and_are_answered_as_alone(kind, loaded):
    model = loaded(kind)
    in_tiles = kind == "smolvlm"  # which share their image's K, so it is not small
    methods = [{}, {"keep_ratio": 0.5, "pruner": "norm"}] if in_tiles else METHODS
    methods = [*methods, *(INSIDE if kind.startswith("qwen") and kind in HOSTS else ())]
    jobs = [
        (text, n, {**method, "max_tokens": 6 + n % 3})
        for n, method in enumerate(methods)
        for text in words(kind)
    ]
    with serve(*model) as server, ThreadPoolExecutor(len(jobs)) as clients:
        # The first that is computed of the model: what loading leaves is its own thread's alone.
        first, again = (
            [*clients.map(lambda job: ask(server, job[0], job[1], **job[2]), jobs)]
            for _ in range(2)
        )
    expected = [alone(model, text, n, options) for text, n, options in jobs]
    assert first == again == expected and len({text for text, *_ in expected}) > 2


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_mlx_vlms_models_are_asked_in_turns_and_with_every_option(kind, loaded):
    model, processor = loaded(kind)
    base = type(model.language_model)
    with serve(model, processor, method="norm", is_pruning=True, keep_ratio=0.5) as server:
        first = question("w7 w9", PICTURES[0])
        talk = [{"role": "system", "content": "w8"}, first, answer("w3"), question("w4")]
        content = server.chat(*talk, max_tokens=6)
        with_detail = question("w7", PICTURES[0], detail="high")
        full = server.chat(with_detail, max_tokens=1)["usage"]
        assert full["visual_tokens_kept"] == full["visual_tokens"] > 0
        assert content["usage"]["visual_tokens_kept"] == full["visual_tokens"] // 2
        low = server.chat(question("w7", PICTURES[0], detail="low"), max_tokens=1)["usage"]
        assert low["visual_tokens_kept"] == min(64, full["visual_tokens"])
        sampled = [
            text_of(server.chat(first, temperature=3.0, seed=seed, max_tokens=8, top_p=0.9))
            for seed in (5, 5, 6)
        ]
        assert sampled[0] == sampled[1] != sampled[2]
        content = server.chat(first, pruner="tome", keep_ratio=0.25, max_tokens=4)
        assert "fastv works between" in server.refusal(first, pruner="fastv", keep_ratio=0.5)[1]
    assert type(model.language_model) is base
    inside = {"pruner": "tome", "keep_ratio": 0.25, "max_tokens": 4}
    one = generate(model, processor, "w7 w9", PICTURES[0], **inside)
    assert content["usage"]["visual_tokens_kept"] == one.visual_tokens_kept
    assert text_of(content) == one.text


def test_the_tower_of_mlx_vlms_models_runs_once_for_the_pictures_of_a_conversation(
    loaded, monkeypatch
):
    from mlx_vlm_prune.hosts.families.qwen2_5_vl import Qwen2_5VLHost

    calls, run = [], Qwen2_5VLHost.encode_images
    monkeypatch.setattr(Qwen2_5VLHost, "encode_images", lambda *a: calls.append(1) or run(*a))
    with serve(*loaded("qwen2_5_vl")) as server:
        talk = [question("w7 w9", PICTURES[0])]
        for n in range(3):
            content = server.chat(*talk, visual_tokens=3 + n, max_tokens=4)
            assert content["usage"]["visual_tokens_kept"] == 3 + n
            talk += [answer(text_of(content)), question("w8")]
        assert len(calls) == 1


def test_what_a_server_is_to_prune_by_is_checked_before_it_answers(loaded):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    for kind, method, sentence in (
        ("own llava", "nom", "no pruner is called 'nom'"),
        ("llava", "nom", "no pruner is called 'nom'"),
        ("llava", "fastv", "fastv works between the language model's layers"),
    ):
        settings = ServerSettings("tiny", method, is_pruning=True)
        with pytest.raises(UserError, match=sentence):
            build_server(*loaded(kind), settings)


@pytest.mark.parametrize("name", ["_extend_generation_batch", "_prompt_batch"])
def test_a_version_of_mlx_vlms_without_what_is_needed_is_refused_and_the_model_left_as_it_was(
    name, loaded, monkeypatch
):
    from mlx_vlm.generate import BatchGenerator

    model, processor = loaded("llava")
    before = type(model.language_model)
    if name == "_prompt_batch":  # of each, not of the class
        start = BatchGenerator.__init__

        def start_without(self: Any, *arguments: Any, **options: Any) -> None:
            start(self, *arguments, **options)
            del self._prompt_batch

        monkeypatch.setattr(BatchGenerator, "__init__", start_without)
    else:
        monkeypatch.delattr(BatchGenerator, name)
    sentence = rf"mlx-vlm [\d.]+ has no BatchGenerator\.{name}, .*install mlx-vlm 0\.7\.10"
    with pytest.raises(UserError, match=sentence):
        build_server(model, processor, ServerSettings("tiny"))
    assert type(model.language_model) is before
    monkeypatch.undo()
    with serve(model, processor) as server:
        assert text_of(server.chat(question("w7"), max_tokens=3))


def test_the_method_is_the_command_lines_else_the_checkpoints_else_a_default(loaded):
    model, _ = loaded("own llava")
    learned = VLM.__new__(VLM)  # settings read nothing else of it
    learned.config = SimpleNamespace(pruner=("attention_pool", None))
    parse = build_serve_parser(1).parse_args
    for arguments, of_model, method, is_pruning in (
        ([], model, "auto", False),
        ([], learned, "attention_pool", True),
        (["--pruner", "norm"], learned, "norm", True),
        (["--keep-ratio", "0.5"], model, "auto", True),
        (["--pruner", "none"], model, "none", True),
    ):
        settings = settings_of(parse(arguments), of_model)
        assert (settings.method, settings.is_pruning) == (method, is_pruning), arguments
    for arguments, sentence in (
        (["--pruner", "none", "--keep-tokens", "3"], "a budget needs a pruner other than none"),
        (["--keep-ratio", "0.5", "--keep-tokens", "3"], "give keep_ratio or keep_tokens"),
        (["--budget-ms", "0"], "budget_ms is 0.0; it must be a number above 0"),
        (["--timeout", "-1"], "timeout is -1.0; it must be seconds, more than 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            settings_of(parse(arguments))


@pytest.mark.parametrize("ends", ["length", "stop"])
def test_nobody_waits_for_the_step_behind_an_answer_of_mlx_vlms(ends, loaded, monkeypatch):
    """mlx-vlm computes a step ahead, which nobody reads, and waits for it when an answer leaves."""
    from mlx_vlm.generate.ar import GenerationBatch

    from mlx_vlm_prune.hosts.running_batch import HostRunningBatch

    model, processor = loaded("qwen2_5_vl")
    request = Request("w7 w9", [PICTURES[0]], "norm", keep_ratio=0.5, max_tokens=3)
    batch, wait = HostRunningBatch(model, processor, 2), GenerationBatch._eval_pending_state
    try:
        tokens = [token for token, _ in written(batch, request)]
        if ends == "stop":
            criteria = processor.tokenizer.stopping_criteria
            monkeypatch.setattr(criteria, "eos_token_ids", tokens[:1])
        events = list[Any]()
        monkeypatch.setattr(
            GenerationBatch, "_eval_pending_state", lambda self: events.append("wait") or wait(self)
        )
        for _, reason in written(batch, request):
            events.append(reason)
        expected = [None, None, "length"] if ends == "length" else ["stop"]
        assert events == [*expected, "wait"]
        assert not len(batch) and not batch.generator.has_work
    finally:
        batch.close()


def written(batch: Any, request: Request) -> Iterator[tuple[int, str | None]]:
    """Token by token of an answer that is alone in a batch, with the reason of its end."""
    batch.add("a", batch.prepare(request))
    while len(batch):
        for piece in batch.step():
            yield piece.response.token, piece.response.finish_reason
