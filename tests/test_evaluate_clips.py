"""Questions about clips: read from JSON lines, and answered as `generate` answers them."""

import json

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm_prune import UserError, evaluate, generate, load
from mlx_vlm_prune.evaluation.question_set import fingerprint
from mlx_vlm_prune.evaluation.questions import BadRecords, ClipFile, Source, format_of

from . import host_folders
from .test_video import animation, film, folder_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
LINES = [
    {"video": "a.avi", "question": "w7 w9", "answer": "w1"},
    {"video": "frames", "question": "w3", "answer": "w2", "fps": 4, "max_frames": 6},
    {"video": "a.gif", "question": "w5 w4", "answer": "w3", "max_frames": 4},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("clips")
    film(home / "a.avi", 20, 10)
    folder_of(home / "frames", 8)
    animation(home / "a.gif", 10, 100)
    host_folders.checkpoint("qwen2_5_vl", home)
    write(home / "clips.jsonl", LINES)
    return home


def write(file, lines):
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


def read(file):
    return list(format_of("own").read(Source(file), BadRecords()))


def test_a_line_may_hold_a_clip_in_place_of_an_image(home, tmp_path):
    a, frames, moving = read(home / "clips.jsonl")
    assert a.image == ClipFile(home / "a.avi", 2.0, 32)
    assert frames.image == ClipFile(home / "frames", 4, 6)
    assert moving.image == ClipFile(home / "a.gif", 2.0, 4)
    base = {"question": "w1", "answer": "w2"}
    for line, sentence in (
        ({"video": "none.avi"}, "there is no video file or folder"),
        ({"video": None}, "there is no image and no video"),
        ({"video": "http://example.org/a.mp4"}, "is a URL; download the video and give its path"),
        ({"video": "a.avi", "image": "b.png"}, "it has an image and a video"),
        ({"video": "a.avi", "fps": 0}, "fps is 0; it must be above 0"),
        ({"video": "a.avi", "max_frames": "all"}, "max_frames is 'all'; it must be a whole number"),
        ({"video": 3}, "video is a number, not a text"),
    ):
        with pytest.raises(UserError, match=f"line 1: .*{sentence}"):
            read(write(home / "wrong.jsonl", [{**base, **line}]))


def test_a_field_that_is_null_is_none(home):
    line = {**LINES[0], "image": None, "fps": None, "max_frames": None}
    assert read(write(home / "null.jsonl", [line])) == read(home / "clips.jsonl")[:1]


def test_other_frames_make_other_questions(home):
    questions = read(home / "clips.jsonl")
    before = fingerprint(questions)
    (frame,) = (home / "frames").glob("*3.*")
    content = frame.read_bytes()
    frame.write_bytes(content + b"\0")
    assert fingerprint(questions) != before
    frame.write_bytes(content)
    other = read(write(home / "other.jsonl", [{**LINES[0], "fps": 1}, *LINES[1:]]))
    assert fingerprint(questions) != fingerprint(other)


def test_answers_about_clips_are_those_of_generate(home, monkeypatch, capsys):
    kept, file = [], home / "result.json"
    monkeypatch.setattr("mlx_vlm_prune.evaluate.remember", lambda *_: kept.append(1))
    specs = ("auto", "vidcom2", "divprune", "uniform")
    evaluate.main([
        "--model", str(home / "qwen2_5_vl"), "--questions", str(home / "clips.jsonl"), "--pruner",
        *specs, "--keep-ratio", "0.5", "--max-tokens", "5", "--first-token", "1", "--out",
        str(file),
    ])  # fmt: skip
    result, model = json.loads(file.read_text()), load(home / "qwen2_5_vl")
    assert "uniform cannot prune a clip" in capsys.readouterr().out
    rows = [row["pruner"] for row in result["rows"]]
    assert rows == ["none", "random", "auto", "vidcom2", "divprune"]
    assert result["rows"][2]["chosen"] == "vidcom2" and not kept, "no evidence for pictures"
    assert [text["image"] for text in result["texts"]] == ["a.avi", "frames", "a.gif"]
    for text, line in zip(result["texts"], LINES, strict=True):
        options = {name: line[name] for name in ("fps", "max_frames") if name in line}
        for spec, response in zip(rows, text["responses"], strict=True):
            budget = {} if spec == "none" else {"keep_ratio": 0.5}
            alone = generate(
                *model, line["question"], video=home / line["video"], pruner=spec, max_tokens=5,
                **budget, **options,
            )  # fmt: skip
            assert response.strip() == alone.text.strip(), (spec, line)
    assert all(row["first_token_ms"]["total"] > 0 for row in result["rows"])


def test_a_model_that_reads_no_clips_says_so(home, tmp_path, capsys):
    for model in ([], ["--model", str(host_folders.checkpoint("llava", tmp_path))]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([
                *model, "--questions", str(home / "clips.jsonl"), "--pruner", "norm", "--out",
                str(tmp_path / "result.json"),
            ])  # fmt: skip
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert "about a video, and this model reads none" in err or "answers about no video" in err


def test_without_a_choice_those_are_asked_that_prune_clips(home, capsys):
    host_folders.picture(home, "a.png", 60, 40)
    mixed = [{"image": "a.png", "question": "w8", "answer": "w1"}, *LINES[:1]]
    file = home / "mixed.json"
    evaluate.main([
        "--model", str(home / "qwen2_5_vl"), "--questions", str(write(home / "mixed.jsonl", mixed)),
        "--keep-ratio", "0.5", "--max-tokens", "2", "--out", str(file),
    ])  # fmt: skip
    result = json.loads(file.read_text())
    names = {row["pruner"] for row in result["rows"]}
    assert {"vidcom2", "evs", "flashvid", "divprune", "divprune+restore"} <= names
    assert not {"uniform", "tome"} & names and result["refused"] == []
    assert [text["image"] for text in result["texts"]] == ["a.png", "a.avi"]
