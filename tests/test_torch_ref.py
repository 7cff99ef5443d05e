"""Promises of the PyTorch reference, against transformers and against itself.

Shapes: B prompts, I images, N visual tokens, K kept, L tokens, S = N + 1 with CLS, D features.
"""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from convert.errors import UserError
from torch_ref.language.splice import visible
from torch_ref.model import VLM, VLMConfig
from torch_ref.pruners import METHODS, Signals, reduce

from . import tiny

CHOOSING = [name for name in METHODS if name not in ("none", "attention_pool")]
EVERY = [("none", tiny.N), *((name, 5) for name in CHOOSING)]
POLICIES = ("keep", "renumber")
ROWS = [
    tiny.row("user # what is in the picture ?"),
    tiny.row("# and # is there a red star ?"),
    tiny.row("how many ?"),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny.reference()


@pytest.fixture(scope="module")
def pooled() -> VLM:
    """The same sizes with EfficientVLM's learned pruner of 6 queries."""
    torch.manual_seed(5)
    config = VLMConfig(tiny.VISION, tiny.TEXT, image_token_id=tiny.IMAGE, pool_tokens=6)
    model = VLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def pixels_I3HW() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """float32 parity: rtol 1e-4, atol 1e-5 of the largest value."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


# --- the language model ---------------------------------------------------------------


def llama(vlm: VLM):
    """transformers' model with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = tiny.TEXT
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=True,
    )
    theirs = LlamaForCausalLM(config).eval()
    named = {f"model.{name}": tensor for name, tensor in vlm.model.state_dict().items()}
    missing, extra = theirs.load_state_dict(named, strict=False)
    assert missing == ["lm_head.weight"] and not extra
    theirs.tie_weights()
    return theirs


def test_the_language_model_equals_llama(vlm):
    ids_BL = torch.randint(tiny.TEXT.vocab_size, (2, 23))
    position_BL = torch.arange(23).expand(2, -1)
    ours = vlm.language.logits(vlm.language(vlm.language.embed_tokens(ids_BL), position_BL))
    close(ours, llama(vlm)(ids_BL).logits)


def test_the_language_model_equals_llama_where_positions_have_gaps(vlm):
    ids_1L, position_1L = torch.tensor([[9, 4, 30, 7, 7, 12]]), torch.tensor([[0, 1, 5, 6, 40, 41]])
    ours = vlm.language.logits(vlm.language(vlm.language.embed_tokens(ids_1L), position_1L))
    close(ours, llama(vlm)(ids_1L, position_ids=position_1L).logits)
    with pytest.raises(AssertionError):  # positions matter to this model
        close(ours, llama(vlm)(ids_1L).logits)


