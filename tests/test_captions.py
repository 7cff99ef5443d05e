"""Captions: COCO's files, CIDEr-D and ROUGE-L by pycocoevalcap's rules, and whole evaluations."""

import json
import random

import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluate import main
from mlx_vlm_prune.evaluation.questions import (
    BadRecords,
    Source,
    caption_rules,
    captions,
    format_of,
)
from mlx_vlm_prune.evaluation.questions.caption_rules import DocumentFrequencies, References, words
from mlx_vlm_prune.scenes import compose

from . import caption_rivals, generations, host_folders, llava
from .test_generations import converted
from .test_questions import images, read, write

SUBJECTS = "a the two man dog kite red small is riding on holding street beach and of".split()


def made_captions(seed: int, count: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [rng.choices(SUBJECTS, k=rng.randrange(0, 13)) for _ in range(count)]


def made_cases() -> tuple[list[list[str]], list[list[list[str]]]]:
    """200 responses, each with 1 to 5 references, some of them equal to it or empty."""
    rng, responses = random.Random(1), made_captions(2, 200)
    references = []
    for n, response in enumerate(responses):
        several = made_captions(1000 + n, rng.randrange(1, 6))
        references.append([response, *several] if n % 7 == 0 else several)
    return responses, references


def our_cider(responses, references) -> list[float]:
    frequencies = DocumentFrequencies.of(references)
    sets = [References(tuple(map(tuple, several)), frequencies) for several in references]
    return [one.cider(response) for one, response in zip(sets, responses, strict=True)]


def test_cider_is_that_of_another_implementation_on_70_cases():
    responses, references = (cases[:70] for cases in made_cases())
    ours = our_cider(responses, references)
    assert ours == pytest.approx(caption_rivals.cider(responses, references), abs=1e-9)
    assert max(ours) > 4 and min(ours) == 0


def test_cider_and_rouge_are_pycocoevalcaps_on_200_cases():
    reason = "pycocoevalcap, the authors' own program, is not installed"
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason=reason)
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge", reason=reason)
    responses, references = made_cases()
    gts = {n: [" ".join(text) for text in several] for n, several in enumerate(references)}
    res = {n: [" ".join(text)] for n, text in enumerate(responses)}
    _, theirs = cider.Cider().compute_score(gts, res)
    assert our_cider(responses, references) == pytest.approx(theirs.tolist(), abs=1e-9)
    _, theirs = rouge.Rouge().compute_score(gts, res)
    ours = [caption_rules.rouge_l(*pair) for pair in zip(responses, references, strict=True)]
    assert ours == pytest.approx(theirs.tolist(), abs=1e-12)


def test_rouge_l_is_that_of_another_implementation_on_200_cases():
    for response, references in zip(*made_cases(), strict=True):
        theirs = caption_rivals.rouge_l(response, references) if response else None
        ours = caption_rules.rouge_l(response, references)
        assert theirs is None or ours == pytest.approx(theirs, abs=1e-12)


def test_cider_by_hand():
    """Every n-gram is in one image of two, so a caption equal to its reference has cosines of 1,
    for each n that it has."""
    references = [["a red kite flies".split()], ["two dogs run".split()], ["x".split()]]
    assert our_cider([r for (r,) in references], references) == pytest.approx([10, 7.5, 2.5])
    # Half the words, two pairs fewer: single words give 1/sqrt(2), pairs 1/sqrt(3).
    (score, *_) = our_cider(["a red".split(), [], []], references)
    assert score == pytest.approx(10 / 4 * (2**-0.5 + 3**-0.5) * 2.718281828459045 ** (-4 / 72))
    assert our_cider([["x"]], [[["x"]]]) == [0]  # in a single image nothing is rare


def test_rouge_l_by_hand():
    assert caption_rules.rouge_l("a b c d".split(), ["a c".split()]) == pytest.approx(1.22 / 1.72)
    assert caption_rules.rouge_l([], [["a"]]) == 0 and caption_rules.rouge_l([], [[]]) == 1


@pytest.mark.parametrize(
    ("caption", "split"),
    [
        ("A man, riding a wave.", "a man riding a wave"),
        ("A black-and-white dog's t-shirt; it's 3.5 feet", "a black-and-white dog 's t-shirt it 's"
         " 3.5 feet"),
        ("He can't, or cannot, don't", "he ca n't or can not do n't"),
        ('the "STOP" sign -- red (and old)', "the stop sign red -lrb- and old -rrb-"),
        ("At 10:30 in the U.S. with 1,000 & more", "at 10:30 in the u.s. with 1,000 & more"),
        ("", ""),
    ],
)  # fmt: skip
def test_words_are_split_as_stanfords_tokenizer_does_without_punctuation(caption, split):
    assert words(caption) == split.split()


ANNOTATIONS = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A dog."},
        {"image_id": 7, "id": 2, "caption": "A red kite.\n"},
        {"image_id": 9, "id": 3, "caption": "The dog"},
    ],
}


