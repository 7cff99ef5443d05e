"""Promises of `explore`: a page of full and pruned answers, with what repeats each number."""

import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import explore, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main as generate_main
from mlx_vlm_prune.generation.arguments import build_explore_parser
from mlx_vlm_prune.generation.exploration import ExploredAnswer
from mlx_vlm_prune.generation.steps import likelihood
from mlx_vlm_prune.generation.stream import prepare_prompt
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.scenes import compose

from . import tiny
from .test_exploration import Scripts

PROMPT = "Is there a red star?"
METHODS = ["norm", "sparsevlm", "cls_attention+fastv"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model (`mlx`) and a picture."""
    folder = tmp_path_factory.mktemp("explore")
    tiny.checkpoint(tiny.reference(), folder)
    pixels = np.random.default_rng(0).integers(0, 255, (70, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def command(home, out, *more: str) -> list[str]:
    return [
        "--model", str(home / "mlx"), "--image", str(home / "photo.png"), "--prompt", PROMPT,
        "--max-tokens", "4", "--out", str(out), *more,
    ]  # fmt: skip


def content_of(path) -> dict:
    return json.loads(Scripts(path.read_text(encoding="utf-8")).scripts[0])


@pytest.fixture(scope="module")
def explored(home):
    out = home / "page.html"
    arguments = ["--pruner", *METHODS, "--keep-tokens", "12", "5", "--no-predict", "--allow-url"]
    explore.main(command(home, out, *arguments))
    return content_of(out)


def test_every_method_is_there_at_every_budget_that_it_can_keep(explored):
    pairs = [(row["pruner"], row["budget"]) for row in explored["answers"]]
    assert pairs[0] == ("none", None)
    assert ("norm", {"tokens": 5}) in pairs and ("sparsevlm", {"tokens": 12}) in pairs
    assert len(pairs) + len([r for r in explored["refused"] if "budget" in r]) >= 1 + 6 - 1
    assert explored["command"].startswith("mlx-vlm-prune explore --model ")


def test_the_command_of_each_answer_gives_its_tokens_and_its_text(explored, home, tmp_path):
    for row in explored["answers"]:
        name, verb, *arguments = shlex.split(row["command"])
        assert (name, verb) == ("mlx-vlm-prune", "generate")
        assert "--allow-url" in arguments  # or an image behind an URL would be refused
        arguments[arguments.index("--json") + 1] = str(tmp_path / "answer.json")
        generate_main(arguments)
        written = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
        for figure in ("text", "token_ids", "kept_indices", "visual_tokens_kept", "cache_bytes"):
            assert row[figure] == written[figure], (row["pruner"], figure)
        assert row["steps"][-1]["views"][0]["kept"] == written["kept_indices"][0]


def test_log_probabilities_are_those_of_the_model(explored, home):
    model, processor = load(home / "mlx")
    prepared = prepare_prompt(model, processor, PROMPT, home / "photo.png")
    full = explored["answers"][0]
    for row in explored["answers"][1:]:
        for name, ids in (("full_answer", full["token_ids"]), ("answer", row["token_ids"])):
            for which, spec, K in (
                ("full", "none", model.N),
                ("pruned", row["pruner"], row["budget"]["tokens"]),
            ):
                prefill = model([prepared.prompt], prepared.pixels, plan(spec), K)
                expected = likelihood(prefill, np.array([ids]))[0]
                values = row["logprobs"][name][which]
                assert len(values) == len(ids)
                assert sum(values) == pytest.approx(expected, abs=1e-3)


def test_words_are_those_behind_the_image_and_share_their_attention(explored, home):
    model, processor = load(home / "mlx")
    prepared = prepare_prompt(model, processor, PROMPT, home / "photo.png").prompt
    behind = prepared.ids[sum(prepared.runs[-1]) :]
    wanted = ("sparsevlm", {"tokens": 12})
    row = next(r for r in explored["answers"] if (r["pruner"], r["budget"]) == wanted)
    assert row["words"]
    for each in row["words"]:
        texts = [processor.tokenizer.decode([i]) for i in behind]
        assert [word for word, text in zip(each["words"], texts, strict=True) if text] == [
            *filter(None, texts)
        ]
        assert all(each["words"])  # a special token has a name, if no text
        before = row["steps"][each["step"] - 1]["views"][0]["kept"]
        for attention in each["attention"]:
            present = [i for i, x in enumerate(attention) if x is not None]
            assert present == before and 0 < sum(attention[i] for i in present) <= 1.001
    assert not [r for r in explored["answers"] if r["pruner"] == "norm" and r["words"]]


def test_a_refused_answer_takes_no_other_ones_place(home):
    """The time of all tokens is predicted from the first method whose own time is."""
    cases = [SimpleNamespace(spec=spec, K=5, pipeline=spec) for spec in ("none", "a", "b", "c")]
    known = {"none": None, "b": None, "c": {"total": 2.0}}

    class Fake:
        def explore(self, case, command):
            if case.spec not in known:
                raise UserError("too few tokens")
            return ExploredAnswer(SimpleNamespace(pruner=case.spec), predicted_ms=known[case.spec])

        def predict_full(self, pipeline):
            return {"total": 3.0, "by": pipeline}

    args = build_explore_parser(["norm"], [0.5]).parse_args(["--prompt", "?"])
    answers, refused = explore.explore_all(args, Fake(), cases[0], cases[1:])
    assert [answer.result.pruner for answer in answers] == ["none", "b", "c"]
    assert answers[0].predicted_ms == {"total": 3.0, "by": "c"}
    assert refused == [{"pruner": "a", "tokens": 5, "why": "too few tokens"}]


def test_a_method_is_calibrated_once_and_answers_need_no_calibration(
    home, tmp_path, monkeypatch, capsys
):
    measured = []

    def present(model, processor, pipeline, inputs):
        measured.append(pipeline.spec)
        if pipeline.spec == "norm":
            raise UserError("the machine is busy")
        return SimpleNamespace(ms=lambda K, text, images: {"prefill": 1.0 * K}), 2.0

    monkeypatch.setattr("mlx_vlm_prune.evaluation.predicted_times.present_calibration", present)
    out = tmp_path / "p.html"
    budgets = ["--keep-tokens", "12", "8", "5"]
    explore.main(command(home, out, "--pruner", "avgpool", *budgets))
    assert measured == ["avgpool"]
    explore.main(command(home, out, "--pruner", "norm", "--keep-tokens", "5"))
    assert [row["predicted_ms"] for row in content_of(out)["answers"]] == [None, None]
    assert "note: no time is predicted for norm: the machine is busy" in capsys.readouterr().err


def test_two_images_that_are_the_same_have_their_words_each(home, tmp_path):
    arguments = command(home, tmp_path / "p.html", "--pruner", "mmtok", "--keep-tokens", "5")
    arguments[arguments.index("--prompt") : arguments.index("--prompt")] = [str(home / "photo.png")]
    explore.main([*arguments, "--no-predict"])
    content = content_of(tmp_path / "p.html")
    (row,) = [row for row in content["answers"] if row["pruner"] == "mmtok"]
    places = [(each["step"], each["view"]) for each in row["words"]]
    assert len(content["views"]) == 2 and {view for _, view in places} == {0, 1}
    assert len(places) == len(set(places))


@pytest.mark.parametrize("flag", [["--prompt", "-"], ["-p", "-"], ["--prompt=-"], ["-p-"]])
def test_a_prompt_from_stdin_stands_in_the_commands(flag, home, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("-is it red?\n"))
    out = tmp_path / "p.html"
    explore.main([
        "--model", str(home / "mlx"), "--image", str(home / "photo.png"), *flag, "--pruner",
        "norm", "--keep-tokens", "5", "--max-tokens", "1", "--no-predict", "--out", str(out),
    ])  # fmt: skip
    content = content_of(out)
    assert content["prompt"] == "-is it red?"
    commands = [content["command"], *(row["command"] for row in content["answers"])]
    for words in map(shlex.split, commands):
        assert "--prompt=-is it red?" in words and "-" not in words
    parsed = build_explore_parser(["norm"], [0.5]).parse_args(shlex.split(commands[0])[2:])
    assert parsed.prompt == content["prompt"]


def test_a_prompt_from_stdin_that_is_no_text_is_refused(home, tmp_path, monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"is it \xff red ?"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    arguments = command(home, tmp_path / "p.html", "--pruner", "norm", "--keep-tokens", "5")
    arguments[arguments.index(PROMPT)] = "-"
    with pytest.raises(SystemExit) as stop:
        explore.main([*arguments, "--no-predict"])
    assert stop.value.code == 2 and not [*tmp_path.iterdir()]
    assert capsys.readouterr().err.endswith("error: the prompt is not valid Unicode text\n")


def test_times_are_measured_and_predicted_by_part(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CALIBRATION_SECONDS", "0.1")
    explore.main(command(home, tmp_path / "p.html", "--pruner", "norm", "--keep-ratio", "0.5"))
    for row in content_of(tmp_path / "p.html")["answers"]:
        for times in (row["ttft_ms"], row["predicted_ms"]):
            parts = {part: ms for part, ms in times.items() if part != "total"}
            assert parts.keys() == {"image", "vision", "pruner", "prefill"}
            assert times["total"] >= 0.99 * sum(parts.values()) > 0


def test_a_page_about_a_photograph_says_that_the_model_knows_scenes_only(home, tmp_path):
    out = tmp_path / "photo.html"
    question = ["--image", str(home / "photo.png"), "--prompt", "What is it?", "--max-tokens", "1"]
    budget = ["--pruner", "norm", "--keep-tokens", "49", "--no-predict"]
    explore.main([*question, *budget, "--out", str(out)])
    assert content_of(out)["model"] == "scenes, which knows drawn scenes only"


def test_without_an_image_the_sample_scene_is_explored(tmp_path, capsys):
    out = tmp_path / "scene.html"
    explore.main(["--pruner", "norm", "--keep-ratio", "0.25", "--max-tokens", "3",
                  "--no-predict", "--out", str(out)])  # fmt: skip
    assert capsys.readouterr().out.startswith(f"Wrote {out}: 2 answers, ")
    row = content_of(out)["answers"][1]
    assert row["command"].startswith("mlx-vlm-prune generate --pruner norm --keep-tokens 49 ")
    scene = compose(explore.SAMPLE_SEED).image()
    result = generate(
        *load(), explore.SAMPLE_PROMPT, scene, pruner="norm", keep_tokens=49, max_tokens=3
    )
    assert (row["kept_indices"], row["text"]) == (result.kept_indices, result.text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pruner", "none"], "--pruner none is what all are measured beside; name another"),
        (["--pruner", "nrom"], "argument --pruner: no pruner is called 'nrom'"),
        (["--keep-ratio", "2"], "--keep-ratio is 2.0; it must be above 0 and at most 1"),
        (["--out", "page.png"], "--out is page.png; it is a page, so name it .html"),
        (["--image", "nowhere.png", "--prompt", "x"], "there is no image file nowhere.png"),
        (["--image", "nowhere.png"], "there is no --prompt; give one, or '-' to read it"),
        (["--model", "nowhere", "--prompt", "x"], "there is no --image; give one"),
        (["--prompt", "x"], "there is no --image; give one"),
        (["--prompt", "-"], "there is no --image; give one"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_file(
    arguments, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        explore.main(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and f"error: {sentence}" in err
    assert not [*tmp_path.iterdir()]


PAGE = (Path(__file__).resolve().parents[1] / "docs/explore.md").read_text(encoding="utf-8")


def test_what_docs_explore_says_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose(explore.SAMPLE_SEED).image().save("photo.jpg")
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    name, verb, *arguments = shlex.split(block.replace("\\\n", " "))
    assert (name, verb) == ("mlx-vlm-prune", "explore")
    arguments[arguments.index("--keep-ratio") + 1 : arguments.index("--max-tokens")] = ["0.5"]
    explore.main([*arguments, "--no-predict"])  # a calibration of each method takes seconds
    assert len(content_of(tmp_path / "why.html")["answers"]) == 4
    (tmp_path / "why.html").unlink()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(code, {})
    rows = content_of(tmp_path / "why.html")["answers"]
    assert [row["pruner"] for row in rows] == ["none", "visionzip"]