def test_the_check_against_llama_can_fail(vlm):
    """Interleaved rotation, which the releases before April 2025 had, must not pass."""
    ids_1L, position_1L = torch.tensor([[9, 4, 30, 7, 7, 12]]), torch.arange(6)[None]
    d = tiny.TEXT.head_dim
    halves_to_pairs = torch.arange(d).reshape(2, d // 2).mT.flatten()
    broken = tiny.reference()
    for layer in broken.language.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight_HdD = projection.weight.data.unflatten(0, (-1, d))
            projection.weight.data = weight_HdD[:, halves_to_pairs].flatten(0, 1)
    ours = broken.language.logits(
        broken.language(broken.language.embed_tokens(ids_1L), position_1L)
    )
    with pytest.raises(AssertionError):
        close(ours, llama(vlm)(ids_1L).logits)


# --- the tower ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(vlm, pixels_I3HW):
    """What transformers' tower says with the same weights, and the keys of every layer."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    theirs = CLIPVisionModel(
        CLIPVisionConfig(**asdict(tiny.VISION), attn_implementation="eager")
    ).eval()
    theirs.load_state_dict(vlm.tower.state_dict())
    keys = []
    for layer in theirs.encoder.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda *call: keys.append(call[-1]))
    with torch.no_grad():
        said = theirs(pixels_I3HW, output_hidden_states=True, output_attentions=True)
    return said, keys


def test_the_tower_equals_clip_after_every_layer(vlm, clip, pixels_I3HW):
    said, _ = clip
    x_ISD = vlm.tower.pre_layrnorm(vlm.tower.embeddings(pixels_I3HW))
    close(x_ISD, said.hidden_states[0])
    for layer, theirs_ISD in zip(vlm.tower.encoder.layers, said.hidden_states[1:], strict=True):
        x_ISD = layer(x_ISD)
        close(x_ISD, theirs_ISD)


def test_the_features_are_the_last_layers_without_cls_and_without_a_norm(vlm, clip, pixels_I3HW):
    seen = vlm.tower(pixels_I3HW)
    close(seen.x_BND, clip[0].hidden_states[-1][:, 1:])
    assert seen.grid == tiny.GRID
    assert seen.cls_attention_BN is None and seen.keys_BND is None  # nobody asked


@pytest.mark.parametrize("layer", range(-3, 3))
def test_the_cls_row_is_that_of_eager_attention_at_every_layer(vlm, clip, pixels_I3HW, layer):
    row_IN = vlm.tower(pixels_I3HW, {"cls_attention": layer}).cls_attention_BN
    close(row_IN, clip[0].attentions[layer].mean(1)[:, 0, 1:])


@pytest.mark.parametrize("layer", range(-3, 3))
def test_the_keys_are_those_of_clip_at_every_layer(vlm, clip, pixels_I3HW, layer):
    close(vlm.tower(pixels_I3HW, {"keys": layer}).keys_BND, clip[1][layer][:, 1:])


@pytest.mark.parametrize("layer", [-4, 3])
def test_a_layer_that_the_tower_lacks_is_refused(vlm, pixels_I3HW, layer):
    with pytest.raises(UserError, match=f"no layer {layer}; give -3 to 2"):
        vlm.logits(ROWS, pixels_I3HW, "cls_attention", 5, options={"layer": layer})


# --- splicing and positions -----------------------------------------------------------


def test_logits_are_those_of_llama_reading_the_kept_tokens_by_hand(vlm, pixels_I3HW):
    """Two words, an image of 16 of which tokens 0, 2, 8 and 10 stay, one word."""
    row = tiny.Prompt([7, 8, *[tiny.IMAGE] * 16, 9], [(2, 16)])
    theirs = llama(vlm)
    seen_1ND = vlm.projector(vlm.tower(pixels_I3HW[:1]).x_BND)
    words_1LD = theirs.get_input_embeddings()(torch.tensor([[7, 8, 9]]))
    pieces = [words_1LD[:, :2], seen_1ND[:, [0, 2, 8, 10]], words_1LD[:, 2:]]
    embeds_1LD = torch.cat(pieces, dim=1)
    by_hand = {"keep": [0, 1, 2, 4, 10, 12, 18], "renumber": [0, 1, 2, 3, 4, 5, 6]}
    for policy, positions in by_hand.items():
        ours = vlm.logits([row], pixels_I3HW[:1], "uniform", 4, policy)
        close(ours, theirs(inputs_embeds=embeds_1LD, position_ids=torch.tensor([positions])).logits)


def test_the_two_position_policies_differ_once_tokens_are_gone(vlm, pixels_I3HW):
    keep, count = (vlm.logits(ROWS[:1], pixels_I3HW[:1], "norm", 5, p) for p in POLICIES)
    assert (keep - count).abs().max() > 1e-3 * keep.abs().max()


def test_a_placeholder_in_the_users_text_stays_a_word(vlm, pixels_I3HW):
    typed = tiny.Prompt([tiny.IMAGE, *[tiny.IMAGE] * 16, 9], [(1, 16)])
    spliced = vlm.read([typed], pixels_I3HW[:1], "none", None, "keep", {})
    close(spliced.embeds_BLD[0, 0], vlm.language.embed_tokens.weight[tiny.IMAGE])
    close(spliced.embeds_BLD[:, 1:17], vlm.projector(vlm.tower(pixels_I3HW[:1]).x_BND))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "K"), EVERY)
def test_a_batch_equals_one_prompt_at_a_time(vlm, pixels_I3HW, name, K, policy):
    together = vlm.logits(ROWS, pixels_I3HW, name, K, policy)
    first = 0
    for b, row in enumerate(ROWS):
        own = pixels_I3HW[first : first + len(row.runs)]
        first += len(row.runs)
        alone = vlm.logits([row], own, name, K, policy)[0]
        close(together[b, -len(alone) :], alone)
    assert together.isfinite().all()  # on padding too


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CHOOSING)
def test_keeping_all_gives_the_unpruned_bits(vlm, pixels_I3HW, name, policy):
    full = vlm.logits(ROWS, pixels_I3HW)
    assert vlm.logits(ROWS, pixels_I3HW, name, tiny.N, policy).equal(full)
    assert vlm.logits(ROWS, pixels_I3HW, name, tiny.N - 1, policy).shape != full.shape


def test_a_token_sees_itself_and_what_is_before_it_but_no_padding():
    seen_1LL = visible(torch.tensor([[False, True, True]]))
    assert seen_1LL.int().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]  # padding: itself only


def test_a_method_reads_the_layer_it_is_told(vlm, pixels_I3HW):
    row_IN = vlm.tower(pixels_I3HW, {"cls_attention": 0}).cls_attention_BN
    assert row_IN is not None
    spliced = vlm.read(ROWS[:1], pixels_I3HW[:1], "cls_attention", 4, "keep", {"layer": 0})
    best = np.sort(np.argsort(-row_IN[0].numpy(), kind="stable")[:4])
    start = ROWS[0].runs[0][0]
    assert (spliced.positions_BL[0, start : start + 4] - start).tolist() == best.tolist()


# --- decoding -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "K"), EVERY)
def test_cached_decoding_equals_the_cache_free_recomputation(vlm, pixels_I3HW, name, K, policy):
    state = vlm.prefill(ROWS, pixels_I3HW, name, K, policy)
    said = tiny.row("yes the red star is left of it").ids
    for i in range(len(said) + 1):
        longer = [tiny.Prompt([*row.ids, *said[:i]], row.runs) for row in ROWS]
        close(state.logits_BV, vlm.logits(longer, pixels_I3HW, name, K, policy)[:, -1])
        if i < len(said):
            vlm.step(state, torch.full((len(ROWS),), said[i]))


def greedy(vlm: VLM, pixels_I3HW, name: str, K: int, policy: str, tokens: int) -> list[list[int]]:
    """The same without a cache: everything is read again for every token."""
    rows: list = list(ROWS)
    for _ in range(tokens):
        best_B = vlm.logits(rows, pixels_I3HW, name, K, policy)[:, -1].argmax(-1).tolist()
        rows = [tiny.Prompt([*r.ids, t], r.runs) for r, t in zip(rows, best_B, strict=True)]
    return [row.ids[len(first.ids) :] for row, first in zip(rows, ROWS, strict=True)]


def endless(vlm: VLM) -> VLM:
    """The same model with an end token that no score can choose."""
    model = VLM(replace(vlm.config, eos_token_id=-1)).eval()
    model.load_state_dict(vlm.state_dict())
    return model


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "K"), [("none", 16), ("norm", 5), ("similarity", 4)])
def test_generate_says_what_recomputation_without_a_cache_says(vlm, pixels_I3HW, name, K, policy):
    said = endless(vlm).generate(ROWS, pixels_I3HW, name, K, policy, max_tokens=6)
    assert said == greedy(vlm, pixels_I3HW, name, K, policy, 6)


def test_each_row_stops_at_its_own_end_token(vlm, pixels_I3HW):
    said = endless(vlm).generate(ROWS, pixels_I3HW, max_tokens=6)
    model = endless(vlm)
    model.config = replace(vlm.config, eos_token_id=said[0][2])
    expected = [row[: row.index(said[0][2])] if said[0][2] in row else row for row in said]
    assert model.generate(ROWS, pixels_I3HW, max_tokens=6) == expected
    assert len(expected[0]) <= 2


# --- the learned pruner ---------------------------------------------------------------


def test_pooled_slots_are_renumbered_whatever_the_policy(pooled, pixels_I3HW):
    keep, count = (pooled.logits(ROWS, pixels_I3HW, "attention_pool", None, p) for p in POLICIES)
    assert keep.equal(count)
    spliced = pooled.read(ROWS[:1], pixels_I3HW[:1], "attention_pool", None, "keep", {})
    length = len(ROWS[0].ids) - tiny.N + 6
    assert spliced.positions_BL.tolist() == [list(range(length))]
    assert spliced.next_B.tolist() == [length]


def test_pooled_tokens_are_mixtures_of_the_learned_values_projected(pooled, pixels_I3HW):
    pool, x_1ND = pooled.pool, pooled.tower(pixels_I3HW[:1]).x_BND
    q_KD, k_1ND = pool.pool_q_proj(pool.pool_queries), pool.pool_k_proj(x_1ND)
    share_1KN = (q_KD @ k_1ND.mT / q_KD.shape[-1] ** 0.5).softmax(-1)
    spliced = pooled.read(ROWS[:1], pixels_I3HW[:1], "attention_pool", None, "keep", {})
    start = ROWS[0].runs[0][0]
    by_hand_1KD = pooled.projector(share_1KN @ pool.pool_v_proj(x_1ND))
    close(spliced.embeds_BLD[:, start : start + 6], by_hand_1KD)


def test_pooled_tokens_are_the_softmax_of_the_queries_worked_by_hand():
    from torch_ref.pruners.attention_pool import AttentionPool

    pool = AttentionPool(1, 4)
    for projection in (pool.pool_q_proj, pool.pool_k_proj, pool.pool_v_proj):
        projection.weight.data, projection.bias.data = torch.eye(4), torch.zeros(4)
    pool.pool_queries.data = torch.tensor([[2.0, 0, 0, 0]])
    x_1ND = torch.tensor([[[np.log(3), 0, 0, 0], [0, 8.0, 0, 0]]], dtype=torch.float32)
    kept = pool.prune(Signals(x_1ND, (1, 2)), 1)  # scores 2 ln 3 / sqrt(4) and 0: shares 3/4, 1/4
    close(kept.tokens(x_1ND), torch.tensor([[[0.75 * np.log(3), 2.0, 0, 0]]]).float())


def test_a_budget_that_the_learned_pruner_was_not_trained_for_is_refused(pooled, pixels_I3HW):
    with pytest.raises(UserError, match="attention_pool keeps 6 tokens, not 5"):
        pooled.logits(ROWS, pixels_I3HW, "attention_pool", 5)


def test_cached_decoding_with_a_learned_pruner_equals_recomputation(pooled, pixels_I3HW):
    state = pooled.prefill(ROWS, pixels_I3HW, "attention_pool")
    pooled.step(state, torch.tensor([9, 9, 9]))
    longer = [tiny.Prompt([*row.ids, 9], row.runs) for row in ROWS]
    close(state.logits_BV, pooled.logits(longer, pixels_I3HW, "attention_pool")[:, -1])


# --- reading what is published --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", ["vlm", "pooled"])
def test_from_pth_reads_every_weight_of_the_published_layout(request, tmp_path, which, dtype):
    model = request.getfixturevalue(which)
    read = VLM.from_pth(*tiny.publish(model, tmp_path, dtype), device=CPU)
    held, expected = read.state_dict(), model.state_dict()
    assert held.keys() == expected.keys()
    assert all(held[name].equal(expected[name].to(dtype).float()) for name in held)
    assert read.config.vision == tiny.VISION
    assert read.config.text == tiny.TEXT
    assert read.config.pool_tokens == model.config.pool_tokens


def test_from_pth_reads_a_tower_that_transformers_saved(vlm, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    pth, _ = tiny.publish(vlm, tmp_path)
    theirs = CLIPVisionModel(CLIPVisionConfig(**asdict(tiny.VISION)))
    theirs.save_pretrained(tmp_path / "saved")
    read = VLM.from_pth(pth, tmp_path / "saved", device=CPU)
    saved = theirs.state_dict()
    assert all(saved[name].equal(tensor) for name, tensor in read.tower.state_dict().items())


def lose(state):
    del state["model.layers.1.mlp.up_proj.weight"]


def add(state):
    state["vision_proj.mlp.0.weight"] = torch.zeros(3)


def crop(state):
    state["model.norm.weight"] = state["model.norm.weight"][:-1]


def loosen(state):
    state["lm_head.weight"] = state["lm_head.weight"] + 1


def odd(state):
    state["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(7, 48)


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (lose, r"model.layers.1.mlp.up_proj.weight is missing"),
        (add, r"vision_proj.mlp.0.weight belongs to no part"),
        (crop, r"model.norm.weight has shape \(47,\), not \(48,\)"),
        (loosen, "lm_head.weight differs"),
        (odd, "make no heads"),
    ],
)
def test_weights_that_are_no_minimind2_v_are_refused_in_one_sentence(vlm, tmp_path, harm, part):
    pth, clip_folder = tiny.publish(vlm, tmp_path)
    state = torch.load(pth, weights_only=True)
    harm(state)
    torch.save(state, pth)
    with pytest.raises(UserError, match=part) as caught:
        VLM.from_pth(pth, clip_folder, device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not a pickle", b"PK\x03\x04 cut off"])
def test_a_pth_that_cannot_be_read_is_refused_in_one_sentence(vlm, tmp_path, content):
    pth, clip_folder = tiny.publish(vlm, tmp_path)
    pth.unlink()
    if content is not None:
        pth.write_bytes(content)
    with pytest.raises(UserError, match=r"published.pth") as caught:
        VLM.from_pth(pth, clip_folder, device=CPU)
    assert "\n" not in str(caught.value)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(vlm, tmp_path):
    pth, clip_folder = tiny.publish(vlm, tmp_path)

    class Harm:
        def __reduce__(self):
            return (type(tmp_path).mkdir, (tmp_path / "harmed",))

    torch.save({"model.norm.weight": Harm()}, pth)
    with pytest.raises(UserError, match="cannot be read"):
        VLM.from_pth(pth, clip_folder, device=CPU)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]"])
def test_a_clip_folder_that_cannot_be_read_is_refused_in_one_sentence(vlm, tmp_path, name, content):
    pth, clip_folder = tiny.publish(vlm, tmp_path)
    (clip_folder / name).unlink()
    if content is not None:
        (clip_folder / name).write_bytes(content)
    with pytest.raises(UserError, match="CLIP folder") as caught:
        VLM.from_pth(pth, clip_folder, device=CPU)
    assert "\n" not in str(caught.value)


# --- what a user can get wrong --------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ({"pruner": "nrom"}, "no pruner is called 'nrom'"),
        ({"pruner": "attention_pool"}, "holds no weights"),
        ({"pruner": "none", "K": 5}, "none keeps all 16"),
        ({"pruner": "norm", "K": 0}, "keep 1 to 16"),
        ({"pruner": "norm", "K": 17}, "keep 1 to 16"),
        ({"positions": "count"}, "keep or renumber"),
        ({"pixels_I3HW": None}, "place 3 images, and 0 are given"),
        ({"rows": [], "pixels_I3HW": None}, "at least one prompt"),
    ],
)
def test_what_does_not_fit_is_refused(vlm, pixels_I3HW, how, part):
    with pytest.raises(ValueError, match=part):
        vlm.logits(**{"rows": ROWS, "pixels_I3HW": pixels_I3HW, **how})


# --- the pruners' own definitions, worked by hand -------------------------------------


def of(x_ND: list, grid: tuple[int, int], cls: list | None = None) -> Signals:
    row_1N = None if cls is None else torch.tensor([cls]).float()
    return Signals(torch.tensor([x_ND]).float(), grid, cls_attention_BN=row_1N)


def test_norm_keeps_the_longest_and_of_equals_the_first():
    kept = reduce("norm", of([[1, 0], [0, 3], [2, 0], [0, 2], [-2, 0]], (1, 5)), 3)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[1, 2, 3]]


def test_cls_attention_keeps_the_most_attended_and_of_equals_the_first():
    kept = reduce("cls_attention", of([[0]] * 5, (1, 5), [0.1, 0.3, 0.1, 0.1, 0.3]), 3)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[0, 1, 4]]


def test_windows_cover_a_narrow_grid_whose_square_share_of_bands_exceeds_k():
    """9 x 1 in 2: square windows would want 4 bands, of which two had no window."""
    x_ND = [[float(i)] for i in range(9)]
    kept = reduce("avgpool", of(x_ND, (9, 1)), 2)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[1, 6]]
    close(kept.tokens(torch.tensor([x_ND])), torch.tensor([[[1.5], [6.0]]]))


X, Y, Z = [1, 0, 0], [0, 1, 0], [0, 0, 1]


def test_similarity_dissolves_the_smallest_clusters_when_there_are_too_many():
    """X X Y Z Z: Y's cluster goes, and Y, which is like neither, joins the first."""
    kept = reduce("similarity", of([X, X, Y, Z, Z], (1, 5)), 2)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[0, 3]]
    third = 1 / 3
    by_hand = torch.tensor([[[third, third, third, 0, 0], [0, 0, 0, 0.5, 0.5]]])
    assert kept.weight_BKN is not None
    close(kept.weight_BKN, by_hand)


def test_similarity_lets_the_least_alike_stand_alone_when_there_are_too_few():
    """One cluster; the third token is the least like its leader."""
    kept = reduce("similarity", of([[1, 0], [1, 0.1], [1, 0.4], [1, 0.2]], (1, 4)), 2)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[0, 2]]
    assert kept.weight_BKN is not None
    third = 1 / 3
    close(kept.weight_BKN, torch.tensor([[[third, third, 0, third], [0, 0, 1, 0]]]))


def test_similarity_as_published_fills_up_with_the_first_followers():
    kept = reduce("similarity", of([X, X, X, X], (1, 4)), 3, published=True)
    assert kept.index_BK is not None and kept.index_BK.tolist() == [[0, 1, 2]]
    assert kept.weight_BKN is not None
    by_hand = torch.tensor([[[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0]]])
    close(kept.weight_BKN, by_hand)