def test_an_image_is_a_question_with_all_its_captions(tmp_path):
    images(tmp_path, "a.jpg", "b.jpg")
    questions = read("captions", write(tmp_path / "captions_val2017.json", ANNOTATIONS))
    assert [(q.id, q.answers, q.text) for q in questions] == [
        ("7", ("A red kite.",), captions.PROMPT), ("9", ("A dog.", "The dog"), captions.PROMPT),
    ]  # fmt: skip
    prepared = format_of("captions").prepare_scoring(questions)
    assert format_of("captions").score(prepared[0], "a red kite") > 5
    assert "(('a', 'red', 'kite'),), 2" in repr(prepared[0].scoring_data)
    files = format_of("captions").upload(questions, ["a kite", "é"], Source(tmp_path))
    assert json.loads(files[".json"]) == [
        {"image_id": 7, "caption": "a kite"}, {"image_id": 9, "caption": "é"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"images": [{"id": 8, "file_name": "a.jpg"}]}, "no annotation has image_id 8"),
        ({"images": [{"id": 7, "file_name": "c.jpg"}]}, "there is no image file"),
        ({"images": [{"file_name": "a.jpg"}]}, "there is no id"),
        ({"images": ["a.jpg"]}, "this is not a JSON object"),
        ({"annotations": [{"image_id": 7, "caption": 3}]}, "annotation 1: caption is a number"),
        ({"annotations": ["A dog"]}, "annotation 1: this is not a JSON object"),
    ],
)
def test_a_bad_record_is_named_and_can_be_left_out(tmp_path, change, why):
    images(tmp_path, "a.jpg", "b.jpg")
    path = write(tmp_path / "c.json", ANNOTATIONS | change)
    with pytest.raises(UserError, match=why):
        read("captions", path)
    read("captions", path, bad := BadRecords(skip=True))
    assert why in bad.messages[0]


@pytest.mark.parametrize("missing", ["images", "annotations"])
def test_a_file_without_a_list_is_refused_at_once(tmp_path, missing):
    path = write(tmp_path / "c.json", ANNOTATIONS | {missing: {}})
    with pytest.raises(UserError, match=f"a list called {missing}"):
        format_of("captions").read(Source(path), BadRecords())


# --- the command ----------------------------------------------------------------------


def write_caption_set(folder, texts: list[list[str]]) -> str:
    """FOLDER/captions.json about drawn scenes, a list of captions for each."""
    records = {"images": [], "annotations": []}
    for n, several in enumerate(texts):
        compose(n).image().save(folder / f"{n}.png")
        records["images"].append({"id": n, "file_name": f"{n}.png"})
        records["annotations"] += [{"image_id": n, "caption": text} for text in several]
    return str(write(folder / "captions.json", records))


def evaluated(folder, model: list[str], *more: str, texts=None) -> dict:
    path = write_caption_set(folder, texts or [[f"w{n} w{n + 1} star", "red w3"] for n in range(4)])
    main([*model, "--questions", path, "--format", "captions", "--pruner", "norm", "--keep-ratio",
          "0.5", "--max-tokens", "6", "--out", str(folder / "e.json"), *more])  # fmt: skip
    return json.loads((folder / "e.json").read_text())


def minimind(folder) -> list[str]:
    return ["--model", str(converted(generations.release("minimind2-v", False), folder))]


def vicuna(folder) -> list[str]:
    return ["--model", str(llava.write(llava.random_model(), folder / "llava"))]


def host(folder) -> list[str]:
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    return ["--model", str(host_folders.checkpoint("qwen2_5_vl", folder))]


MODELS = {"scenes": lambda folder: [], "minimind": minimind, "llava": vicuna, "host": host}


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", MODELS)
def test_captions_are_evaluated_end_to_end(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    result = evaluated(tmp_path, MODELS[name](tmp_path), "--first-token", "2")
    assert (result["metric"], result["unit"], result["count"]) == ("CIDEr", "", 4)
    references = [[words(text) for text in one["answers"]] for one in result["texts"]]
    for p, row in enumerate(result["rows"]):
        responses = [words(one["responses"][p]) for one in result["texts"]]
        scores = caption_rivals.cider(responses, references)
        assert row["overall"] == pytest.approx(25 * sum(scores), abs=1e-3)
        assert set(row["more"]) == {"ROUGE-L", "ROUGE-L full"}
        assert row["first_token_ms"]["p10"] <= row["first_token_ms"]["total"]
    assert result["rows"][0]["more"]["ROUGE-L full"] == 100
    shown = capsys.readouterr().out
    (titles,) = [line for line in shown.splitlines() if line.startswith("pruner ")]
    assert "CIDEr" in titles and "first, ms" in titles
    assert "100 times its mean" in shown
    assert not (tmp_path / "cache" / "evaluations").exists()  # `advise` reads shares


def test_documents_are_the_images_that_were_asked(tmp_path, monkeypatch):
    """The model says what its own captions are, so CIDEr is full's by the references of three."""
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    says = [one["responses"][0] for one in evaluated(tmp_path, [])["texts"]]
    texts = [[text or "x", f"other {n}"] for n, text in enumerate(says)]
    (tmp_path / "e.json").unlink()  # a result of more questions is not replaced
    result = evaluated(tmp_path, [], "--limit", "3", texts=texts)
    references = [[words(text) for text in several] for several in texts[:3]]
    scores = caption_rivals.cider([words(text) for text in says[:3]], references)
    assert result["count"] == 3
    assert result["rows"][0]["overall"] == pytest.approx(100 * sum(scores) / 3, abs=1e-3)
