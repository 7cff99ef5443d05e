"""Promises of the server's threads: nobody waits for ever, and a fault ends its own request."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from queue import Queue
from typing import Any

import pytest

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.generation.running_batch import AnswerRoom, OwnRunningBatch, PreparedRequest
from mlx_vlm_prune.generation.stream import AnswerWriter
from mlx_vlm_prune.inputs.prompt import Tokenizer
from mlx_vlm_prune.machine.clock import Clock

from .golden_requests import make_folder
from .serving import PATIENCE, data_uri, noise, question, serve, slow_down, text_of
from .test_serve_load import LONG, wait_for

from mlx_vlm_prune.serving import chat_request, engine  # isort: skip - need FastAPI
from mlx_vlm_prune.serving.memory import AnswerMemory  # isort: skip
from mlx_vlm_prune.serving.metrics import Metrics  # isort: skip
from mlx_vlm_prune.serving.refusals import Notes, RequestRefusedError  # isort: skip
from mlx_vlm_prune.serving.visual_budget import VisualBudget  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def loaded(home):
    """A model whose answers do not end by themselves."""
    return load(home / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A model of mlx-vlm's."""
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    from . import host_folders

    return load(host_folders.checkpoint("llava", tmp_path_factory.mktemp("host")), dtype="float32")


class Batch:
    """A batch without a model, which fails where it is to."""

    context, longest_token = 100, 1

    def __init__(self, broken: str = "") -> None:
        self.broken, self.added = broken, list[str]()

    def _may_fail(self, name: str) -> None:
        if name == self.broken:
            raise RuntimeError(f"{name} is broken")

    def prepare(self, request: Request) -> PreparedRequest:
        return PreparedRequest(request, Clock(), 10)

    def rows_left(self, prepared: PreparedRequest, *, low_detail: bool = False) -> int:
        return prepared.rows

    def add(self, key: Any, prepared: PreparedRequest, *, low_detail: bool = False) -> AnswerRoom:
        self.added.append(prepared.request.prompt)
        return AnswerRoom(10, prepared.request.max_tokens)

    def step(self) -> list[Any]:
        raise RuntimeError("no memory")

    def remove(self, key: Any) -> None: ...

    def clear(self) -> None:
        self._may_fail("clear")

    def close(self) -> None:
        self._may_fail("close")


@contextmanager
def running(batch: Any) -> Iterator[engine.Engine]:
    """An engine that answers by a batch."""
    memory = AnswerMemory(0, 0)
    times: Any = None
    works = engine.Engine(batch, 4, Metrics(), times, memory)
    works.start()
    try:
        yield works
    finally:
        works.stop()


def submitted(works: engine.Engine, text: str = "a ?", **job: Any) -> Queue[Any]:
    """What comes of a request."""
    events: Queue[Any] = Queue()
    chat = chat_request.ChatRequest(Request(text, []), VisualBudget(), [], Notes(False))
    works.submit(engine.Job(chat, events.put, **job))
    return events


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("broken", ["clear", "close"])
def test_nobody_waits_for_ever_whatever_ends_the_thread(broken):
    with running(Batch(broken)) as works:
        events = submitted(works)
        assert events.get(timeout=PATIENCE).status == 500  # the step
        if broken == "close":
            works.stop()
        wait_for(lambda: not works.is_alive)
        with pytest.raises(RequestRefusedError, match="the server answers no more"):
            submitted(works)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("broken", ["clear", "close"])
def test_those_who_wait_while_the_thread_ends_get_to_know_it(broken):
    came, go_on = threading.Event(), threading.Event()

    class Slow(Batch):
        def step(self) -> list[Any]:
            came.set()
            assert go_on.wait(PATIENCE)
            return super().step()

    with running(Slow(broken)) as works, ThreadPoolExecutor(1) as other:
        first = submitted(works)
        assert came.wait(PATIENCE)
        second = submitted(works)
        if broken == "close":
            other.submit(works.stop)
            wait_for(lambda: works._stopping)
        go_on.set()
        assert first.get(timeout=PATIENCE).status == 500
        assert second.get(timeout=PATIENCE).status == 503


