"""Promises about language models of mlx-lm's below our towers: computed and pruned right.

The oracles are transformers' own models, unpruned; pruned, the reference, which calls
transformers' layers with the rows that stay and their positions; our own decoder; and the prompt
read again without a cache.

Shapes: I images, L rows, V words.
"""

import importlib
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration as Llava

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")


from convert.__main__ import main
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.backbones import text_config
from mlx_vlm_prune.checkpoints.config import MlxLmConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.models.language.mlx_lm import MlxLm
from mlx_vlm_prune.planning.operations import count
from mlx_vlm_prune.pruners import METHODS, Pipeline, Stage, plan
from torch_ref.models.loading import load_llava

from . import backbones, llava
from .backbones import KINDS, theirs
from .llava import N
from .pruner_cases import close
from .test_llava import as_mx, ours, pixels
from .test_llava import theirs as whole
from .test_model import POLICIES, K, Replaying, steps_of

CPU = torch.device("cpu")
IN_DECODER = [n for n, m in METHODS.items() if m.stage is Stage.DECODER and n != "twig"]
CHAINS = ["norm", "visionzip+fastv", "cls_attention+restore", "tome:r=2", "fastv+restore"]
SCANNED = ["v2drop", "vtw", "norm", "tome:r=2", "visionzip+v2drop"]  # what a Mamba can do
ABLE = [(kind, spec) for kind in KINDS if kind != "mamba" for spec in (*IN_DECODER, *CHAINS)]
ABLE += [("mamba", spec) for spec in SCANNED]
CUT = [(kind, spec) for kind, spec in ABLE if "fastv" in spec or spec in IN_DECODER]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each kind's weights in transformers, in the reference and in MLX, made once."""
    made = {}

    def get(kind: str) -> SimpleNamespace:
        if kind not in made:
            folder = backbones.write(kind, tmp_path_factory.mktemp("hf"))
            model, processor = load(folder, dtype="float32")
            assert isinstance(model.language, MlxLm)
            made[kind] = SimpleNamespace(
                theirs=backbones.random_model(kind), reference=load_llava(folder, CPU), ours=model,
                folder=folder, processor=processor,
            )  # fmt: skip
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(kind, models):
    both, asked, seen = models(kind), llava.prompt(2), pixels(2)
    expected = theirs(both.theirs, asked, seen)
    if kind != "mamba":
        np.testing.assert_array_equal(expected, whole(both.theirs, asked, seen))
    assert np.abs(expected).max() > 0.5
    close(ours(both.ours, asked, seen), expected)
    with torch.no_grad():
        close(both.reference.logits([asked], seen)[0].numpy(), expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("kind", "spec"), ABLE)
def test_every_method_prunes_as_in_transformers_layers(kind, spec, policy, models):
    both, rows, seen = models(kind), [llava.prompt(2), llava.prompt(1)], pixels(3)
    chain, steps = plan(spec), steps_of(both, spec, K)
    before = both.ours(rows, as_mx(seen), chain, K, policy, last_only=False)
    with torch.no_grad():
        expected = both.reference.logits(rows, seen, steps, positions=policy).numpy()
    left = before.trace.steps[-1].reductions[0].slots
    assert left < N
    for b, row in enumerate(rows):
        length = len(row.ids) - len(row.runs) * (N - left)
        close(np.array(before.logits_BLV)[b, -length:], expected[b, -length:])


@pytest.mark.parametrize(("kind", "spec"), [pair for pair in CUT if pair[0] != "mamba"])
def test_rows_that_stand_where_a_compaction_puts_them_give_other_logits(
    kind, spec, models, monkeypatch
):
    """The check can fail: positions that count the rows of a layer, where kept ones are meant."""
    stock = MlxLm.run

    def run(self, numbers, x_BLD, positions_BL, cache, **options):
        counted = mx.broadcast_to(mx.arange(x_BLD.shape[1]), positions_BL.shape)
        return stock(self, numbers, x_BLD, counted, cache, **options)

    monkeypatch.setattr(MlxLm, "run", run)
    both, asked, seen = models(kind), llava.prompt(1), pixels(1)
    before = both.ours([asked], as_mx(seen), plan(spec), K, "keep", last_only=False)
    with torch.no_grad():
        expected = both.reference.logits([asked], seen, steps_of(both, spec, K)).numpy()
    L = before.logits_BLV.shape[1]
    with pytest.raises(AssertionError):
        close(np.array(before.logits_BLV)[0, -3:], expected[0, -L:][-3:])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_near_the_reference(kind, tmp_path):
    """The reference has the same rounded weights and computes in float32."""
    folder = backbones.write(kind, tmp_path / "hf", dtype=torch.float16)
    model, _ = load(folder, dtype="float16")
    asked, seen = llava.prompt(2), pixels(2).half().float()
    before = model([asked], as_mx(seen).astype(mx.float16), plan("uniform"), K, last_only=False)
    assert before.logits_BLV.dtype == mx.float16
    with torch.no_grad():
        expected = load_llava(folder, CPU).logits([asked], seen, "uniform", K)[0].numpy()
    got = np.array(before.logits_BLV.astype(mx.float32))[0]
    assert np.abs(got - expected).max() <= 5e-3 * np.abs(expected).max()


