"""Promises of scenes as training data: the same in every format, never what is judged on."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.scenes_data import MORE_KINDS, ODDS, VALID_SEEDS, highest, main
from mlx_vlm_prune.evaluation.questions import BadRecords, Source, format_of
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, KINDS, TRAIN_SEEDS, Scene, Thing, compose, pages
from mlx_vlm_prune.training.formats import open_dataset, split_files


def written(folder, capsys, *options):
    main(["--out", str(folder), "--examples", "6", "--valid", "2", *options])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_format_holds_the_same_turns_and_pixels_and_the_same_again(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="pyarrow writes parquet files")
    figures = [
        written(tmp_path / name, capsys, "--format", name.split("-")[0])
        for name in ("minimind", "llava", "jsonl", "jsonl-again")
    ]
    assert figures[0]["train"] == figures[1]["train"] == figures[2]["train"]
    folders = [tmp_path / name for name in ("minimind", "llava", "jsonl")]
    for split in ("train", "valid"):
        data = [open_dataset(split_files(folder)[split]) for folder in folders]
        for n in range(len(data[0])):
            turns, *others = [dataset[n].turns for dataset in data]
            assert turns[0][0].startswith("<image>\n") and len(turns) > 1
            assert others == [turns, turns]
            pictures = [np.asarray(open_image(dataset[n].images[0])) for dataset in data]
            assert all((picture == pictures[0]).all() for picture in pictures)
    again = [
        sorted(p for p in f.rglob("*") if p.is_file())
        for f in (folders[2], tmp_path / "jsonl-again")
    ]
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(*again, strict=True)] == [True] * 10


def test_its_scenes_are_held_out_from_each_other_and_from_what_is_judged(tmp_path, capsys):
    written(tmp_path / "d", capsys, "--format", "llava")
    seeds = {
        split: {
            int(record["id"]) for record in json.loads((tmp_path / f"d/{split}.json").read_text())
        }
        for split in ("train", "valid")
    }
    assert seeds["train"] <= set(range(20)) and all(seed in VALID_SEEDS for seed in seeds["valid"])
    assert VALID_SEEDS.stop <= TRAIN_SEEDS.stop <= HELD_OUT_SEEDS.start
    with Image.open(tmp_path / "d/images/0.png") as picture:
        assert (np.asarray(picture) == np.asarray(compose(0).image())).all()


def test_single_questions_of_a_new_kind_can_be_evaluated_too(tmp_path, capsys):
    figures = written(
        tmp_path / "d", capsys, "--format", "jsonl", "--kinds", "farthest", "--turns", "1"
    )
    assert figures["train"]["questions"] == {"farthest": 6}
    questions = list(format_of("own").read(Source(tmp_path / "d/train.jsonl"), BadRecords()))
    assert [q.kind for q in questions] == ["farthest"] * 6
    for question in questions:
        scene = compose(int(question.image.stem))
        far = max(scene.things, key=lambda t: (t.x - scene.sign.x) ** 2 + (t.y - scene.sign.y) ** 2)
        assert question.answers == (far.shape,)
    assert set(MORE_KINDS) < set(ODDS)


def test_questions_may_be_examples_of_their_own(tmp_path, capsys):
    turns, single = ([], ["--separate"])
    figures = [
        written(tmp_path / f"{n}", capsys, "--format", "llava", *options)
        for n, options in enumerate((turns, single))
    ]
    assert figures[0]["train"] == figures[1]["train"]
    packed, alone = (open_dataset(tmp_path / f"{n}/train.json") for n in range(2))
    assert len(packed) == 6
    pairs = [pair for n in range(6) for pair in packed[n].turns]
    assert [turn[1] for turn in pairs] == [alone[n].turns[0][1] for n in range(len(alone))]


def test_a_kind_may_be_asked_about_every_scene_by_any_number_of_processes(tmp_path, capsys):
    options = ("--format", "jsonl", "--separate", "--turns", "2", "--always", "farthest")
    figures = [
        written(tmp_path / workers, capsys, *options, "--workers", workers) for workers in "12"
    ]
    assert figures[0]["train"] == figures[1]["train"]
    assert figures[0]["train"]["questions"]["farthest"] == figures[0]["train"]["pictures"] == 6
    assert sum(figures[0]["train"]["questions"].values()) > 6
    first, second = ((tmp_path / workers / "train.jsonl").read_bytes() for workers in "12")
    assert first == second


def test_pages_and_scenes_take_turns(tmp_path, capsys):
    options = (
        "--format",
        "jsonl",
        "--turns",
        "3",
        "--separate",
        "--kinds",
        "total",
        "cell",
        "word",
    )
    figures = written(tmp_path / "d", capsys, *options, "--world", "scenes", "pages")
    lines = [json.loads(line) for line in (tmp_path / "d/train.jsonl").read_text().splitlines()]
    assert len({line["image"] for line in lines}) == figures["train"]["pictures"] == 6
    for line in lines:
        seed = int(line["image"].removeprefix("images/").removesuffix(".png"))
        is_page = seed % 2 == 1
        assert line["kind"] in (("total", "cell", "word") if is_page else (*KINDS, "content"))
        drawn = pages.draw(pages.compose(seed, pages.SMALL)) if is_page else compose(seed).image()
        with Image.open(tmp_path / "d" / line["image"]) as picture:
            assert (np.asarray(picture) == np.asarray(drawn)).all()
    for more, sentence in (
        (["--world", "pages", "--kinds", "colour"], "colour is no question about pages; there are"),
        (["--always", "total"], "total is no question about scenes; there are existence"),
        (["--world", "scenes", "pages", "--always", "total"], "always is for one world"),
    ):
        with pytest.raises(SystemExit, match="2"):
            written(tmp_path / "none", capsys, *more)
        assert sentence in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_highest_shape_is_clearly_higher_than_the_next():
    star, heart = (
        Thing(shape, "red", "A1", 50, y, 10, 0) for shape, y in (("star", 30), ("heart", 42))
    )
    rng = np.random.default_rng(0)
    assert highest(Scene(0, (heart, star), None), rng).answer == "star"
    near = replace(star, y=31)
    assert highest(Scene(0, (heart, near), None), rng) is None
    assert highest(Scene(0, (star,), None), rng) is None


def test_a_folder_that_exists_is_not_written_over(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        written(tmp_path, capsys)
    assert "exists" in capsys.readouterr().err and not list(tmp_path.iterdir())
