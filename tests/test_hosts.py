"""Promises about mlx-vlm's models: fewer visual tokens, and all else as it would have been.

The reference is written here: the stock tower's embeddings, the rows that stay and their
positions by counting, and the language model without a cache over the whole sequence.

Shapes: N visual tokens of an image, L rows, D features, V words.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.mlx_vlm import Told, family_of, see, shares, tell
from mlx_vlm_prune.hosts.refusals import check
from mlx_vlm_prune.hosts.views import Inputs
from mlx_vlm_prune.model import no_lap
from mlx_vlm_prune.pruners import METHODS, Stage, plan

from . import host_models
from .host_models import IMAGE, KINDS, START

TOKENS = 5
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
OF_TOWERS = [
    name
    for name, method in METHODS.items()
    if method.stage in (Stage.FEATURES, Stage.PROJECTED) and not method.learned and name != "none"
]


@pytest.fixture(scope="module")
def models():
    """Every family's tiny model, made once."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = KINDS[name].make()
        return made[name]

    return get


def prompt(models, name: str, images: int | None = None) -> Inputs:
    return KINDS[name].inputs(models(name), images)


def told(model, inputs: Inputs, spec: str, ratio: float, positions=None) -> Told:
    pipeline = plan(spec)
    policy = check(model, family_of(model), pipeline, positions)
    views = see(model, inputs, pipeline, no_lap)
    K = [max(1, int(view.signals.x_BND.shape[1] * ratio)) for view in views]
    return tell(model, inputs, views, pipeline, K, policy, no_lap)


def decoded(model, arguments: dict, **options) -> tuple[list[int], np.ndarray]:
    """Tokens and their log probabilities (T, V), by mlx-vlm's own loop."""
    from mlx_vlm.generate.ar import generate_step

    rest = {**arguments, **options}
    ids, pixels, mask = (rest.pop(x) for x in ("input_ids", "pixel_values", "mask"))
    steps = list(generate_step(ids, model, pixels, mask, max_tokens=TOKENS, temperature=0, **rest))
    return [token for token, _ in steps], np.stack([np.array(odds) for _, odds in steps])


def stock(model, inputs: Inputs, **options) -> tuple[list[int], np.ndarray]:
    """The unpruned model, left to itself."""
    arguments = {"input_ids": mx.array(inputs.ids)[None], "pixel_values": inputs.pixels}
    return decoded(model, {**arguments, "mask": inputs.mask_1L, **inputs.extra}, **options)


def indices(said: Told) -> list[list[int]]:
    return [one.index_BK[0].tolist() for one in said.trace[-1].kept]


def reference(models, name: str, inputs: Inputs, kept: list[list[int]], policy: str = "keep"):
    """The same without a cache, each step over all rows, at positions counted here."""
    model, kind = models(name), KINDS[name]
    embeds, deep = kind.full(model, inputs) if inputs.pixels is not None else ([], [])
    x_LD, places, visual = rows(model, name, inputs, kept, embeds)
    if policy == "renumber":
        places = [(i, i, i) for i in range(len(places))]
    added = [
        mx.concatenate([y[layer][mx.array(k)] for y, k in zip(deep, kept, strict=True)])
        for layer in range(len(deep[0]) if deep else 0)
    ]
    tokens, odds = [], []
    for _ in range(TOKENS):
        logits_V = forward(model, name, x_LD, places, visual, added)
        odds.append(np.array(logits_V - mx.logsumexp(logits_V)))
        tokens.append(int(odds[-1].argmax()))
        x_LD = mx.concatenate([x_LD, table(model)(mx.array(tokens[-1:]))])
        places, visual = [*places, (max(places[-1]) + 1,) * 3], [*visual, False]
    return tokens, np.stack(odds)


def table(model):
    return getattr(model.language_model, "model", model.language_model).embed_tokens