def test_positions_are_nothing_to_a_mamba(models):
    both, asked, seen = models("mamba"), llava.prompt(1), pixels(1)
    kept, counted = (
        both.ours([asked], as_mx(seen), plan("v2drop"), K, policy, last_only=False).logits_BLV
        for policy in POLICIES
    )
    assert mx.array_equal(kept, counted)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("kind", "spec"), [*ABLE, *((kind, "none") for kind in KINDS)])
def test_cached_decoding_equals_reading_again_without_a_cache(kind, spec, policy, models):
    both, row, said = models(kind), llava.prompt(2), [8, 13, 21, 9]
    budget, chain, seen = N if spec == "none" else K, Replaying(both, spec), as_mx(pixels(2))
    before = both.ours([row], seen, chain.pipeline, budget, policy, last_only=False)
    chain.again = True
    whole = Prompt([*row.ids, *said], row.runs)
    after = both.ours([whole], seen, chain.pipeline, budget, policy, last_only=False)
    position_B1 = before.next_B1
    for i, token in enumerate(said):
        got = before.step(mx.array([[token]]))
        position_B1 = position_B1 + 1
        close(np.array(got)[0, 0], np.array(after.logits_BLV)[0, i - len(said)])


@pytest.mark.parametrize(("kind", "spec"), ABLE)
def test_keeping_all_gives_the_unpruned_bits(kind, spec, models):
    model, asked, seen = models(kind).ours, [llava.prompt()], as_mx(pixels())
    full = model(asked, seen, plan("none"), N).logits_BLV
    assert mx.array_equal(model(asked, seen, plan(spec), N).logits_BLV, full)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_one_prompt_at_a_time_while_decoding_too(kind, models):
    model, rows, seen = models(kind).ours, [llava.prompt(2), llava.prompt(1)], as_mx(pixels(3))
    together, said, image = model(rows, seen, plan("v2drop"), K), [9, 12], 0
    each = []
    for row in rows:
        own, image = seen[image : image + len(row.runs)], image + len(row.runs)
        each.append(model([row], own, plan("v2drop"), K))
    close(np.array(together.logits_BLV), np.concatenate([np.array(e.logits_BLV) for e in each]))
    for token in said:
        got = together.step(mx.full((2, 1), token))
        for b, alone in enumerate(each):
            one = alone.step(mx.full((1, 1), token))
            close(np.array(got)[b], np.array(one)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_read_in_pieces_gives_the_same_as_at_once(kind, models, monkeypatch):
    model, rows, seen = models(kind).ours, [llava.prompt(2), llava.prompt(1)], as_mx(pixels(3))
    expected = np.array(model(rows, seen, plan("v2drop"), K).logits_BLV)
    monkeypatch.setattr("mlx_vlm_prune.models.decoder.PREFILL_STEP_SIZE", 6)
    close(np.array(model(rows, seen, plan("v2drop"), K).logits_BLV), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma"])
def test_words_alone_get_the_logits_of_mlx_lms_own_model(kind, models):
    """But Gemma, which mlx-lm computes with another GELU than it was trained with."""
    language, ids = models(kind).ours.language, [5, 9, 30, 12, 7, 8]
    told = language.config.text_config
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    stock = module.Model(module.ModelArgs.from_dict(dict(told)))
    own = dict(tree_flatten(language.parameters()))
    if kind == "phi":
        own["lm_head.bias"] = mx.zeros(language.config.vocab_size)
    stock.load_weights(list(own.items()))
    got = models(kind).ours([Prompt(ids, [])], None, plan("none"), N, last_only=False)
    close(np.array(got.logits_BLV), np.array(stock(mx.array([ids]))))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", IN_DECODER)
@pytest.mark.parametrize("kind", ["vicuna", "qwen2 and siglip"])
def test_mlx_lms_llama_and_qwen2_prune_as_our_own_decoder(kind, spec, policy, tmp_path):
    """The same weights through either."""
    model = llava.random_model(kind)
    own, _ = load(llava.write(model, tmp_path / "hf"), dtype="float32")
    asked, seen = [llava.prompt(2), llava.prompt(1)], as_mx(pixels(3))
    expected = own(asked, seen, plan(spec), K, policy, last_only=False)
    text = model.config.text_config
    told = text_config(text.to_dict(), {}, tmp_path, has_head=True, has_head_bias=False)
    parts = dict(tree_flatten(own.language.parameters()))
    own.language = MlxLm(MlxLmConfig.from_dict(told))
    renamed = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in parts.items()}
    own.language.load_weights(list(renamed.items()))
    got = own(asked, seen, plan(spec), K, policy, last_only=False)
    for one, other in zip(got.trace.steps, expected.trace.steps, strict=True):
        pairs = zip(one.reductions, other.reductions, strict=True)
        assert all(mx.array_equal(a.index_BK, b.index_BK) for a, b in pairs)
    L = expected.rows[1]
    close(np.array(got.logits_BLV)[:, -L:], np.array(expected.logits_BLV)[:, -L:])


@pytest.mark.parametrize("kind", KINDS)
def test_counted_is_every_matrix_of_a_layer(kind, models):
    model = models(kind).ours
    parts = tree_flatten(model.language.layers[1].wrapped.parameters())
    assert model.config.text.layer_size == sum(p.size for _, p in parts if p.ndim > 1)
    work = count(model.config, 6, plan("v2drop"), K)
    full = count(model.config, 6, plan("none"), N)
    assert work.prefill < full.prefill and work.vision == full.vision


# --- folders --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_gives_the_same_bytes_under_the_same_names(kind, models, tmp_path, capsys):
    folder = models(kind).folder
    main(["to-mlx", str(folder), str(tmp_path / "mlx")])
    main(["to-hf", str(tmp_path / "mlx"), str(tmp_path / "hf")])
    was, now = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "hf"))
    was = {k: v for k, v in was.items() if ".head." not in k}  # SigLIP's, which no LLaVA reads
    assert was.keys() == now.keys()
    for name in was:
        assert was[name].shape == now[name].shape
        assert was[name].view(torch.uint8).equal(now[name].view(torch.uint8)), name
    told, again = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "hf"))
    assert told == again