def test_a_request_that_nobody_waits_for_is_not_read():
    batch = Batch()
    with running(batch) as works:
        submitted(works, "gone ?", is_cancelled=True)
        submitted(works, "there ?").get(timeout=PATIENCE)
    assert batch.added == ["there ?"]


def threads_that_tokenize(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names, encoding = list[str](), Tokenizer.encoding

    def noted(self: Tokenizer, text: str) -> Any:
        names.append(threading.current_thread().name)
        return encoding(self, text)

    monkeypatch.setattr(Tokenizer, "encoding", noted)
    return names


def test_texts_are_tokenized_outside_the_thread_that_computes(loaded, monkeypatch):
    names = threads_that_tokenize(monkeypatch)
    with serve(*loaded) as server:
        assert server.chat(question("how many stars ?", noise(20, 20)), max_tokens=2)
        assert names and "engine" not in names
        names.clear()
        longest = OwnRunningBatch(*loaded).context * OwnRunningBatch(*loaded).longest_token
        status, sentence = server.refusal(question("star " * (1 + longest // 5)), max_tokens=2)
        assert status == 400 and sentence.startswith("the texts have ") and not names


def test_mlx_vlms_processors_run_outside_the_thread_that_computes(host, monkeypatch):
    from mlx_vlm_prune.hosts import running_batch

    names, prepare = list[str](), running_batch.prepare_request

    def noted(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return prepare(*arguments)

    monkeypatch.setattr(running_batch, "prepare_request", noted)
    with serve(*host) as server:
        assert server.chat(question("w7 w9", noise(20, 20)), max_tokens=2)
        assert names and "engine" not in names
        names.clear()
        status, sentence = server.refusal(question("w7 " * 100_000), max_tokens=2)
        assert status == 400 and sentence.startswith("the texts have ") and not names


def alone_and_beside(server: Any, message: Any, bad: Any, **options: Any) -> tuple[str, str]:
    """An answer alone, and while another request fails."""
    alone = text_of(server.chat(message, **options))
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(server.chat, message, **options)
        wait_for(lambda: server.metric("requests_running") == 1)
        status, content = bad()
        assert (status, content["error"]["type"]) == (500, "server_error")
        return alone, text_of(waiting.result())


def test_a_prompt_that_mlx_vlm_cannot_read_ends_alone(host, monkeypatch):
    from mlx_vlm.generate.ar import PromptProcessingBatch

    from mlx_vlm_prune.hosts.running_batch import HostRunningBatch

    generate, is_broken = PromptProcessingBatch.generate, [False]

    def may_fail(self: Any, *arguments: Any, **options: Any) -> Any:
        if is_broken[0]:
            raise RuntimeError("no memory")
        return generate(self, *arguments, **options)

    monkeypatch.setattr(PromptProcessingBatch, "generate", may_fail)
    monkeypatch.setattr(host[1].tokenizer.stopping_criteria, "eos_token_ids", [])
    slow_down(HostRunningBatch, monkeypatch)

    def bad() -> Any:
        is_broken[0] = True
        refusal = server.post(question("w3 w4 w5"), max_tokens=3)
        is_broken[0] = False
        return refusal

    with serve(*host) as server:
        alone, beside = alone_and_beside(
            server, question("w7 w9"), bad, max_tokens=100, temperature=2.0, seed=3
        )
        assert alone == beside != ""
        assert server.chat(question("w3 w4 w5"), max_tokens=3)


def test_an_answer_whose_text_cannot_be_written_ends_alone(loaded, monkeypatch):
    add = AnswerWriter.add

    def may_fail(self: AnswerWriter, token: int) -> Any:
        if self.max_tokens == 7:
            raise ValueError("no text")
        return add(self, token)

    monkeypatch.setattr(AnswerWriter, "add", may_fail)
    slow_down(OwnRunningBatch, monkeypatch)
    with serve(*loaded) as server:
        alone, beside = alone_and_beside(
            server, question("how many stars ?"),
            lambda: server.post(question("yes ?"), max_tokens=7), max_tokens=100,
        )  # fmt: skip
        assert alone == beside != ""


def test_an_answer_ends_where_the_models_context_does(home):
    model, processor = load(home / "tiny", dtype="float32")
    text = replace(model.config.text, max_position_embeddings=64)
    model.config = replace(model.config, text=text)
    message = question("how many stars ?")
    with serve(model, processor) as server:
        first = server.chat(message)  # without a number of its own
        assert first["warnings"] == [] and first["choices"][0]["finish_reason"] == "length"
        rows, tokens = (first["usage"][f"{name}_tokens"] for name in ("prompt", "completion"))
        assert rows + tokens == 65  # the last token is no row
        longer = server.chat(message, max_tokens=LONG)
        assert text_of(longer) == text_of(first)
        sentence = f"max_tokens is {LONG}; behind this prompt the model's context has room for "
        assert longer["warnings"] == [sentence + str(tokens)]
        assert server.refusal(message, max_tokens=LONG, strict=True) == (
            400,
            sentence + str(tokens),
        )
        assert server.chat(message, max_tokens=tokens)["warnings"] == []
        assert server.metric("requests_running") == 0


def test_an_answer_of_mlx_vlms_ends_where_the_models_context_does(host):
    from mlx_vlm_prune.hosts.running_batch import HostRunningBatch

    batch = HostRunningBatch(*host, 4)
    try:
        assert batch.context == 512
        batch.context = 40
        prepared = batch.prepare(Request("w7 w9", [noise(30, 30)], max_tokens=100))
        room = batch.add("a", replace(prepared, request=replace(prepared.request, pruner="none")))
        assert (room.rows, room.max_tokens) == (prepared.rows, 41 - prepared.rows)
    finally:
        batch.close()


def mixed(*parts: Any) -> dict[str, Any]:
    """A message of texts and pictures in this order."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_uri(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


def test_pictures_stay_between_the_words_that_they_stand_between(loaded):
    from mlx_vlm_prune import generate

    one, two = noise(30, 40, 1), noise(40, 30, 2)
    with serve(*loaded) as server:

        def text(*messages: Any) -> str:
            return text_of(server.chat(*messages, max_tokens=24, strict=True))

        first = text(mixed(one, two, "is it red ?"))
        between = text(mixed("is it", one, "red ?", two))
        wanted = [
            generate(*loaded, words, [one, two], max_tokens=24).text
            for words in ("is it red ?", "is it\n<image>\nred ?\n<image>")
        ]
        assert [first, between] == wanted and first != between


def test_mlx_vlms_models_read_pictures_first_and_say_so(host):
    with serve(*host) as server:
        first = server.chat(mixed(noise(30, 40), "w7", "w9"), max_tokens=8)
        behind = server.chat(mixed("w7", noise(30, 40), "w9"), max_tokens=8)
        assert first["warnings"] == [] and text_of(first) == text_of(behind)
        assert "lost their places among" in behind["warnings"][0]
        assert server.refusal(mixed("w7", noise(30, 40), "w9"), strict=True)[0] == 400


def test_detail_low_needs_to_know_which_crops_are_of_an_image(host, monkeypatch):
    from mlx_vlm_prune.hosts.host import Host

    with serve(*host) as server:
        message = question("w7", noise(30, 40), detail="low")
        assert server.chat(message, max_tokens=1)
        monkeypatch.setattr(Host, "knows_images", lambda *_: False)
        assert "do not say which crops" in server.refusal(message, max_tokens=1)[1]


def test_a_batch_says_which_error_was_the_users():
    assert engine.refusal_of(UserError("no")).status == 400
    assert engine.refusal_of(ValueError("no")).status == 500
