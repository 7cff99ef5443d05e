"""Clips in mlx-vlm's models: fewer visual tokens of a clip, and all else as it would have been.

Shapes: N visual tokens of a clip, L rows, D features.
"""

import io
import json
import re

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import Chat, UserError, generate, load
from mlx_vlm_prune.chat import main as chat_main
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.hosts.clips import check_clip
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prefill import prefill_through_cuts
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs
from mlx_vlm_prune.hosts.prompt import encode_images_and_text, prune_prompt
from mlx_vlm_prune.pruners import Reduction, plan

from . import host_folders
from .host_models import END, IMAGE, START, VIDEO, cached_models
from .host_reference import (
    QWEN,
    TOKENS,
    decoded,
    embed,
    forward,
    indices,
    kept,
    let_norm_choose,
    reduced,
    stock,
)
from .test_generate import refused
from .test_video import film, folder_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
FRAME = [START, *[VIDEO] * 6, END]
# Two groups of two frames, 2 x 3 tokens each; words before and behind, in Qwen3-VL a time, which is
# the words 7 and 11, before each group.
IDS = [3, 9, 4, START, *[VIDEO] * 12, END, 5, 8]
IDS_OF_QWEN3 = [3, 9, 4, 7, *FRAME, 11, *FRAME, 5, 8]
SPECS = ("evs", "vidcom2", "divprune", "flashvid:segments=1,merge=-1,alpha=0.3")
FAMILIES = [*QWEN, "qwen3_5"]
WITH_TIMES = ("qwen3_vl", "qwen3_5")  # before each group of frames


@pytest.fixture(scope="module")
def models():
    return cached_models()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("videos")
    for name in ("qwen2_5_vl", "qwen3_vl", "llava"):
        host_folders.checkpoint(name, home)
    folder_of(home / "clip", 6)
    film(home / "clip.avi", 20, 10)
    return home


@pytest.fixture(scope="module")
def loaded(home):
    return {name: load(home / name) for name in ("qwen2_5_vl", "qwen3_vl", "llava")}


def clip(name: str) -> PreparedInputs:
    """As the product holds it: the patches in the place of pictures."""
    ids = IDS_OF_QWEN3 if name in WITH_TIMES else IDS
    patches = np.random.default_rng(5).normal(size=(2 * 24, 3 * 2 * 14 * 14)).astype(np.float32)
    extra = {"video_grid_thw": mx.array([[2, 4, 6]])}
    return PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), mx.array(patches), extra=extra)


def as_mlx_vlm(inputs: PreparedInputs) -> PreparedInputs:
    """As mlx-vlm takes it."""
    extra = {**inputs.extra, "pixel_values_videos": inputs.pixels}
    return PreparedInputs(inputs.ids, inputs.mask_1L, extra=extra)


def places(name: str) -> list[tuple[int, int, int]]:
    """Time, row and column of each row, counted by hand."""
    frame = [(0, row, column) for row in (0, 1) for column in (0, 1, 2)]
    if name in WITH_TIMES:  # a new start for each group, its largest side later
        first, second = ([(b, b + r, b + c) for _, r, c in frame] for b in (5, 11))
        words = [[(i,) * 3 for i in span] for span in (range(5), (8, 9, 10), (14, 15, 16))]
        return [*words[0], *first, *words[1], *second, *words[2]]
    groups = [(4 + t, 4 + r, 4 + c) for t in (0, 1) for _, r, c in frame]
    return [*[(i,) * 3 for i in range(4)], *groups, *[(i,) * 3 for i in (7, 8, 9)]]