@pytest.mark.parametrize("layout", llava.RENAMED)
@pytest.mark.parametrize("kind", ["phi", "mamba"])
def test_every_releases_names_are_read(kind, layout, models, tmp_path):
    folder = backbones.write(kind, tmp_path / "hf", layout=layout)
    model, _ = load(folder, dtype="float32")
    asked, seen = llava.prompt(), pixels()
    np.testing.assert_array_equal(ours(model, asked, seen), ours(models(kind).ours, asked, seen))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_a_converted_and_a_quantized_one_answer_pruned(kind, models, tmp_path, capsys):
    picture = Image.fromarray(np.random.randint(0, 255, (80, 96, 3), np.uint8))
    main(["to-mlx", str(models(kind).folder), str(tmp_path / "mlx")])
    options = ["-q", "--q-group-size", "32"]
    main(["to-mlx", str(models(kind).folder), str(tmp_path / "few"), *options])
    said = []
    for place in (models(kind).folder, tmp_path / "mlx", tmp_path / "few"):
        model, processor = load(place)
        answer = generate(
            model, processor, "where is the star ?", image=picture, max_tokens=4,
            pruner="visionzip+v2drop", keep_ratio=0.5,
        )  # fmt: skip
        assert answer.visual_tokens == N and answer.visual_tokens_kept == N // 2
        said.append(answer.token_ids)
    assert said[0] == said[1]


