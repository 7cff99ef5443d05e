"""Promises about mlx-vlm folders from strangers: bounded, or refused in one sentence."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints import tokenizer_trial
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs
from mlx_vlm_prune.hosts.running_batch import HostRunningBatch

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune.hosts.families import host_of

from . import host_folders, host_models
from .limited import run_limited
from .test_hostile_tokenizers import BACK

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
LONG = "{{ 'x' * 9999999 }}"  # 10 MB, quickly


@pytest.fixture
def folder(tmp_path) -> Path:
    return host_folders.checkpoint("qwen3_vl", tmp_path)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def listed(folder: Path, text: str) -> None:
    """Several templates, as older files have them."""
    entries = [{"name": "rag", "template": "w7"}, {"name": "default", "template": text}]
    edit(folder / "tokenizer_config.json", chat_template=entries)


def in_files(folder: Path, text: str) -> None:
    """Several templates, each in its file."""
    edit(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").write_text(text)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("w7")


@pytest.mark.parametrize("write", [listed, in_files])
def test_the_template_that_is_taken_of_several_is_bounded(write, folder):
    write(folder, "w7")
    assert generate(*load(folder), "w9", max_tokens=1).prompt_tokens == 1
    for file in folder.glob("*/*.jinja"):
        file.unlink()
        file.parent.rmdir()
    write(folder, LONG)
    with pytest.raises(UserError, match="the chat template of this qwen3_vl model is refused"):
        generate(*load(folder), "w9", max_tokens=1)


def test_the_template_that_a_caller_names_is_bounded_too(folder):
    entries = [{"name": "rag", "template": LONG}, {"name": "default", "template": "w7"}]
    edit(folder / "tokenizer_config.json", chat_template=entries)
    model, processor = load(folder)
    for name in ("rag", LONG):
        with pytest.raises(UserError, match="model is refused"):
            generate(model, processor, "w9", chat_template_config={"chat_template": name})


def vocabulary(folder: Path, change: Any) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = change(words)
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda words: words | {f"more{i}": 64 + i for i in range(9)}, "has a word 72"),
        (lambda words: {w: i for w, i in words.items() if i < 9 or i > 58}, r"has \d+ words"),
    ],
)
def test_another_models_tokenizer_is_refused_when_it_is_loaded(change, sentence, folder):
    vocabulary(folder, change)
    with pytest.raises(UserError, match=f"its tokenizer {sentence}, and the model's vocabulary 64"):
        load(folder)


def test_a_token_without_an_embedding_is_refused_in_a_prompt(folder):
    """A token may be added beyond the words; MLX would read whatever lies there."""
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {**content["added_tokens"][0], "id": 64, "content": "w99"}
    edit(folder / "tokenizer.json", added_tokens=[*content["added_tokens"], token])
    model, processor = load(folder)
    with pytest.raises(UserError, match="the prompt has token 64; the model's vocabulary has 64"):
        generate(model, processor, "w7 w99", max_tokens=1)


@pytest.mark.parametrize(("ids", "token"), [([-200, 3], None), ([3, 64], 64), ([-7, 3], -7)])
def test_placeholders_need_no_embedding(ids, token):
    """FastVLM's is -200."""
    host = host_of(host_models.fastvlm())
    assert host.model.config.image_token_index == -200
    inputs = PreparedInputs(ids, mx.ones((1, len(ids))), None, 0)
    if token is None:
        host.check_ids(inputs)
        return
    with pytest.raises(UserError, match=f"the prompt has token {token}; the model's vocabulary"):
        host.check_ids(inputs)