def expected_answer(models, name: str, inputs: PreparedInputs, reduction: Reduction):
    """Without a cache: the stock tower's tokens that stay, mixed where they merge, each at its
    place in the whole clip."""
    index, weight_KN = reduction.index_BK[0].tolist(), reduction.mixture(IDS.count(VIDEO))[0]
    model, deep = models(name), []
    out = model.vision_tower(inputs.pixels, inputs.extra["video_grid_thw"])
    x_UD, deep = out if isinstance(out, tuple) else (out, [])
    x_KD, rows, token = weight_KN @ x_UD, [], 0
    for word, place in zip(inputs.ids, places(name), strict=True):
        if word != VIDEO:
            rows.append((embed(model, name, word)[0], place, False, word))
        elif token in index:
            rows.append((x_KD[index.index(token)], place, True, 0))
        token += word == VIDEO
    added = [weight_KN @ y_UD for y_UD in deep]
    tokens, odds = [], []
    for _ in range(TOKENS):
        x, at, visual, ids = ([*column] for column in zip(*rows, strict=True))
        logits_V = forward(model, name, mx.stack(x), at, visual, added, None, ids)
        odds.append(np.array(logits_V - mx.logsumexp(logits_V)))
        tokens.append(int(odds[-1].argmax()))
        rows.append((embed(model, name, tokens[-1])[0], (max(at[-1]) + 1,) * 3, False, tokens[-1]))
    return tokens, np.stack(odds)


@pytest.mark.parametrize("name", FAMILIES)
def test_with_all_tokens_it_is_the_stock_model_bit_for_bit(models, name):
    model, inputs = models(name), clip(name)
    expected, expected_odds = stock(model, as_mlx_vlm(inputs))
    for spec in ("none", *SPECS):
        tokens, odds = decoded(model, reduced(model, inputs, spec, 1.0).arguments)
        assert tokens == expected
        np.testing.assert_array_equal(odds, expected_odds)


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_tokens_keep_their_places_in_time(models, name, monkeypatch):
    let_norm_choose(monkeypatch, lambda signals, K: kept([1, 5, 6, 11]))
    inputs, at = clip(name), places(name)
    prompt = reduced(models(name), inputs, "norm", 4 / 12)
    visual = [row for row, word in enumerate(inputs.ids) if word == VIDEO]
    stay = {visual[i] for i in (1, 5, 6, 11)}
    rows = [row for row, word in enumerate(inputs.ids) if word != VIDEO or row in stay]
    assert prompt.arguments["input_ids"][0].tolist() == [inputs.ids[row] for row in rows]
    positions = prompt.arguments["position_ids"][:, 0].T.tolist()
    assert positions == [[*at[row]] for row in rows]
    # The next word comes behind the last one's position.
    delta = prompt.arguments["rope_deltas"].item()
    assert len(rows) + delta == at[-1][0] + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_answer_is_that_of_the_short_sequence_without_a_cache(models, name):
    model, inputs = models(name), clip(name)
    for spec, ratio, step in zip(SPECS, (0.25, 0.5, 0.4, 0.5), (3, None, 4, 3), strict=True):
        prompt = reduced(model, inputs, spec, ratio)
        tokens, odds = decoded(model, prompt.arguments, prefill_step_size=step)
        (reduction,) = prompt.trace.steps[-1].reductions
        weight_KN = np.array(reduction.mixture(12)[0])
        assert len(weight_KN) == int(12 * ratio)
        assert ((weight_KN > 0) & (weight_KN < 1)).any() == ("flashvid" in spec)
        expected, expected_odds = expected_answer(models, name, inputs, reduction)
        assert tokens == expected
        np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)


def test_the_frames_of_a_clip_are_known_to_its_methods(models):
    """`evs` on the tower's tokens by a loop over the two groups: three of six are the first's."""
    inputs = clip("qwen2_5_vl")
    x_UD = models("qwen2_5_vl").vision_tower(inputs.pixels, inputs.extra["video_grid_thw"])
    u = np.array(x_UD / mx.linalg.norm(x_UD, axis=1, keepdims=True)).reshape(2, 6, -1)
    middle = u[0].mean(axis=0) / np.linalg.norm(u[0].mean(axis=0))
    first = np.argsort(u[0] @ middle)[:3]
    second = 6 + np.argsort((u[1] * u[0]).sum(axis=-1))[:3]
    ((index),) = indices(reduced(models("qwen2_5_vl"), inputs, "evs", 0.5))
    assert index == sorted([*first.tolist(), *second.tolist()])


def question(home, name: str, *more: str) -> list[str]:
    words = ["--prompt", "w7 w9", "--max-tokens", "5"]
    return ["--model", str(home / name), "--video", str(home / "clip"), *words, *more]