def test_a_llama_3_in_the_layout_of_llavas_authors_is_mlx_lms_too(models, tmp_path, capsys):
    model = models("llama").theirs
    turns = {k: v for k, v in backbones.TURNS.items() if k != "rope_theta"}
    fields = {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "rope_scaling": turns}
    folder = llava.write_original(model, tmp_path / "llava-v1.5", rope_theta=1e4, **fields)
    shutil.copytree(tmp_path / "clip", folder / "clip-vit-large-patch14-336")
    asked, seen = llava.prompt(2), pixels(2)
    expected = theirs(model, asked, seen)[:, : llava.WORDS]
    read_here, _ = load(folder, dtype="float32")
    assert isinstance(read_here.language, MlxLm)
    close(ours(read_here, asked, seen), expected)
    with torch.no_grad():
        close(load_llava(folder, CPU).logits([asked], seen)[0].numpy(), expected)
    main(["to-mlx", str(folder), str(tmp_path / "mlx"), "--vision", str(tmp_path / "clip")])
    main(["to-hf", str(tmp_path / "mlx"), str(tmp_path / "hf")])
    again = Llava.from_pretrained(tmp_path / "hf").eval()
    close(theirs(again, asked, seen), expected)


def test_an_output_layers_bias_counts(models, tmp_path):
    """Phi has one where transformers 4 saved the model, and none where version 5 did."""
    folder = shutil.copytree(models("phi").folder, tmp_path / "hf")
    state = load_file(folder / "model.safetensors")
    bias = torch.randn(len(state["language_model.lm_head.weight"]))
    save_file({**state, "language_model.lm_head.bias": bias}, folder / "model.safetensors")
    model, _ = load(folder, dtype="float32")
    asked, seen = llava.prompt(), pixels()
    close(ours(model, asked, seen), ours(models("phi").ours, asked, seen) + bias.numpy())


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("linear", [True, False])
def test_any_tower_goes_with_any_projector(tower, linear, models, tmp_path, capsys):
    """A folder of ours, put together of Phi, either tower, and one matrix or two."""
    source = models("phi" if tower == "clip_vision_model" else "qwen3").folder
    main(["to-mlx", str(source), str(tmp_path / "tower")])
    main(["to-mlx", str(models("phi").folder), str(tmp_path / "words")])
    told, words = (
        json.loads((tmp_path / place / "config.json").read_text()) for place in ("tower", "words")
    )
    state, own = (load_file(tmp_path / place / "model.safetensors") for place in ("tower", "words"))
    state = {k: v for k, v in state.items() if not k.startswith("language.")}
    state |= {k: v for k, v in own.items() if k.startswith("language.")}
    if linear:
        state = {k: v for k, v in state.items() if "projector.fc2" not in k}
        state = {k.replace("projector.fc1", "projector"): v for k, v in state.items()}
        told["projector"] = None
    told["text_config"] = words["text_config"]
    save_file(state, tmp_path / "words" / "model.safetensors", metadata={"format": "mlx"})
    reading = "preprocessor_config.json"
    shutil.copyfile(tmp_path / "tower" / reading, tmp_path / "words" / reading)
    (tmp_path / "words" / "config.json").write_text(json.dumps(told))
    model, _ = load(tmp_path / "words", dtype="float32")
    assert isinstance(model.language, MlxLm)
    asked, seen = llava.prompt(), as_mx(pixels())
    project, seen_BND = model.projector, model.tower(seen).signals.x_BND
    x_BND = project(seen_BND)
    expected = seen_BND @ state_of(state, "projector.weight").T if linear else x_BND
    if linear:
        close(np.array(x_BND), np.array(expected + state_of(state, "projector.bias")))
    pruned = model([asked], seen, plan("norm+fastv"), K)
    assert pruned.trace.steps[-1].reductions[0].slots < N and mx.isfinite(pruned.logits_BLV).all()


def state_of(state, name: str) -> mx.array:
    return mx.array(state[name].numpy())


def test_inspect_says_who_computes_the_language_model(models, tmp_path, capsys):
    main(["to-mlx", str(models("phi").folder), str(tmp_path / "mlx")])
    capsys.readouterr()
    for place in (models("phi").folder, tmp_path / "mlx"):
        main(["inspect", str(place)])
        told = capsys.readouterr().out
        assert "3 layers of 64, Phi, computed by mlx-lm" in told
        assert "4, and 2 for keys and values (from config.json)" in told
        assert "missing         nothing" in told