def test_a_prompt_is_tried_first_where_the_tokenizer_may_be_slow(folder, monkeypatch):
    split = {"type": "Split", "pattern": {"Regex": BACK}, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", pre_tokenizer=split)
    model, processor = load(folder)
    started: list[Any] = []
    stock = subprocess.Popen

    def start(*command: Any, **options: Any) -> Any:
        started.append(command)
        return stock(*command, **options)

    monkeypatch.setattr(tokenizer_trial, "SECONDS", 2)
    monkeypatch.setattr(subprocess, "Popen", start)
    for _ in range(2):
        generate(model, processor, "w7", max_tokens=1)
    assert len(started) == 1  # the same text is tried once
    with pytest.raises(UserError, match=str(folder / "tokenizer.json")):
        generate(model, processor, "a" * 45 + "!", max_tokens=1)


def test_a_text_that_the_tokenizer_fails_on_is_one_sentence(folder):
    """The library raises a bare Exception."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit(folder / "tokenizer.json", model=model | {"unk_token": "?"})
    loaded = load(folder)
    for options in ({}, {"eos_tokens": ["xyz"]}):
        with pytest.raises(UserError, match="WordLevel error: Missing") as e:
            generate(*loaded, "w7" if options else "xyz", max_tokens=1, **options)
        assert "\n" not in str(e.value)


def test_only_files_that_are_read_are_looked_at(folder):
    with (folder / "train.json").open("wb") as file:
        file.truncate(200 << 20)
    os.mkfifo(folder / "notes.txt")
    load(folder)
    with (folder / "generation_config.json").open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(UserError, match=r"generation_config\.json has 209715200 bytes; at most"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_tokens", ["w7"]), ("sampler", lambda logprobs: logprobs),
        ("logits_processors", [lambda tokens, logits: logits]), ("host_options", {"kv_bits": 8}),
    ],
)  # fmt: skip
def test_a_batch_refuses_what_it_would_leave_out(folder, name, value):
    batch = HostRunningBatch(*load(folder), most_answers=2)
    try:
        request = Request("w7", [], **{name: value})
        for ask in (batch.check, lambda request: batch.add("k", batch.prepare(request))):
            with pytest.raises(UserError, match=f"{name} is not possible in a batch"):
                ask(request)
        assert len(batch) == 0
    finally:
        batch.close()


@pytest.mark.parametrize(
    ("file", "fields", "sentence"),
    [
        ("config.json", {"video_token_id": 1 << 31}, "video_token_id is 2147483648; at most 2147"),
        ("preprocessor_config.json", {"temporal_patch_size": 1}, "do not fit each other: "),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(folder, file, fields, sentence):
    host_folders.picture(folder, "a.png", 80, 90)
    edit(folder / file, **fields)
    with pytest.raises(UserError, match=sentence) as e:
        generate(*load(folder), "w7", folder / "a.png", max_tokens=1)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700


@pytest.mark.parametrize("template", [7, "{{ raise_exception('no') }}", "{% for %}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_one_sentence(folder, template):
    edit(folder / "tokenizer_config.json", chat_template=template)
    model, processor = load(folder)
    for system in (None, "w3"):
        with pytest.raises(
            UserError, match="the chat template of this qwen3_vl model fails: "
        ) as e:
            generate(model, processor, "w7", system=system)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("part", "name"), [("text_config", "num_hidden_layers"), ("vision_config", "depth")]
)
def test_layers_are_counted_before_they_are_made(folder, part, name):
    """mlx-vlm makes them one by one, and looks at the weights afterwards."""
    file = folder / "config.json"
    inner = json.loads(file.read_text())[part]
    for number in (10**4, 10**9, 10**400):
        edit(file, **{part: inner | {name: number}})
        with pytest.raises(UserError, match=rf"config.json: {name} is 1000.*; at most 512 is") as e:
            load(folder)
        assert len(str(e.value)) < 300


FUZZ = """
import copy, json, random, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from tests.test_hostile_configs import ODD, places
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError

folder, draw, counts = Path(sys.argv[1]), random.Random(20), {"read": 0, "refused": 0}
names = ("config", "tokenizer_config", "preprocessor_config", "generation_config")
files = [folder / f"{name}.json" for name in names]
whole = {file: file.read_text() for file in files}
for case in range(int(sys.argv[2])):
    file = draw.choice(files)
    content = json.loads(whole[file])
    *above, key = draw.choice([*places(content)])
    inner = content
    for name in above:
        inner = inner[name]
    inner[key] = copy.deepcopy(draw.choice(ODD))
    file.write_text(json.dumps(content))
    try:
        generate(*load(folder), "w7", folder.parent / "a.png", max_tokens=2)
        counts["read"] += 1
    except UserError as e:
        assert "\\n" not in str(e) and len(str(e)) < 900, e
        counts["refused"] += 1
    except BaseException as e:
        raise AssertionError((case, file.name, above, key, str(inner[key])[:50])) from e
    file.write_text(whole[file])
print(counts["read"], counts["refused"])
"""


def test_configs_of_mlx_vlms_models_are_read_or_refused_within_limits(tmp_path):
    folder = host_folders.desk(tmp_path, ["qwen3_vl"]) / "qwen3_vl"
    (folder / "generation_config.json").write_text('{"eos_token_id": 63, "temperature": 0.5}')
    read, refused = run_limited(FUZZ, folder, 150, seconds=120, gigabytes=16).split()
    assert int(read) > 10 and int(refused) > 10
