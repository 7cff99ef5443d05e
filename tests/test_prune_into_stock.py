"""Promises of `prune-into` about mlx-vlm's own command line, for every family that it offers.

Its words are those of our own `generate`, on the folder that was not pruned.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mlx_vlm_prune import generate, load, pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.families import FAMILIES
from mlx_vlm_prune.hosts.llava_processor import ImagesAlone
from mlx_vlm_prune.hosts.pruned_folder import prune_into

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from packaging.version import Version

from . import host_folders, into_folders, llava, stock_folders

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
QUESTION, TOKENS = "w7 w9", 5


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    host_folders.picture(folder, "a.png", 120, 90)
    with into_folders.fastvlm_sizes():
        yield folder


def test_every_family_is_here():
    other_names = {"fastvlm", "lfm2-vl"}  # no config.json says the first, older ones the second
    assert {*FAMILIES} - other_names == {*stock_folders.FAMILIES}


def answer_of_the_command_line(folder: Path, picture: Path, capsys, monkeypatch) -> str:
    from mlx_vlm.generate.cli import main

    words = ["--model", str(folder), "--image", str(picture), "--prompt", QUESTION]
    words += ["--max-tokens", str(TOKENS), "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["mlx_vlm.generate", *words])
    capsys.readouterr()
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize("family", stock_folders.FAMILIES)
def test_the_stock_command_line_answers_as_ours(home, family, capsys, monkeypatch):
    source = stock_folders.checkpoint(family, home)
    prune_into(source, home / f"{family}-pruned", "divprune", 0.25)
    picture = home / "a.png"
    try:
        out = answer_of_the_command_line(home / f"{family}-pruned", picture, capsys, monkeypatch)
    except ValueError as problem:
        if "dependencies: torchvision" not in str(problem):
            raise
        pytest.skip("this transformers makes the processor by torchvision, which is not installed")
    expected = generate(
        *load(source), QUESTION, picture, pruner="divprune", keep_ratio=0.25, max_tokens=TOKENS
    )
    assert expected.visual_tokens_kept < expected.visual_tokens
    assert expected.text.strip() and expected.text.strip() in out


def test_a_block_with_its_processor_makes_a_llava_answer_as_ours(home, monkeypatch):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as theirs
    from mlx_vlm.utils import load as load_theirs

    source, picture = home / "llava", home / "a.png"
    model, processor = load_theirs(str(source))
    before = type(processor.image_processor)
    text = apply_chat_template(processor, model.config, QUESTION, num_images=1)
    options = {"image": str(picture), "max_tokens": TOKENS, "temperature": 0.0}
    with pruned(model, "divprune", keep_ratio=0.25, processor=processor) as report:
        answer = theirs(model, processor, text, **options)
    expected = generate(
        *load(source), QUESTION, picture, pruner="divprune", keep_ratio=0.25, max_tokens=TOKENS
    )
    assert answer.token_ids == expected.token_ids and report.prompts[-1].kept == [4]
    assert type(processor.image_processor) is before
    ours, our_processor = load(source)  # which needs no word about its processor
    with pruned(ours, "divprune", keep_ratio=0.25):
        assert theirs(ours, our_processor, text, **options).token_ids == expected.token_ids


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.20"),
    reason="older ones need no mending",
)
def test_a_block_without_its_processor_says_what_a_llava_needs(home):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as theirs
    from mlx_vlm.utils import load as load_theirs

    model, processor = load_theirs(str(home / "llava"))
    text = apply_chat_template(processor, model.config, QUESTION, num_images=1)
    picture, options = str(home / "a.png"), {"max_tokens": 1, "temperature": 0.0}
    with (
        pytest.raises(UserError, match=r"fails with this .* pruned\(model, …, processor=processor"),
        pruned(model, "divprune", keep_ratio=0.25),
    ):
        theirs(model, processor, text, picture, **options)
    for problem in (TypeError("an unexpected keyword argument 'speed'"), ValueError("padding")):
        with pytest.raises(type(problem)) as caught, pruned(model, "norm", keep_ratio=0.25):
            raise problem
        assert caught.value is problem
    with pruned(model, "divprune", keep_ratio=0.25, processor=processor):  # it is as before
        assert theirs(model, processor, text, picture, **options).text


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.20"),
    reason="older ones need no mending",
)
def test_only_processors_of_pruned_folders_are_mended(home):
    from mlx_vlm.utils import load as load_theirs

    mended = [
        isinstance(load_theirs(str(home / name))[1].image_processor, ImagesAlone)
        for name in ("llava-pruned", "llava")
    ]
    assert mended == [True, False]


@pytest.mark.parametrize("layout", llava.RENAMED)
def test_a_llava_is_written_where_mlx_vlm_loads_it_and_refused_elsewhere(layout, tmp_path):
    from mlx_vlm.utils import load_model

    source = llava.write(llava.random_model(), tmp_path / "source", layout)
    try:
        load_model(source)
    except Exception:
        with pytest.raises(
            UserError, match=r"mlx-vlm cannot load it, since it has .*; such a fold"
        ):
            prune_into(source, tmp_path / "pruned", "divprune", 0.5)
        assert not (tmp_path / "pruned").exists()
    else:
        prune_into(source, tmp_path / "pruned", "divprune", 0.5)
        load_model(tmp_path / "pruned")