def test_lightvlms_shape_is_576_patches_below_phi_2(tmp_path, capsys):
    """CLIP-L/336 and Phi-2 as both are published, by headers: the data is a hole."""
    backbones.write_lightvlm(tmp_path)
    main(["inspect", str(tmp_path)])
    told = capsys.readouterr().out
    assert "32 layers of 2560, Phi, computed by mlx-lm" in told
    assert "CLIP, 24 layers of 1024, 24 x 24 patches of 14 pixels, features of layer 23" in told
    assert "two layers, 1024 to 2560" in told
    # Phi-2's 2,779,683,840 numbers, the tower's 303,507,456, the projector's 9,180,160
    assert "6184.7 MB, F16" in told


# --- what a user may give -------------------------------------------------------------


@pytest.mark.parametrize("spec", [n for n in IN_DECODER if n not in ("v2drop", "vtw")])
def test_methods_that_read_attention_are_refused_by_a_mamba_by_name(spec, models):
    model, asked, seen = models("mamba").ours, [llava.prompt()], as_mx(pixels())
    with pytest.raises(UserError, match=f"{spec} cannot prune a mamba: it reads attention"):
        model(asked, seen, plan(spec), K)


def test_what_adds_to_attention_is_refused_by_a_mamba_by_name(models):
    model, asked, seen = models("mamba").ours, [llava.prompt()], as_mx(pixels())
    with pytest.raises(UserError, match="restore cannot work in a mamba: it adds to the atten"):
        model(asked, seen, plan("norm+restore"), K)


def test_a_twig_is_refused_where_mlx_lm_computes_the_base(models):
    step = plan("fastv").steps[0]
    twig = Pipeline((replace(step, name="twig"),))
    with pytest.raises(UserError, match="twig cannot prune a phi of mlx-lm's"):
        models("phi").ours([llava.prompt()], as_mx(pixels()), twig, K)


def _in(**values):
    return lambda told: {**told, "text_config": {**told["text_config"], **values}}


REFUSED = {
    "qk_layernorm of phi is True; mlx-lm has False": ("phi", _in(qk_layernorm=True)),
    "hidden_act of phi is 'gelu'; mlx-lm has 'gelu_new'": ("phi", _in(hidden_act="gelu")),
    "layer_norm_epsilon of mamba is 1e-06": ("mamba", _in(layer_norm_epsilon=1e-6)),
    "4 heads of 24 do not make a hidden_size of 64": ("phi", _in(head_dim=24)),
    r"rope_parameters of gemma is .* which is not supported": (
        "gemma", _in(rope_parameters=backbones.TURNS),
    ),
    r"rope_parameters of llama is .* which is not supported": (
        "llama", _in(rope_parameters={**backbones.TURNS, "factor": "many"}),
    ),
    r"is \(96, 64\); \(97, 64\) is expected": ("qwen3", _in(intermediate_size=97)),
    "vocab_size is 0, not a whole number": ("gemma", _in(vocab_size=0)),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_computed_otherwise_is_refused_by_name(sentence, models, tmp_path):
    kind, change = REFUSED[sentence]
    folder = shutil.copytree(models(kind).folder, tmp_path / "hf")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(told)))
    with pytest.raises(UserError, match=sentence):
        load(folder)


def test_a_damaged_config_of_ours_is_refused_in_a_sentence(models, tmp_path, capsys):
    main(["to-mlx", str(models("llama").folder), str(tmp_path / "mlx")])
    file = tmp_path / "mlx" / "config.json"
    told = json.loads(file.read_text())
    damages = {
        "mlx-lm's 'gpt2' is none of llama": {"model_type": "gpt2"},
        "head_dim is -2, not a whole number": {"head_dim": -2},
        "heads do not divide evenly": {"head_dim": 23},
        "rms_norm_eps is 'small', not a positive": {"rms_norm_eps": "small"},
        "mlp_bias is 1, not true or false": {"mlp_bias": 1},
        "rope_scaling of llama is": {"rope_scaling": {"rope_type": "llama3"}},
    }
    for sentence, damage in damages.items():
        file.write_text(json.dumps({**told, "text_config": {**told["text_config"], **damage}}))
        with pytest.raises(UserError, match=sentence):
            load(tmp_path / "mlx")


def test_without_mlx_lm_a_sentence_names_the_extra(models, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    sentence = r"a phi language model needs mlx-lm: .*pip install 'mlx_vlm_prune\[mlx-lm\]'"
    with pytest.raises(UserError, match=sentence):
        load(models("phi").folder)