@pytest.mark.parametrize("name, pruner", [("qwen2_5_vl", "evs"), ("qwen3_vl", "vidcom2")])
def test_one_command_prunes_a_clip_and_tells_every_figure(home, name, pruner, capsys):
    file, picture = home / "figures.json", home / "kept.png"
    budget = ["--pruner", pruner, "--keep-ratio", "0.25", "--fps", "4"]
    main(question(home, name, *budget, "--json", str(file), "--overlay", str(picture)))
    figures, shown = json.loads(file.read_text()), capsys.readouterr().out
    groups, rows, columns = figures["video"]["grid"]
    assert groups == 3 and figures["visual_tokens"] == groups * rows * columns
    assert figures["visual_tokens_kept"] == figures["visual_tokens"] // 4
    assert figures["video"]["seconds"] == [0, 0.25, 0.5, 0.75, 1, 1.25]
    by_group = [0] * groups
    for index in figures["kept_indices"][0]:
        by_group[index // (rows * columns)] += 1
    assert figures["video"]["kept_by_group"] == by_group
    assert f"Kept of each group of frames: {', '.join(map(str, by_group))}" in shown
    assert figures["text"] in shown and picture.is_file() and figures["images"] == []


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_unpruned_it_answers_about_a_file_as_mlx_vlm_does(loaded, home, name):
    from mlx_vlm import apply_chat_template
    from mlx_vlm import generate as stock_generate

    (model, processor), file = loaded[name], str(home / "clip.avi")
    text = apply_chat_template(processor, model.config, "w7 w9", video=[file], fps=3)
    theirs = stock_generate(
        model, processor, text, video=[file], fps=3, max_frames=4, max_tokens=6, temperature=0.0
    )
    for pruner in ("none", "evs"):
        ours = generate(
            model, processor, "w7 w9", video=file, fps=3, max_frames=4, pruner=pruner,
            keep_ratio=1.0, max_tokens=6,
        )  # fmt: skip
        assert (ours.text, ours.prompt_tokens) == (theirs.text, theirs.prompt_tokens)
    half = generate(model, processor, "w7 w9", video=file, fps=3, keep_ratio=0.5, max_tokens=2)
    assert half.auto.startswith("auto: vidcom2: ") and half.pruner == "vidcom2"
    assert half.visual_tokens_kept == half.visual_tokens // 2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_conversation_about_a_clip_is_as_mlx_vlm_reads_it(loaded, home, name):
    from mlx_vlm import generate as stock_generate

    (model, processor), file = loaded[name], str(home / "clip.avi")
    chat = Chat(model, processor, pruner="none", fps=3, max_frames=4, max_tokens=4)
    first, second = chat.ask("w7 w9", video=file), chat.ask("w3")
    turns = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "w7 w9"}]},
        {"role": "assistant", "content": [{"type": "text", "text": first.text.strip()}]},
        {"role": "user", "content": [{"type": "text", "text": "w3"}]},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    theirs = stock_generate(
        model, processor, text, video=[file], fps=3, max_frames=4, max_tokens=4, temperature=0.0
    )
    assert (second.text, second.prompt_tokens) == (theirs.text, theirs.prompt_tokens)
    chat.configure(pruner="evs", keep_ratio=0.5)
    third = chat.ask("w5")
    assert third.visual_tokens == second.visual_tokens == 2 * third.visual_tokens_kept
    assert chat._conversation.towers.misses == 1, "the tower reads a clip once"
    for seen, sentence in (
        ({"video": file}, "a video comes before the first question"),
        ({"image": Image.new("RGB", (9, 9))}, "a prompt is about a video or about images"),
    ):
        with pytest.raises(UserError, match=sentence):
            chat.ask("w5", **seen)
    assert len(chat.turns) == 3
    chat.clear()
    for wrong in ([], np.zeros((2, 9, 9, 3))):
        with pytest.raises(UserError, match=r"the list of frames has no pictures|of type ndarray"):
            chat.ask("w5", video=wrong)
    assert chat.ask("w3").visual_tokens == 0