def rows(model, name: str, inputs: Inputs, kept, embeds):
    """Embeddings, positions and what is visual of the rows left, picture after picture by hand."""
    x, places, visual, at, kind = [], [], [], 0, KINDS[name]
    coming = [(v, i) for v, picture in enumerate(embeds) for i in range(len(picture))]
    mark = -200 if name == "fastvlm" else IMAGE
    for token in inputs.ids:
        if token != mark:
            x.append(table(model)(mx.array([token]))[0])
            places.append((at, at, at))
            visual.append(False)
            at += 1
            continue
        taken = coming[:1] if kind.marks == "token" else coming
        coming = coming[len(taken) :]
        for v, i in taken:
            height, width = kind.grids[v]
            if i in kept[v]:
                x.append(embeds[v][i])
                places.append((at, at + i // width, at + i % width))
                visual.append(True)
            if i == height * width - 1:
                at += max(height, width)
    return mx.stack(x), places, visual


def forward(model, name: str, x_LD, places, visual, added):
    """Logits (V,) of the last row."""
    language, x_1LD, L = model.language_model, x_LD[None], len(x_LD)
    ids, more = mx.zeros((1, L), mx.int32), {}
    if name == "paligemma":  # the prompt sees all of itself; what is generated is causal
        prompt = 1 + max(i for i, is_image in enumerate(visual) if is_image)
        prompt += len(host_models.WORDS[2])
        at = mx.arange(L)
        more["mask"] = ((at < prompt) | (at <= at[:, None]))[None, None]
    if name not in QWEN:  # positions are counted by the model itself
        return language(ids, inputs_embeds=x_1LD, cache=None, **more).logits[0, -1]
    more["position_ids"] = mx.array(places).T[:, None]
    if added:
        more |= {"visual_pos_masks": mx.array([visual]), "deepstack_visual_embeds": added}
    h_1LD = language.model(ids, inputs_embeds=x_1LD, cache=None, **more)
    head = language.lm_head if hasattr(language, "lm_head") else table(model).as_linear
    return head(h_1LD)[0, -1]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_with_all_tokens_it_is_the_stock_model_bit_for_bit(models, name, images):
    if images > len(KINDS[name].tiles):
        pytest.skip(f"{name} reads one image")
    model, inputs = models(name), prompt(models, name, images)
    for spec in ("none", "vispruner"):
        tokens, odds = decoded(model, told(model, inputs, spec, 1.0).arguments)
        expected, expected_odds = stock(model, inputs)
        assert tokens == expected
        np.testing.assert_array_equal(odds, expected_odds)


@pytest.mark.parametrize("step", [3, None, 2048], ids=["chunked", "whole", "default"])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_answer_is_that_of_the_short_sequence_without_a_cache(models, name, images, step):
    if images > len(KINDS[name].tiles):
        pytest.skip(f"{name} reads one image")
    model, inputs = models(name), prompt(models, name, images)
    for spec, ratio in (("vispruner", 0.25), ("divprune", 0.5), ("random", 0.3)):
        said = told(model, inputs, spec, ratio)
        tokens, odds = decoded(model, said.arguments, prefill_step_size=step)
        expected, expected_odds = reference(models, name, inputs, indices(said))
        assert tokens == expected
        np.testing.assert_allclose(odds, expected_odds, rtol=0, atol=1e-4)
        words = [token for token in inputs.ids if token not in (IMAGE, -200)]
        assert said.rows == len(words) + sum(map(len, indices(said)))


@pytest.mark.parametrize("name", QWEN)
def test_renumbered_positions_count_what_is_left(models, name):
    model, inputs = models(name), prompt(models, name)
    said = told(model, inputs, "norm", 0.5, "renumber")
    assert said.positions == "renumber"
    _, odds = decoded(model, said.arguments, prefill_step_size=4)
    _, expected = reference(models, name, inputs, indices(said), "renumber")
    np.testing.assert_allclose(odds, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", ["position_ids", "rope_deltas"])
@pytest.mark.parametrize("name", QWEN)
def test_wrong_positions_would_not_pass(models, name, wrong):
    """The control: positions as mlx-vlm derives them from the short ids, or its old delta."""
    model, inputs = models(name), prompt(models, name)
    said = told(model, inputs, "vispruner", 0.25)
    short = mx.arange(said.rows)[None, None]
    as_before = said.arguments["rope_deltas"] - (len(inputs.ids) - said.rows)
    value = {"position_ids": mx.broadcast_to(short, (3, 1, said.rows)), "rope_deltas": as_before}
    _, odds = decoded(model, said.arguments | {wrong: value[wrong]})
    _, expected = reference(models, name, inputs, indices(said))
    assert np.abs(odds - expected).max() > 1e-2


def test_deepstack_left_out_would_not_pass(models):
    model, inputs = models("qwen3_vl"), prompt(models, "qwen3_vl")
    said = told(model, inputs, "vispruner", 0.25)
    without = {k: v for k, v in said.arguments.items() if k != "deepstack_visual_embeds"}
    _, odds = decoded(model, without)
    _, expected = reference(models, "qwen3_vl", inputs, indices(said))
    assert np.abs(odds - expected).max() > 1e-2


@pytest.mark.parametrize("name", QWEN)
def test_a_kept_token_of_a_grid_keeps_its_three_positions(models, name, monkeypatch):
    """Two rows of three tokens between the words 9 and 5, of which 1, 3 and 5 stay."""
    model = models(name)
    inputs = Inputs(
        [9, START, *[IMAGE] * 6, host_models.END, 5], mx.ones((1, 10), mx.int32),
        mx.random.normal((24, 3 * 2 * 14 * 14)), 1, {"image_grid_thw": mx.array([[1, 4, 6]])},
    )  # fmt: skip
    keeping(monkeypatch, lambda signals, K: kept([1, 3, 5]))
    said = told(model, inputs, "norm", 0.5)
    assert said.arguments["input_ids"].tolist() == [[9, START, *[IMAGE] * 3, host_models.END, 5]]
    assert said.arguments["position_ids"][:, 0].tolist() == [
        [0, 1, 2, 2, 2, 5, 6],  # time
        [0, 1, 2, 3, 3, 5, 6],  # row
        [0, 1, 3, 2, 4, 5, 6],  # column
    ]
    assert said.arguments["rope_deltas"].tolist() == [[0]]  # row 7 is position 7


def keeping(monkeypatch, prune) -> None:
    """Let `norm` choose like this."""
    monkeypatch.setitem(METHODS, "norm", replace(METHODS["norm"], prune=prune))


def kept(index: list[int]):
    from mlx_vlm_prune.pruners import Reduction

    return Reduction(mx.array([index]))


def test_what_deepstack_adds_is_cut_to_the_same_tokens(models):
    model, inputs = models("qwen3_vl"), prompt(models, "qwen3_vl")
    said = told(model, inputs, "norm", 0.25)
    _, deep = KINDS["qwen3_vl"].full(model, inputs)
    for layer, ours in enumerate(said.arguments["deepstack_visual_embeds"]):
        own = [np.array(y[layer])[k] for y, k in zip(deep, indices(said), strict=True)]
        np.testing.assert_array_equal(np.array(ours), np.concatenate(own))


def test_with_several_images_every_token_takes_the_place_of_its_own_image(models, monkeypatch):
    """Words 3 9 4, sixteen rows, words 7 11, sixteen rows, words 5 8 2 30."""
    model, inputs = models("llava"), prompt(models, "llava")
    chosen = iter([[2, 9], [0, 15]])
    keeping(monkeypatch, lambda signals, K: kept(next(chosen)))
    said = told(model, inputs, "norm", 0.125)
    assert said.arguments["input_ids"].tolist() == [
        [3, 9, 4, IMAGE, IMAGE, 7, 11, IMAGE, IMAGE, 5, 8, 2, 30]
    ]
    (first, second), _ = KINDS["llava"].full(model, inputs)
    expected = [first[2], first[9], second[0], second[15]]
    ours = np.array(said.arguments["cached_image_features"][0])
    np.testing.assert_allclose(ours, np.stack([np.array(x) for x in expected]), atol=1e-5)


@pytest.mark.parametrize("method", OF_TOWERS)
@pytest.mark.parametrize("name", KINDS)
def test_every_method_of_the_towers_end_leaves_as_many_as_it_is_told(models, name, method):
    model, inputs = models(name), prompt(models, name)
    said = told(model, inputs, method, 0.5)
    sizes = [view.signals.x_BND.shape[1] for view in said.views]
    assert [one.slots for one in said.trace[-1].kept] == [n // 2 for n in sizes]
    _, odds = decoded(model, said.arguments)
    assert np.isfinite(odds).all()


@pytest.mark.parametrize("name", KINDS)
def test_merged_tokens_are_mixed_before_the_projector(models, name):
    model, inputs = models(name), prompt(models, name, 1)
    said = told(model, inputs, "avgpool", 0.25)
    whole = [view.signals.x_BND for view in see(model, inputs, plan("none"), no_lap)]
    pairs = zip(said.trace[-1].kept, whole, strict=True)
    expected = [family_of(model).project(model, one.apply(x))[0] for one, x in pairs]
    ours = said.arguments["cached_image_features"]
    ours = ours[0] if isinstance(ours, list) or ours.ndim == 3 else ours
    np.testing.assert_allclose(np.array(ours), np.concatenate(expected), atol=1e-5)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("name", [name for name in KINDS if name not in QWEN])
def test_attention_is_what_the_towers_own_layer_computes(models, name, layer, monkeypatch):
    """The stock tower is overheard where it attends; CLS's row, or the mean of all rows."""
    model, inputs, calls, real = models(name), prompt(models, name), [], None

    def overheard(q, k, v, *, scale, mask=None):
        calls.append((np.array(q, np.float64), np.array(k, np.float64), scale, mask))
        return real(q, k, v, scale=scale, mask=mask)

    views = see(model, inputs, plan(f"cls_attention:layer={layer}"), no_lap)
    real = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", overheard)
    see(model, inputs, plan("none"), no_lap)
    depth = family_of(model).depth(model)
    first = 1 if name == "fastvlm" else 0  # an earlier stage attends, too
    q, k, scale, mask = calls[first + layer % depth]
    logits = q @ k.swapaxes(2, 3) * scale + (0 if mask is None else np.array(mask))
    attention_TSS = softmax(logits).mean(axis=1)
    begin = 0
    for t, view in enumerate(views):
        if name == "pixtral":  # all pictures are one row
            end = begin + view.signals.x_BND.shape[1]
            own_P = attention_TSS[0, begin:end, begin:end].mean(axis=0)
            begin = end
        elif name in ("llava", "llava_next", "internvl_chat"):
            own_P = attention_TSS[t, 0, 1:]
        else:
            own_P = attention_TSS[t].mean(axis=0)
        rows, columns = view.signals.grid
        m = int((len(own_P) / (rows * columns)) ** 0.5)
        own_N = own_P.reshape(rows, m, columns, m).mean(axis=(1, 3)).ravel()
        np.testing.assert_allclose(
            np.array(view.signals.cls_attention_BN[0]), own_N, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("layer", [0, -1], ids=["in windows", "over the image"])
@pytest.mark.parametrize("name", QWEN)
def test_received_attention_is_put_back_in_rows_and_pooled_by_the_merger(models, name, layer):
    """The whole attention matrix in the tower's order; its columns then go home one by one."""
    model, inputs = models(name), prompt(models, name)
    views = see(model, inputs, plan(f"received_attention:layer={layer}"), no_lap)
    received_S = np.zeros(sum(4 * v.signals.x_BND.shape[1] for v in views))
    logits_HSS, same_SS, home_S = whole_attention(model, name, inputs, layer)
    attention_HSS = softmax(np.where(same_SS, logits_HSS, -np.inf))
    begin = 0
    for view in views:
        h, w = (2 * n for n in view.signals.grid)
        own = slice(begin, begin + h * w)
        for place, column in zip(home_S[own], attention_HSS[:, own].mean(0).mean(0)[own],
                                 strict=True):  # fmt: skip
            received_S[begin + place] = column
        patches = received_S[own].reshape(h // 2, 2, w // 2, 2)
        np.testing.assert_allclose(
            np.array(view.signals.received_attention_BN[0]), patches.mean((1, 3)).ravel(), atol=1e-6
        )
        begin += h * w


def whole_attention(model, name: str, inputs: Inputs, layer: int):
    """Logits (H, S, S) of a layer, which patches attend to one another, and each patch's place in
    its image's rows, in the tower's order. A block is caught at work, on the instance."""
    tower, caught = model.vision_tower, {}
    block = tower.blocks[layer]

    class Ear:
        def __call__(self, x, cu_seqlens, rotary_pos_emb):
            caught.update(x=x, ends=cu_seqlens.tolist(), angles=rotary_pos_emb)
            return block(x, cu_seqlens=cu_seqlens, rotary_pos_emb=rotary_pos_emb)

    tower.blocks[layer] = Ear()
    try:
        mx.eval(tower(inputs.pixels, inputs.extra["image_grid_thw"]))
    finally:
        tower.blocks[layer] = block
    S = len(caught["x"])
    qkv = np.array(block.attn.qkv(block.norm1(caught["x"])), np.float64).reshape(S, 3, 2, 16)
    angle_Sd = np.tile(np.array(caught["angles"], np.float64), 2)[:, None]
    turn = [z * np.cos(angle_Sd) + np.concatenate([-z[..., 8:], z[..., :8]], -1) * np.sin(angle_Sd)
            for z in (qkv[:, 0], qkv[:, 1])]  # fmt: skip
    logits_HSS = np.einsum("qhd,khd->hqk", *turn) / 4
    stretch_S = np.searchsorted(caught["ends"], np.arange(S), side="right")
    tokens = range(S // 4)
    if name == "qwen2_5_vl":
        tokens = tower.get_window_index(inputs.extra["image_grid_thw"])[0].tolist()
    home, begin = {}, 0
    for _, h, w in inputs.extra["image_grid_thw"].tolist():
        for n in range(h * w // 4):
            row, column = divmod(n, w // 2)
            home[begin + n] = [(2 * row + a) * w + 2 * column + b for a in (0, 1) for b in (0, 1)]
        begin += h * w // 4
    home_S = [place for token in tokens for place in home[token]]
    return logits_HSS, stretch_S[:, None] == stretch_S, home_S


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_crops_of_any_resolution_stand_in_one_block_in_place_of_the_first_placeholder(
    models, monkeypatch
):
    """Three crops of sixteen tokens; words 3 9 4, the block, words 5 8 2 30."""
    model, inputs = models("llava_next"), prompt(models, "llava_next")
    chosen = iter([[2, 9], [0], [4, 5, 15]])
    keeping(monkeypatch, lambda signals, K: kept(next(chosen)))
    said = told(model, inputs, "norm", 0.125)
    assert said.arguments["input_ids"].tolist() == [[3, 9, 4, IMAGE, 5, 8, 2, 30]]
    full, _ = KINDS["llava_next"].full(model, inputs)
    block = np.concatenate(
        [np.array(full[v])[i] for v, i in ((0, [2, 9]), (1, [0]), (2, [4, 5, 15]))]
    )
    np.testing.assert_allclose(
        np.array(said.arguments["cached_image_features"][0]), block, atol=1e-5
    )
    assert said.rows == 7 + 6
    assert [view.image for view in said.views] == [0, 0, 0]


def test_without_pruning_the_newlines_behind_the_crops_stay_as_mlx_vlm_puts_them(models):
    model, inputs = models("llava_next"), prompt(models, "llava_next")
    block = told(model, inputs, "none", 1.0).arguments["cached_image_features"][0]
    assert block.shape[0] == 2 * 48
    assert (block[48:] == model.image_newline).all().item()


def test_tiles_belong_to_the_image_whose_whole_picture_ends_them(models, monkeypatch):
    """Two tiles and a whole, then an image that was not cut."""
    from mlx_vlm_prune.hosts.families import common, idefics3

    tile, whole = [50, *[IMAGE] * 4], [51, *[IMAGE] * 4]
    ids = [3, *tile, *tile, *whole, 7, *whole, 5]
    made = Inputs(ids, mx.ones((1, len(ids))), mx.zeros((1, 4, 3, 56, 56)), 2)
    monkeypatch.setattr(common, "prepare", lambda *_: made)

    class Processor:
        class tokenizer:
            convert_tokens_to_ids = {"<global-img>": 51}.get

    inputs = idefics3.prepare(models("idefics3"), Processor(), "", [], None)
    assert inputs.extra["num_patches_list"] == [3, 1]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "internvl_chat"])
def test_tiles_of_an_image_share_its_budget(models, name):
    model, inputs = models(name), prompt(models, name)
    views = see(model, inputs, plan("norm"), no_lap)
    assert [view.image for view in views] == [0, 0, 1]
    assert [view.signals.grid for view in views] == [(2, 2)] * 3


def test_a_tile_that_only_fills_up_a_batch_is_not_seen(models):
    model, inputs = models("idefics3"), prompt(models, "idefics3", 1)
    blank = mx.concatenate([inputs.pixels, mx.zeros_like(inputs.pixels[:, :1])], axis=1)
    assert len(see(model, replace(inputs, pixels=blank), plan("none"), no_lap)) == 2


def test_pictures_of_which_nobody_knows_whose_they_are_are_refused(models):
    model, inputs = models("gemma3"), prompt(models, "gemma3")
    three = mx.concatenate([inputs.pixels, inputs.pixels[:1]])
    with pytest.raises(UserError, match="2 images became 3 pictures"):
        see(model, replace(inputs, pixels=three), plan("none"), no_lap)


@pytest.mark.parametrize("name", KINDS)
def test_the_words_are_the_prompts_without_its_placeholders(models, name):
    model, inputs = models(name), prompt(models, name, 1)
    view, *_ = see(model, inputs, plan("mmtok"), no_lap)
    words = [token for token in inputs.ids if token not in (IMAGE, -200)]
    np.testing.assert_array_equal(
        np.array(view.signals.text_BTD[0]), np.array(table(model)(mx.array(words)))
    )


@pytest.mark.parametrize("name", ["llava", *QWEN])
def test_images_do_not_change_one_anothers_choice(models, name):
    model, both = models(name), prompt(models, name)
    one = prompt(models, name, 1)
    together = indices(told(model, both, "vispruner", 0.25))
    pixels = both.pixels[:1] if name == "llava" else both.pixels[: 4 * 24]
    assert indices(told(model, replace(one, pixels=pixels), "vispruner", 0.25)) == together[:1]


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("sparsevlm", "not yet in mlx-vlm models"),
        ("tome", "between the tower's layers"),
        ("downsample", "--resize-shape"),
        ("norm+restore", "not yet in mlx-vlm models"),
        ("visionzip+pact", "pact cannot prune"),
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_what_cannot_work_is_refused_by_name_with_the_reason(models, name, spec, reason):
    with pytest.raises(UserError, match=reason):
        check(models(name), family_of(models(name)), plan(spec), None)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in QWEN])
def test_positions_that_a_model_only_counts_cannot_be_kept(models, name):
    with pytest.raises(UserError, match="counts the rows"):
        check(models(name), family_of(models(name)), plan("norm"), "keep")


@pytest.mark.parametrize("name", ["fastvlm", "llava_next", "paligemma"])
def test_families_that_mlx_vlm_shows_one_image_refuse_a_second(models, name):
    two = replace(prompt(models, name), images=2)
    with pytest.raises(UserError, match="reads one image"):
        see(models(name), two, plan("none"), no_lap)


def test_a_tower_without_attention_refuses_what_needs_it():
    model = host_models.fastvlm()
    tower = model.vision_tower.vision_model
    tower.network[-1] = type(tower.network[-1])(
        [host_models.import_module("mlx_vlm.models.fastvlm.vision").RepMixerBlock(64)]
    )
    with pytest.raises(UserError, match="neither a CLS token nor attention"):
        check(model, family_of(model), plan("vispruner"), None)
    check(model, family_of(model), plan("divprune"), None)


def test_an_images_budget_is_shared_among_its_crops_in_proportion():
    assert shares(10, [16, 16, 16]) == [3, 3, 4]
    assert shares(7, [24, 12]) == [4, 3]
    assert shares(48, [16, 16, 16]) == [16, 16, 16]
    with pytest.raises(UserError, match="3 crops cannot keep 2"):
        shares(2, [16, 16, 16])


def test_more_placeholders_than_visual_tokens_are_refused(models):
    model, inputs = models("llava"), prompt(models, "llava", 1)
    longer = replace(inputs, ids=[IMAGE, *inputs.ids])
    with pytest.raises(UserError, match="room for 17 visual tokens and the images have 16"):
        told(model, longer, "norm", 0.5)
