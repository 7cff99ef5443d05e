"""Promises of the app's models: one folder is one model, and what nobody uses is given up."""

import gc
import weakref
from functools import partial

import mlx.core as mx
import pytest

from mlx_vlm_prune import app
from mlx_vlm_prune.app import open_model
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.arguments import build_app_parser
from mlx_vlm_prune.scenes import CHECKPOINT
from mlx_vlm_prune.webui import BUILT_IN, model_thread
from mlx_vlm_prune.webui.model_thread import Models, ModelThread, OpenModel


@pytest.fixture(scope="module")
def thread():
    return ModelThread()


def test_models_are_shared_and_given_up(thread, tmp_path, monkeypatch):
    read = partial(open_model, build_app_parser().parse_args([]))
    models = Models(thread, thread.run(read, BUILT_IN), read)
    first = models.open(f" {BUILT_IN} ")
    assert models.open(BUILT_IN) is first
    for name, sentence in (
        ("nowhere", "there is no folder nowhere"), ("", "give the folder of a model"),
        (str(tmp_path), "is no checkpoint"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence) as mistake:
            models.open(name)
        assert "\n" not in str(mistake.value)
    (tmp_path / "mine").symlink_to(CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    another = models.open(str(CHECKPOINT))
    for path in ("mine", "./mine", "~/mine", f"{CHECKPOINT}/", f"{CHECKPOINT}/../checkpoint"):
        assert models.open(path) is another is not first
    first_one = weakref.ref(first)
    assert not is_given_up(first_one)
    del first
    assert is_given_up(first_one)
    other_one = weakref.ref(another)
    del another
    assert not is_given_up(other_one)  # the one that was opened last
    first = models.open(BUILT_IN)
    assert is_given_up(other_one) and models.open(BUILT_IN) is first


def is_given_up(model: weakref.ref) -> bool:
    gc.collect()
    return model() is None


def test_every_model_has_the_dtype_of_the_command_line(thread):
    args = build_app_parser().parse_args(["--model", str(CHECKPOINT), "--dtype", "bfloat16"])
    for name in (str(CHECKPOINT), BUILT_IN, f"{CHECKPOINT}/"):
        assert thread.run(open_model, args, name).model.dtype == mx.bfloat16


def test_the_first_model_is_opened_again_with_all_that_the_command_line_says(thread, monkeypatch):
    arguments = ["--model", "./mine", "--revision", "v1", "--adapter-path", "mine-adapters"]
    args, loaded = build_app_parser().parse_args(arguments), []
    reading = lambda *a, **options: loaded.append((a, options)) or (1, 2)  # noqa: E731
    monkeypatch.setattr("mlx_vlm_prune.hosts.loading.load", reading)
    monkeypatch.setattr(app, "warmed", lambda name, *model: OpenModel(name, *model, dict))
    monkeypatch.setattr(model_thread, "place_of", lambda name: name.removeprefix("./"))
    again = partial(open_model, args)
    models = Models(thread, again(app.first_name(args)), again)
    models.open(BUILT_IN)
    gc.collect()
    assert models.open("mine").name == "./mine"
    adapted = {"dtype": "auto", "revision": "v1", "adapter_path": "mine-adapters"}
    first = (("./mine",), adapted)
    assert loaded == [first, ((), {"dtype": "auto"}), first]