def test_a_chat_by_lines_has_a_clip(home, monkeypatch, capsys):
    lines = [
        "w7", "w3", "/stats", "/pruner tome", f"/video {home / 'clip'}", "/image a.png", "/clear",
        f"/video {home / 'none.avi'}", f"/video {home / 'clip'}", "/video",
        f"/video {home / 'clip'}", "w7", "/stats",
    ]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    model = ["--model", str(home / "qwen2_5_vl"), "--max-tokens", "3"]
    chat_main([*model, "--video", str(home / "clip.avi"), "--keep-ratio", "0.5"])
    shown, errors = capsys.readouterr()
    assert shown.count("Kept of each group of frames: ") == 2
    assert shown.count(f"The questions are about {home / 'clip'}.") == 2
    assert "The questions are about no video." in shown
    sentences = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert [sentence[:41] for sentence in sentences] == [
        "error: tome cannot prune a clip: inside t", "error: a video comes before the first que",
        "error: this chat is about a video; /clear", f"error: {home / 'none.avi'}"[:41],
    ]  # fmt: skip
    assert errors.count("auto: vidcom2: ") == 1, "the reason of a choice is printed once"


@pytest.mark.parametrize("name, more, sentence", [
    ("llava", [], "a llava model answers about no video"),
    ("qwen2_5_vl", ["--pruner", "tome"], "tome cannot prune a clip: inside the tower it works on"),
    ("qwen2_5_vl", ["--video", "none.mp4"], "none.mp4 cannot be read"),
])  # fmt: skip
def test_a_chat_that_cannot_have_a_clip_does_not_begin(home, name, more, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        chat_main(["--model", str(home / name), "--video", str(home / "clip"), *more])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("name, more, sentence", [
    ("llava", [], "a llava model answers about no video"),
    ("qwen2_5_vl", ["--pruner", "tome"], "tome cannot prune a clip: inside the tower it works on"),
    ("qwen2_5_vl", ["--pruner", "uniform"], "uniform cannot prune a clip: it works on the grid of"),
    ("qwen3_vl", ["--pruner", "fastv"], "fastv cannot prune a clip: between layers it works on"),
    ("qwen2_5_vl", ["--image", __file__], "a prompt is about a video or about images"),
    ("qwen2_5_vl", ["--budget-ms", "9"], "a video's budget is a --keep-ratio or --keep-tokens"),
    ("qwen2_5_vl", ["--prompt", "<|video_pad|>"], r"leave <|video_pad|> out of the prompt"),
    ("qwen2_5_vl", ["--fps", "0"], "--fps is 0.0; it must be above 0 and at most 1000"),
    ("qwen2_5_vl", ["--max-frames", "0"], "--max-frames is 0; it must be a whole number from 1 to"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(home, name, more, sentence, capsys):
    assert sentence in refused(capsys, question(home, name, *more))


def test_a_model_of_ours_reads_no_video(home):
    with pytest.raises(UserError, match="this model reads no video; give some of its frames"):
        generate(*load(), "is it red ?", video=home / "clip")
    with pytest.raises(UserError, match="this model reads no video; give some of its frames"):
        Chat(*load()).ask("is it red ?", video=home / "clip")
    with pytest.raises(UserError, match="in a chat set_video opens a video"):
        Chat(*load(), video=home / "clip")
    for wrong, sentence in (
        (7, "video is 7; give an MP4"),
        (bytearray(b"RIFF"), "video is bytearray(b'RIFF')"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            generate(*load(), "is it red ?", video=wrong)


def test_between_layers_a_clip_of_one_group_is_pruned_as_the_picture_that_it_is(models):
    """Qwen2.5-VL: a picture is to its tower two frames alike."""
    model, pixels_SC = models("qwen2_5_vl"), clip("qwen2_5_vl").pixels[:24]
    answers = []
    for word, grid in ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw")):
        ids, thw = [3, 9, START, *[word] * 6, END, 5, 8], mx.array([[1, 4, 6]])
        inputs = PreparedInputs(ids, mx.ones((1, 12), mx.int32), pixels_SC, 1, {grid: thw})
        host, pipeline = host_of(model), plan("divprune:keep=5+fastv:layer=1")
        check_clip(host, pipeline)
        views = encode_images_and_text(host, inputs, pipeline)
        short = prune_prompt(host, inputs, views, pipeline, [3], "keep")
        done = prefill_through_cuts(host, short, pipeline, [3], "keep")
        options = done.arguments | {"pixel_values": None}
        answers.append(decoded(model, options, prompt_cache=done.cache))
    assert answers[0][0] == answers[1][0]
    np.testing.assert_array_equal(answers[0][1], answers[1][1])
