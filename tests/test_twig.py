"""Promises of a twig: how many tokens go on, what it reads, and which weights it takes.

Shapes: B prompts, L rows, D features, n visual tokens of an image.
"""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.__main__ import main as convert
from mlx_vlm_prune import generate
from mlx_vlm_prune.checkpoints.config import MiniMindConfig, VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.models.decoder import Cuts, Decoder, LayerInput
from mlx_vlm_prune.models.layers import TwigReader, run_layers
from mlx_vlm_prune.models.learned import read_learned
from mlx_vlm_prune.models.splice import Spliced
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.pruners import METHODS, plan
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, question_set
from torch_ref.models import decoder
from torch_ref.models.language.minimind import MiniMind
from torch_ref.models.language.twig import Twig, grown
from torch_ref.pruners import METHODS as REFERENCE

from . import tiny
from .pruner_cases import close

L = 11
PADDED = 3  # rows of the second prompt that are not there
PLACES_BL = [[0, 1, 2, 5, 6, 9, 10, 11, 12, 20, 21], [-1] * PADDED + [0, 1, 3, 4, 7, 8, 9, 11]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Base and twigs of one to three layers with the same random weights in both frameworks."""
    theirs = tiny.reference()
    folder = tiny.checkpoint(theirs, tmp_path_factory.mktemp("twig"))
    ours, _ = load(folder, dtype="float32")
    twigs = {}
    for layers in (1, 2, 3):
        torch.manual_seed(layers)
        twig = Twig(tiny.TEXT, layers, 1)
        for parameter in twig.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        twigs[layers] = twig, read(twig, folder, ours)
    return SimpleNamespace(ours=ours, theirs=theirs, twigs=twigs, folder=folder)


def read(twig: Twig, folder, model: VLM, **changes):
    """The reference's twig as the product reads it from a file; of a change None is left out."""
    state = {f"twig.{key}": value.contiguous() for key, value in twig.state_dict().items()}
    state |= {f"twig.{key}": value for key, value in changes.items()}
    save_file({k: v for k, v in state.items() if v is not None}, folder / "pruners.safetensors")
    learned = read_learned(folder, model)["twig"]
    mx.eval(learned.parameters())  # MLX reads late, and the next twig may be written over this one
    return learned


# --- how many go on -------------------------------------------------------------------


@pytest.mark.parametrize("methods", [METHODS, REFERENCE])
@pytest.mark.parametrize(("average", "kept"), [(192, 227), (128, 134), (64, 41)])
def test_the_papers_budgets_of_llava_leave_the_papers_numbers(methods, average, kept):
    """L = 32, V = 576, K = 2, F = 24: of 192, (6144 - 1152) / 22 = 226.9."""
    assert methods["twig"].schedule(32, 576, average) == {2: kept, 24: 0}


@pytest.mark.parametrize("methods", [METHODS, REFERENCE])
def test_the_smallest_and_the_largest_budget_that_can_be_met(methods):
    schedule = methods["twig"].schedule
    assert schedule(32, 576, 37) == {2: 2, 24: 0}  # 32 rows for 22 layers
    assert schedule(32, 576, 432) == {2: 576, 24: 0}  # 24 layers of 32 hold all
    for beyond in (36, 433):
        with pytest.raises(ValueError):
            schedule(32, 576, beyond)


@pytest.mark.parametrize(
    ("K", "options", "part"),
    [
        (36, {}, "before layer 2 hold all; keep more than 36"),
        (433, {}, "from layer 24 on hold none; keep at most 432"),
        (192, {"wipe": 2}, "wipe is layer 2; it must come after the cut at layer 2"),
        (192, {"layer": 0}, "layer is 0"),
        (192, {"wipe": 32}, "there are layers 0 to 31"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_in_a_sentence(K, options, part):
    with pytest.raises((ValueError, UserError), match=part):
        METHODS["twig"].schedule(32, 576, K, **options)


def test_deep_caches_hold_no_visual_rows_and_the_words_keep_their_places(pair):
    row, words = tiny.row("user # what is it ?"), tiny.row("user  what is it ?").ids
    pixels = mx.array(np.random.default_rng(2).normal(size=(1, 64, 64, 3)).astype(np.float32))
    before = pair.ours([row], pixels, plan("twig", {"twig": pair.twigs[2][1]}), 9)
    assert [c.rows - len(words) for c in before.cache] == [16, 11, 0]  # (27 - 16) / 1
    (start, length) = row.runs[0]
    places = [*range(start), *range(start + length, len(row.ids))]
    assert np.array(before.cache[2].positions_BS)[0, : len(words)].tolist() == places
    held = np.array(before.cache[1].positions_BS)[0, start : start + 11] - start
    (kept,) = before.trace.steps[-2].reductions
    assert held.tolist() == np.array(kept.index_BK)[0].tolist()
    assert before.next_B1.item() == len(row.ids)


# --- what it reads --------------------------------------------------------------------


@pytest.mark.parametrize("piece", [4, 2048])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_its_row_of_attention_is_that_of_whole_attention(pair, monkeypatch, layers, piece):
    """With gaps between positions, a padded prompt, and a bias on what two rows get."""
    monkeypatch.setattr("mlx_vlm_prune.models.layers.PREFILL_STEP_SIZE", piece)
    theirs, ours = pair.twigs[layers]
    rng = np.random.default_rng(layers)
    x_BLD = rng.normal(size=(2, L, tiny.TEXT.hidden_size)).astype(np.float32)
    bias_BL = np.zeros((2, L), np.float32)
    bias_BL[:, 4:6] = 0.7, 1.1
    places = mx.array(PLACES_BL)
    spliced = Spliced(
        mx.array(x_BLD), places, places[:, -1:] + 1, [L, L - PADDED], [[(2, 5)], [(1, 5)]],
        mx.array(bias_BL),
    )  # fmt: skip
    cache = pair.ours.language.make_cache()
    before = run_layers(pair.ours.language, range(1), spliced, cache)  # fills the cache of layer 0
    inside = Decoder(pair.ours.language, cache, Cuts(twig=TwigReader(ours)))
    at = LayerInput(inside, 1, spliced, before, [0, 1], (1, 5))
    rows_In = np.array(at.twig_attention()["twig_attention_BN"])
    for b, (ahead, start) in enumerate(((0, 2), (PADDED, 1))):
        one = decoder.PromptRows(
            torch.from_numpy(x_BLD[b : b + 1, ahead:]), torch.tensor([PLACES_BL[b][ahead:]]),
            0, [(start, 5)], torch.from_numpy(bias_BL[b, ahead:]),
        )  # fmt: skip
        with torch.no_grad():
            whole_LL = decoder.twig_attention(theirs, one)
        close(rows_In[b], whole_LL[-1, start : start + 5].numpy())


def test_one_that_has_all_the_layers_above_says_what_the_base_says(pair):
    """As it begins, before training: in both frameworks, by its own norm and output layer."""
    language = pair.theirs.language
    x_BLD = torch.randn(2, L, tiny.TEXT.hidden_size, generator=torch.Generator().manual_seed(0))
    position_BL = torch.tensor([PLACES_BL[0]] * 2)
    rotary = language.rotary(position_BL)
    mask_LL = decoder.causal_mask(L, torch.device("cpu"))
    twig = grown(language, 1, 2)
    ours = read(twig, pair.folder, pair.ours)
    with torch.no_grad():
        whole = language.logits(language(x_BLD, position_BL))
        first = language.layers[0](x_BLD, rotary, mask_LL[None, None], None)
        logits = twig.head(twig(first, position_BL, mask_LL[None]))
    close(logits.numpy(), whole.numpy())
    states, places = mx.array(first.numpy()), mx.array(PLACES_BL[:1] * 2)
    close(np.array(ours.logits(ours.run(range(2), states, places, ours.make_cache()))),
          whole.numpy())  # fmt: skip


def test_one_on_a_base_with_an_output_layer_of_its_own_begins_with_that():
    language = MiniMind(replace(tiny.TEXT, tie_word_embeddings=False))
    x_BLD, position_BL = torch.randn(1, L, tiny.TEXT.hidden_size), torch.arange(L)[None]
    twig, mask_LL = grown(language, 1, 2), decoder.causal_mask(L, torch.device("cpu"))
    with torch.no_grad():
        whole = language.logits(language(x_BLD, position_BL))
        first = language.layers[0](x_BLD, language.rotary(position_BL), mask_LL, None)
        close(twig.head(twig(first, position_BL, mask_LL[None])).numpy(), whole.numpy())


def test_it_reads_half_precision_as_the_base_does(pair):
    read(pair.twigs[2][0], pair.folder, pair.ours)
    model, _ = load(pair.folder, dtype="float16")
    twig = model.learned["twig"]
    assert twig.layers[1].mlp.up_proj.weight.dtype == mx.float16
    pixels = mx.random.normal((1, 64, 64, 3)).astype(mx.float16)
    before = model([tiny.row("what is # ?")], pixels, plan("twig", model.learned), 9)
    assert before.logits_BLV.dtype == mx.float16 and mx.isfinite(before.logits_BLV).all().item()


def test_one_on_a_mixture_of_experts_reads_as_the_reference_does(tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    text = replace(tiny.TEXT, **sizes)
    torch.manual_seed(3)
    twig = Twig(text, 2, 1)
    model = VLM(VLMConfig(text=MiniMindConfig(**vars(text))))
    ours = read(twig, tmp_path, model)
    x_BLD = torch.randn(1, L, text.hidden_size)
    with torch.no_grad():
        mask = decoder.causal_mask(L, torch.device("cpu"))[None]
        theirs = twig.head(twig(x_BLD, torch.tensor(PLACES_BL[:1]), mask))
    states = ours.run(range(2), mx.array(x_BLD.numpy()), mx.array(PLACES_BL[:1]), ours.make_cache())
    close(np.array(ours.logits(states)), theirs.numpy())


def test_a_twig_begins_where_the_base_has_layers():
    language = tiny.reference().language
    for layer, layers in ((0, 1), (3, 1), (1, 3), (2, 0)):
        with pytest.raises(ValueError, match="no beginning in 3 layers"):
            grown(language, layer, layers)


# --- which weights it takes -----------------------------------------------------------

Q = "layers.1.self_attn.q_proj.weight"
FAULTS = {
    "no layer": ({"layer": None}, "twig.layer is None, not a whole number from 1 to 2"),
    "layer 0": ({"layer": torch.zeros(1)}, "twig.layer is 0.0"),
    "layer beyond": ({"layer": torch.tensor([3.0])}, "twig.layer is 3.0"),
    "half a layer": ({"layer": torch.tensor([1.5])}, "twig.layer is 1.5"),
    "layer nan": ({"layer": torch.tensor([torch.nan])}, "twig.layer is nan"),
    "layers": ({"layer": torch.ones(2)}, "twig.layer is None"),
    "missing": ({Q: None}, f"twig.{Q} is None"),
    "misshapen": ({Q: torch.zeros(48, 47)}, rf"twig.{Q} is \(48, 47\), not \(48, 48\)"),
    "one too many": ({"tail.weight": torch.zeros(3)}, "twig.tail.weight"),
    "a gap": ({"layers.7.norm.weight": torch.zeros(3)}, "twig.layers"),
    "deeper than the base": (
        {f"layers.{n}.x": torch.zeros(1) for n in range(2, 9)}, "9 layers; this model allows 1 to 3"
    ),
    "experts without numbers": (
        {"layers.0.mlp.experts.x.up_proj.weight": torch.zeros(1)}, "the twig's experts"
    ),
    "experts of two sizes": (
        {f"layers.0.mlp.experts.{n}.up_proj.weight": torch.zeros(n + 1) for n in (0, 1)},
        "the twig's experts",
    ),
    "experts of a base that has none": (
        {"layers.0.mlp.experts.0.up_proj.weight": torch.zeros(1)}, "twig.layers.0.mlp.experts.up"
    ),
    "no head": ({"head.weight": None}, "twig.head.weight is None"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_refused_by_name(pair, tmp_path, fault):
    changes, part = FAULTS[fault]
    with pytest.raises(UserError, match=part):
        read(pair.twigs[2][0], tmp_path, pair.ours, **changes)


def published(twig: Twig, file, **changes) -> dict[str, torch.Tensor]:
    """A file in TwigVLM's layout; of a change None is left out."""
    names = {"layers.": "model.layers.", "norm.": "model.norm.", "head.": "lm_head."}
    state = {}
    for key, value in twig.state_dict().items():
        for ours, theirs in names.items():
            if key.startswith(ours):
                state[theirs + key.removeprefix(ours)] = value.half().contiguous()
    state = {k: v for k, v in {**state, **changes}.items() if v is not None}
    save_file(state, file)
    return state


@pytest.mark.parametrize("few", [[], ["-q", "--q-bits", "8", "--q-group-size", "32"]])
def test_a_published_twig_goes_with_a_model_byte_for_byte(pair, tmp_path, few):
    twig, file = pair.twigs[2][0], tmp_path / "model.safetensors"
    state = published(twig, file)
    base, target = tmp_path / "base", tmp_path / "with"
    shutil.copytree(pair.folder, base, ignore=shutil.ignore_patterns("pruners.*"))
    other = {"score_prune.fc2.bias": torch.ones(1)}
    save_file({**other, "twig.old": torch.ones(1)}, base / "pruners.safetensors")
    convert(["to-mlx", str(base), str(target), "--twig", str(file), "--twig-layer", "1", *few])
    held = load_file(target / "pruners.safetensors")
    assert held.pop("twig.layer").tolist() == [1.0]
    assert held.pop("score_prune.fc2.bias").tolist() == [1.0]
    assert len(held) == len(state)
    for name, tensor in state.items():
        ours = name.replace("model.", "").replace("lm_head", "head")
        assert held[f"twig.{ours}"].dtype == torch.float16 and held[f"twig.{ours}"].equal(tensor)
    save_file({k: v for k, v in load_file(target / "pruners.safetensors").items() if k[0] == "t"},
              target / "pruners.safetensors")  # fmt: skip
    model, _ = load(target)  # the scorer was a stand-in
    assert len(model.learned["twig"].layers) == 2 and model.learned["twig"].layer == 1


@pytest.mark.parametrize(
    ("flags", "changes", "part"),
    [
        (["--twig-layer", "3"], {}, "grows on layer 1 to 2"),
        ([], {}, "belong together"),
        (["--twig-layer", "1"], {"lm_head.weight": None}, "lm_head.weight is None"),
        (["--twig-layer", "1"], {"model.more": torch.ones(1)}, r"model.more is \(1,\)"),
        (["--twig-layer", "1"], {"model.norm.weight": torch.ones(47)}, r"norm.weight is \(47,\)"),
        (["--twig-layer", "1"], {"model.norm.weight": torch.ones(48).int()}, "is I32"),
        (
            ["--twig-layer", "1"],
            {f"model.layers.{i}.x": torch.ones(1) for i in range(5)},
            "has 5 layers; a twig of this model has 1 to 3",
        ),
    ],
)
def test_a_published_twig_that_does_not_fit_is_refused(
    pair, tmp_path, capsys, flags, changes, part
):
    published(pair.twigs[1][0], tmp_path / "t.safetensors", **changes)
    target = tmp_path / "with"
    with pytest.raises(SystemExit) as stop:
        convert(["to-mlx", str(pair.folder), str(target), "--twig",
                 str(tmp_path / "t.safetensors"), *flags])  # fmt: skip
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and re.search(part, message) and not target.exists()


def test_the_layer_is_that_of_the_weights_and_no_other(pair):
    learned = {"twig": pair.twigs[1][1]}
    (pruner,) = plan("twig", learned).steps
    assert pruner.call(pruner.method.schedule, 3, 16, 9) == {1: 11, 2: 0}
    assert plan("twig:layer=1", learned).spec == "twig:layer=1.0"
    with pytest.raises(UserError, match="twig was trained for layer=1; leave layer out"):
        plan("twig:layer=2", learned)


def test_the_built_in_twig_finds_what_is_asked_for():
    """The base's own attention in the same place, which pyramiddrop reads, does not."""
    model, processor = load()
    questions = [(s, q) for s, several in question_set(HELD_OUT_SEEDS, 12) for q in several]
    places = [(scene, question) for scene, question in questions if question.kind == "grounding"]
    correct = {"twig": 0, "pyramiddrop:start=0.25,stages=1": 0}
    for spec in correct:
        for scene, question in places:
            answer = generate(
                model, processor, question.text, scene.image(), pruner=spec, keep_tokens=98,
                positions="keep", max_tokens=4,
            )  # fmt: skip
            correct[spec] += answer.text == question.answer
    mine, base = correct.values()
    assert len(places) == 12 and mine >= 10 and base <= 7, correct
