"""Promises of mlx-vlm's own options: a cache that forgets rows, options of its processor."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import Chat, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.hosts.compatibility import check_max_kv_size
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prefill import prompt_cache
from mlx_vlm_prune.hosts.prepared_inputs import ProcessorOptions
from mlx_vlm_prune.pruners import plan

from . import host_folders

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
QUESTION, KINDS = "w7 w9", ["llava", "qwen2_5_vl"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return host_folders.desk(tmp_path_factory.mktemp("hosts"), KINDS)


@pytest.fixture(scope="module")
def loaded(home):
    return {name: load(home / name) for name in KINDS}


def test_a_cache_that_forgets_rows_answers_as_mlx_vlms_own(loaded, home):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as stock

    model, processor = loaded["qwen2_5_vl"]
    image = str(home / "a.png")
    text = apply_chat_template(processor, model.config, QUESTION, num_images=1)
    for size in (8, 4096):
        theirs = stock(model, processor, text, image=[image], max_tokens=8, max_kv_size=size,
                       temperature=0.0)  # fmt: skip
        ours = generate(
            model, processor, QUESTION, image=image, max_tokens=8,
            host_options={"max_kv_size": size},
        )  # fmt: skip
        assert ours.text == theirs.text
    for cache in prompt_cache(host_of(model), SimpleNamespace(cache=None, bias_l=None), 8):
        assert (type(cache).__name__, cache.max_size, cache.keep) == ("RotatingKVCache", 8, 4)


@pytest.mark.parametrize("name", KINDS)
def test_it_goes_with_pruning_and_in_a_chat(loaded, home, name):
    options = dict(pruner="norm", keep_ratio=0.5, max_tokens=4)
    image, small = home / "a.png", {"max_kv_size": 6}
    answer = generate(*loaded[name], QUESTION, image=image, host_options=small, **options)
    assert answer.visual_tokens_kept == answer.visual_tokens // 2 and len(answer.token_ids) <= 4
    large = {"max_kv_size": 4096}
    same = generate(*loaded[name], QUESTION, image=image, host_options=large, **options)
    assert same.token_ids == generate(*loaded[name], QUESTION, image=image, **options).token_ids
    chat = Chat(*loaded[name], host_options=large, **options)
    assert chat.ask(QUESTION, image).token_ids == same.token_ids


REFUSED = {
    "max_kv_size is 4; it must be at least 5": ({"max_kv_size": 4}, "norm"),
    "max_kv_size is '9'; it must be a number": ({"max_kv_size": "9"}, "norm"),
    "max_kv_size and kv_bits do not go together": ({"max_kv_size": 9, "kv_bits": 8}, "norm"),
    "max_kv_size is not possible with fastv": ({"max_kv_size": 9}, "fastv"),
    "max_kv_size is not possible with restore": ({"max_kv_size": 9}, "norm+restore"),
    "processor_kwargs is 3; it must be a mapping": ({"processor_kwargs": 3}, "norm"),
    "processor_kwargs is .* must be a mapping": ({"processor_kwargs": {1: 2}}, "norm"),
    "mlx-vlm cannot prepare the images": ({"processor_kwargs": {"images": 1}}, "norm"),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(loaded, home, sentence):
    options, pruner = REFUSED[sentence]
    with pytest.raises(UserError, match=sentence):
        generate(
            *loaded["qwen2_5_vl"], QUESTION, image=home / "a.png", pruner=pruner, keep_ratio=0.5,
            max_tokens=1, host_options=options,
        )  # fmt: skip


def test_a_model_that_makes_its_own_caches_refuses_another_size():
    host = SimpleNamespace(kind="gemma3", language=SimpleNamespace(make_cache=list))
    with pytest.raises(UserError, match="not possible in a gemma3 model"):
        check_max_kv_size(host, plan("norm"), 9)
    check_max_kv_size(host, plan("norm"), None)


def test_the_processor_gets_its_options(loaded, home):
    host, image = host_of(*loaded["llava"]), Image.open(home / "a.png").convert("RGB")
    plain, bare = (
        host.prepare("<image> w7", [image], ProcessorOptions(kwargs=kwargs))
        for kwargs in ({}, {"do_normalize": False})
    )
    assert plain.ids == bare.ids
    pixels = np.array(bare.pixels)
    assert np.array(plain.pixels).min() < 0 <= pixels.min() and pixels.max() <= 1.001


def test_mlx_vlms_own_preparation_gets_them_too(loaded, home, monkeypatch):
    from mlx_vlm import utils

    given, prepare = {}, utils.prepare_inputs
    monkeypatch.setattr(
        utils, "prepare_inputs", lambda *a, **o: given.update(o) or prepare(*a, **o)
    )
    options = {"processor_kwargs": {"max_pixels": 3136}, "resize_shape": [56]}
    generate(*loaded["qwen2_5_vl"], QUESTION, home / "a.png", max_tokens=1, host_options=options)
    assert (given["max_pixels"], given["resize_shape"]) == (3136, (56, 56))


def test_the_command_line_hands_them_on(home, capsys):
    line = ["--model", str(home / "llava"), "-p", QUESTION, "--image", str(home / "a.png")]
    main([*line, "--max-tokens", "1", "--processor-kwargs", '{"do_normalize": false}'])
    main([*line, "--max-tokens", "1", "--max-kv-size", "64", "--enable-thinking"])
    assert "chat template does not read enable_thinking" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*line, "--max-kv-size", "2"])
    assert "--max-kv-size is 2; it must be at least 5" in capsys.readouterr().err
