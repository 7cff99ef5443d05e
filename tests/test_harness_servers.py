"""Promises of docs/evaluation.md: what lmms-eval's `openai` model and VLMEvalKit send is answered.

Both are reproduced from their code: lmms-eval 0.7.3 (`models/chat/openai.py`) by the same client,
VLMEvalKit at e8e78f05 (`vlmeval/api/lmdeploy.py`, `openai_sdk.py`) by the same body.
"""

import json
import re
import shlex
from typing import Any

import pytest

pytest.importorskip("openai", reason="openai's client is not installed")

import openai

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.serving.request_schema import ChatBody

from .entry_points import ROOT
from .serving import data_uri, serve

PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
QUESTION, PICTURE = "What does the sign say?", compose(1_000_000_007).image()
PRUNED = {"pruner": "divprune", "keep_ratio": 0.25}


def command(start: str) -> list[str]:
    """The words of the page's command that starts so."""
    text = "\n".join(re.findall(r"```(?:ba)?sh\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return shlex.split(line)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def content(kind: str = "PNG") -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": data_uri(PICTURE, kind)}}
    return [image, {"type": "text", "text": QUESTION}]


@pytest.fixture(scope="module")
def scenes():
    return load()


def test_lmms_evals_openai_model_is_answered_as_generate_answers(scenes):
    arguments = dict(
        pair.split("=", 1)
        for pair in option(command("lmms-eval eval --model openai"), "--model_args").split(",")
    )
    assert arguments.pop("num_concurrent") == "1"
    with serve(*scenes, method="divprune", is_pruning=True, keep_ratio=0.25) as server:
        place = arguments["base_url"].replace("8080", str(server.port))
        with openai.OpenAI(api_key=arguments["api_key"], base_url=place) as client:
            answer = client.chat.completions.create(
                messages=[{"role": "user", "content": content()}], model=arguments["model"],
                max_tokens=16, temperature=0, top_p=1.0,
            )  # fmt: skip
    assert answer.choices[0].message.content == generate(*scenes, QUESTION, PICTURE, **PRUNED).text
    assert answer.usage.prompt_tokens > 49 and not getattr(answer, "warnings", None)


def test_vlmevalkits_body_is_answered_by_the_fields_of_its_extra_body(scenes):
    words = command("python run.py")
    extra = json.loads(option(words, "--extra-body"))
    assert extra.keys() <= ChatBody.model_fields.keys() and option(words, "--api-nproc") == "1"
    more = {"max_tokens": int(option(words, "--max-tokens")), "n": 1, **extra}
    more |= {
        "model": option(words, "--model"),
        "temperature": float(option(words, "--temperature")),
    }
    with serve(*scenes) as server:
        answer = server.chat({"role": "user", "content": content()}, strict=True, **more)
        greeting = [{"type": "text", "text": "hello"}]  # by which it asks whether a model works
        assert server.chat({"role": "user", "content": greeting}, **more)["choices"]
    budget = {"keep_tokens": extra["visual_tokens"], "max_tokens": more["max_tokens"]}
    expected = generate(*scenes, QUESTION, PICTURE, pruner=extra["pruner"], **budget)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["visual_tokens_kept"] == extra["visual_tokens"]
