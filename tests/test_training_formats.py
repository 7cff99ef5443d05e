"""Promises of training data's formats: what is read of a file, and which one is refused."""

import json

import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.training.formats import llava as llava_format
from mlx_vlm_prune.training.formats import minimind as minimind_format
from mlx_vlm_prune.training.formats import open_dataset, split_files

from .training_examples import png, talk, write_lines, write_rows


def test_three_formats_and_both_vocabularies_give_the_same_examples(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    conversation = ("<image>\nWhat?", "A 猫.", "And?", "No.")
    theirs = talk(*conversation, keys=("from", "value"), speakers=("human", "gpt"))
    lines = [{"image": "a.png", "conversations": talk(*conversation)},
           {"images": ["a.png"], "conversations": theirs}]  # fmt: skip
    files = [
        write_lines(tmp_path / "own.jsonl", lines),
        tmp_path / "llava.json",
        write_rows(tmp_path / "m.parquet", [json.dumps(talk(*conversation))] * 2, [png()] * 2),
    ]
    files[1].write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": theirs}] * 2))
    turns = (("<image>\nWhat?", "A 猫."), ("And?", "No."))
    for file in files:
        dataset = open_dataset(file)
        assert len(dataset) == 2
        for n in (1, 0):
            assert dataset[n].turns == turns, file
            (picture,) = dataset[n].images
            assert open_image(picture).size == (8, 8)
            assert str(file) in dataset[n].where and str(n + 1) in dataset[n].where


def test_a_record_may_have_no_image_several_a_question_alone_or_a_system_turn(tmp_path):
    for name in ("a.png", "b,c.png"):
        (tmp_path / name).write_bytes(png())
    records = [
        {"conversations": [{"role": "system", "content": "Brief."}, *talk("Hi", "Ho")]},
        {"images": ["a.png", "b,c.png"], "question": "Same?", "answer": ["no", "never"]},
        {"image": "a.png, a.png", "messages": talk("Same?", "yes")},
        {"image": "b,c.png", "question": "What?", "answer": "x"},
        {"images": [], "question": "What?", "answer": "x"},
    ]
    read = list(map(open_dataset(write_lines(tmp_path / "q.jsonl", records)).__getitem__, range(5)))
    assert (read[0].system, read[0].images, read[0].turns) == ("Brief.", (), (("Hi", "Ho"),))
    assert [len(e.images) for e in read] == [0, 2, 2, 1, 0]
    assert read[1].turns == (("Same?", "no"),)


def test_what_stands_before_the_first_question_and_after_the_last_answer_is_left_out(tmp_path):
    record = {"conversations": [*talk("Hi.", speakers=("assistant",)), *talk("One?", "1", "Two?")]}
    (read,) = [open_dataset(write_lines(tmp_path / "q.jsonl", [record]))[0]]
    assert read.turns == (("One?", "1"),)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ({"question": "Q"}, "there is no answer"),
        ({"image": "no.png", "question": "Q", "answer": "A"}, r"no image file .*no\.png"),
        ({"image": 3, "question": "Q", "answer": "A"}, "image is a number"),
        ({"image": "", "question": "Q", "answer": "A"}, "image is empty"),
        ({"images": [""], "question": "Q", "answer": "A"}, "name of an image is empty"),
        ({"conversations": "Q"}, "not a list of turns"),
        ({"conversations": []}, "no question has an answer"),
        ({"conversations": talk("Q", "A", speakers=("user", "tool"))}, "'tool'; it may be user"),
        ({"conversations": [*talk("Q", "A"), *talk("A")[:0], *talk("A", speakers=("gpt",)),
                            *talk("Q", "A")]}, "do not alternate"),
        ({"conversations": [*talk("Q", "A"), {"role": "system", "content": "S"},
                            *talk("Q", "A")]}, "a system turn does not stand first"),
        ({"conversations": talk("Q", " ")}, "content is empty"),
        ({"conversations": [{"role": "user", "content": ["Q"]}]}, "content is a list"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path, record, fault):
    path = write_lines(tmp_path / "q.jsonl", [{"question": "Q", "answer": "A"}])
    text = record if isinstance(record, str) else json.dumps(record)
    path.write_text("{}\n\n" + text + "\n")
    with pytest.raises(UserError, match=rf"q\.jsonl, line 3: .*{fault}"):
        open_dataset(path)[1]


def test_a_json_list_is_indexed_piece_by_piece(tmp_path, monkeypatch):
    """Signs of several bytes, brackets in texts, a byte order mark; records longer than a piece."""
    texts = ['a ] , [ { \\ " 猫', "🐼‍❄️ }", "\u2028 x" * 9, "b"]
    records = [{"conversations": talk("Q", text.strip())} for text in texts]
    monkeypatch.setattr(llava_format, "CHUNK", 7)
    for ascii_only, mark, indent in ((True, "", None), (False, "\ufeff", 1)):
        text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
        (tmp_path / "l.json").write_text(mark + text, "utf-8")
        dataset = open_dataset(tmp_path / "l.json")
        assert [dataset[n].turns[0][1] for n in range(4)] == [text.strip() for text in texts]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[", "record 1 is not valid JSON"),
        ('[{"a": 1}', "record 1 is not followed by"),
        ('[{"a": 1} {"a": 2}]', "record 1 is not followed by"),
        ('[{"a": 1}, {"a": 2', "record 2 is not valid JSON"),
        ('[{"a": 1}, ]', "record 2 is not valid JSON"),
        ("[" + "[" * 100_000, "record 1 is nested too deeply"),
        ("[]", "holds no examples"),
        ("", "holds no examples"),
        ("x", "format of .* is unknown"),
    ],
)
def test_a_file_that_is_no_json_list_is_refused_at_once(tmp_path, text, fault):
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(UserError, match=fault):
        open_dataset(tmp_path / "l.json")


