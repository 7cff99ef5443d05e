"""Promises of `--num-draft-tokens`: the same answers, honest figures, one sentence for the rest."""

import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from convert.__main__ import main as convert
from mlx_vlm_prune import generate, load, stream_generate
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, question_set

from . import llava, tiny
from .test_generate import refused


def test_the_built_in_model_answers_the_same_with_its_twig():
    """Real ends, real drafts: more than half of them right."""
    model, processor = load()
    drafted = accepted = 0
    for scene, several in question_set(HELD_OUT_SEEDS, 3):
        for question in several:
            for options in ({}, {"pruner": "twig", "keep_tokens": 98}):
                plain = generate(model, processor, question.text, scene.image(), **options)
                drafted_answer = generate(
                    model, processor, question.text, scene.image(), num_draft_tokens=5, **options
                )
                assert (
                    drafted_answer.token_ids == plain.token_ids
                    and drafted_answer.text == plain.text
                )
                assert drafted_answer.finish_reason == plain.finish_reason
                assert drafted_answer.generation_tokens == plain.generation_tokens
                assert (plain.drafted, plain.accepted) == (None, None)
                drafted, accepted = (
                    drafted + drafted_answer.drafted,
                    accepted + drafted_answer.accepted,
                )
    assert drafted > 30 and accepted / drafted > 0.5, (drafted, accepted)


def test_a_stream_says_of_each_piece_whether_it_was_drafted():
    model, processor = load()
    scene, (question, *_) = next(question_set(HELD_OUT_SEEDS, 1))
    pieces = [*stream_generate(model, processor, question.text, scene.image(), num_draft_tokens=2)]
    assert not pieces[0].from_draft  # the model itself says the first
    whole = generate(model, processor, question.text, scene.image(), num_draft_tokens=2)
    result = pieces[-1].result
    assert (whole.drafted, whole.accepted) == (result.drafted, result.accepted)
    assert result.drafted >= result.accepted == sum(piece.from_draft for piece in pieces) > 0


@pytest.fixture
def picture(tmp_path):
    scene, _ = next(question_set(HELD_OUT_SEEDS, 1))
    scene.image().save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


def test_the_figures_say_what_was_drafted_and_what_was_right(picture, tmp_path, capsys):
    file = tmp_path / "a.json"
    command = ["--image", picture, "--prompt", "What does the sign say?", "--json", str(file)]
    main([*command, "--pruner", "twig", "--num-draft-tokens", "5"])
    figures = json.loads(file.read_text())
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Drafted: ")]
    share = figures["accepted"] / figures["drafted"]
    assert line == f"Drafted: {figures['drafted']}, accepted {figures['accepted']} ({share:.1%})"
    main([*command, "--num-draft-tokens", "5", "--max-tokens", "1"])
    assert "Drafted: 0, accepted 0\n" in capsys.readouterr().out
    main(command)
    assert "Drafted" not in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures["drafted"] is None and figures["accepted"] is None


def test_the_twigs_rows_are_counted_among_the_caches():
    model, processor = load()
    plain, drafted_answer = (
        generate(model, processor, "how many ?", num_draft_tokens=n, max_tokens=2)
        for n in (None, 1)
    )
    row = 2 * 4 * model.config.text.num_key_value_heads * model.config.text.head_dim
    assert (
        drafted_answer.cache_bytes - plain.cache_bytes == plain.prompt_tokens * row
    )  # a twig of one layer


REFUSED = {
    "none": (["--num-draft-tokens", "0"], "--num-draft-tokens is 0; it must be at least 1"),
    "chance": (["--num-draft-tokens", "5", "--temp", "0.7"], "is for greedy answers, and --temp"),
    "a wish": (
        ["--num-draft-tokens", "5", "--budget-ms", "90", "--pruner", "norm"],
        "do not count what a twig takes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drafted_is_refused_in_a_sentence(picture, capsys, case):
    flags, part = REFUSED[case]
    command = ["--image", picture, "--prompt", "What does the sign say?", *flags]
    assert part in refused(capsys, command)


def test_a_model_without_a_twig_and_one_of_mlx_vlms_are_refused(tmp_path, capsys):
    folder = tiny.checkpoint(tiny.reference(), tmp_path)
    command = ["--model", str(folder), "--prompt", "how many ?", "--num-draft-tokens", "5"]
    assert f"needs a twig, and {folder} has none beside it" in refused(capsys, command)
    with pytest.raises(UserError, match="a model of mlx-vlm's has none"):
        generate(SimpleNamespace(), None, "how many ?", num_draft_tokens=5)


def test_a_published_twig_beside_a_llava_drafts_what_the_llava_says(tmp_path, picture):
    """The twig is LLaVA's own upper layers, norm and output layer, called as TwigVLM calls them."""
    source = llava.write(llava.random_model(), tmp_path / "llava")
    state, twig = load_file(source / "model.safetensors"), {}
    for name, tensor in state.items():
        name = name.removeprefix("language_model.")
        if name.startswith(("model.layers.1.", "model.layers.2.")):
            twig[name.replace("rs.1.", "rs.0.", 1).replace("rs.2.", "rs.1.", 1)] = tensor
        elif name in ("model.norm.weight", "lm_head.weight"):
            twig[name] = tensor
    save_file(twig, tmp_path / "twig.safetensors")
    flags = ["--twig", str(tmp_path / "twig.safetensors"), "--twig-layer", "1"]
    convert(["to-mlx", str(source), str(tmp_path / "mlx"), *flags])
    model, processor = load(tmp_path / "mlx", dtype="float32")
    options = {"image": picture, "max_tokens": 20}
    plain = generate(model, processor, "what is it ?", **options)
    drafted_answer = generate(model, processor, "what is it ?", num_draft_tokens=5, **options)
    assert (
        drafted_answer.token_ids == plain.token_ids
        and drafted_answer.accepted == drafted_answer.drafted > 0
    )
    options |= {"pruner": "twig", "keep_tokens": 9}
    plain = generate(model, processor, "what is it ?", **options)
    drafted_answer = generate(model, processor, "what is it ?", num_draft_tokens=5, **options)
    assert drafted_answer.token_ids == plain.token_ids and drafted_answer.drafted > 0