def test_llavas_mark_stands_first_in_its_turn_as_in_its_training(tmp_path):
    (tmp_path / "a.jpg").write_bytes(png())
    turns = talk("What is this?\n<image>", "x", keys=("from", "value"), speakers=("human", "gpt"))
    path = tmp_path / "l.json"
    path.write_text(json.dumps([{"image": "a.jpg", "conversations": turns}]))
    assert open_dataset(path)[0].turns == (("<image>\nWhat is this?", "x"),)


def test_parquet_rows_are_read_at_random_and_few_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(minimind_format, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(minimind_format, "HELD_BLOCKS", 3)
    rows = [json.dumps(talk(f"<image>\nQ{n}", f"A{n}")) for n in range(100)]
    pictures = [png(n, (40, 40)) for n in range(100)]
    for size in (7, 40, 100):
        path = write_rows(tmp_path / f"{size}.parquet", rows, pictures, row_group_size=size)
        dataset = open_dataset(path)
        assert [n for group in dataset.blocks for rows in group for n in rows] == list(range(100))
        assert len(dataset.ranges) > 4
        for n in np.random.permutation(100).tolist():
            assert dataset[n].turns == ((f"<image>\nQ{n}", f"A{n}"),)
            assert dataset[n].images == (pictures[n],)
            assert len(dataset.held) <= 3


def test_a_row_may_have_several_images_or_a_placeholder_without_a_mark(tmp_path):
    rows = [talk("<image> and <image>", "x"), talk("Hi", "Ho"), talk("<image>", "x"), [{"role": 1}]]
    lists = [[png(), png()], [png()], [], [png()]]
    dataset = open_dataset(write_rows(tmp_path / "m.parquet", list(map(json.dumps, rows)), lists))
    assert [len(dataset[n].images) for n in (0, 1)] == [2, 0]
    with pytest.raises(UserError, match="row 3: image_bytes hold no image"):
        dataset[2]
    with pytest.raises(UserError, match="row 4: role is a number"):
        dataset[3]


def test_a_folder_has_a_file_to_train_on_and_one_to_evaluate_by(tmp_path):
    with pytest.raises(UserError, match=r"holds no train\.jsonl, train\.json or train\.parquet"):
        split_files(tmp_path)
    line = [{"question": "Q", "answer": "A"}]
    train = write_lines(tmp_path / "train.jsonl", line)
    assert split_files(tmp_path) == {"train": train} == split_files(train)
    valid = write_lines(tmp_path / "valid.json", line)
    assert split_files(tmp_path) == {"train": train, "valid": valid}
    assert len(open_dataset(valid)) == 1  # its content says that it holds lines
    write_lines(tmp_path / "valid.jsonl", line)
    with pytest.raises(UserError, match=r"valid\.jsonl and valid\.json; leave one"):
        split_files(tmp_path)
    with pytest.raises(UserError, match="no format is called 'lava'"):
        open_dataset(train, "lava")
    with pytest.raises(UserError, match="there is no folder"):
        open_dataset(train, "auto", tmp_path / "images")
    rows = write_rows(tmp_path / "m.parquet", [json.dumps(talk("Hi", "Ho"))], [png()])
    with pytest.raises(UserError, match=r"m\.parquet holds its own images; leave out image_folder"):
        open_dataset(rows, "auto", tmp_path)
