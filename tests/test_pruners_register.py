"""A method of a user's own: its name is understood wherever a method's is, or refused with why.

Shapes: N tokens, K kept.
"""

import json
from dataclasses import replace
from types import ModuleType

import mlx.core as mx
import pytest
from PIL import Image

import mlx_vlm_prune
from mlx_vlm_prune import (
    Pruner,
    Reduction,
    Signals,
    Stage,
    evaluate,
    generate,
    load,
    register_pruner,
)
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.pruned_folder import prune_into
from mlx_vlm_prune.pruners import METHODS, Method, listing, plan
from mlx_vlm_prune.pruners.numerics import precision

DOC = """Keep every few tokens, from the first on.

Options:
    step: distance of two kept tokens, 1 or more
"""


def every(signals: Signals, K: int, *, step: int = 1) -> Reduction:
    index_K = mx.arange(0, K * step, step)
    return Reduction(mx.broadcast_to(index_K, (len(signals.x_BND), K)))


def module(**held) -> ModuleType:
    """The user's file `package/every.py`."""
    file = ModuleType("package.every", DOC)
    vars(file).update({"stage": Stage.FEATURES, "prune": every} | held)
    return file


@pytest.fixture
def table(monkeypatch):
    """The table of methods, as it was before when the test is over."""
    before = dict(METHODS)
    yield METHODS
    for name in METHODS.keys() - before.keys():
        del METHODS[name]
    assert before == METHODS


def test_a_registered_method_answers_is_evaluated_and_is_listed(table, tmp_path, capsys):
    register_pruner(module())
    assert list(table)[-1] == "every" and table is mlx_vlm_prune.PRUNERS
    model, processor = load()
    image = Image.new("RGB", (64, 64), "red")
    answer = generate(
        model, processor, "What colour is the star?", image, pruner="every:step=3", keep_tokens=49,
        max_tokens=2,
    )  # fmt: skip
    assert answer.kept_indices == [list(range(0, 147, 3))] and answer.pruner == "every:step=3"
    chain = generate(
        model, processor, "What is it?", image, pruner="every+fastv", keep_tokens=98, max_tokens=1
    )
    assert chain.pruner == "every+fastv"

    out = tmp_path / "out.json"
    evaluate.main(["--per-kind", "1", "--pruner", "every:step=2", "--keep-tokens", "49",
                   "--out", str(out)])  # fmt: skip
    assert "every:step=2" in [row["pruner"] for row in json.loads(out.read_text())["rows"]]

    capsys.readouterr()
    listing.main([])
    assert "\nevery " in capsys.readouterr().out
    listing.main(["every"])
    shown = capsys.readouterr().out
    assert shown.startswith("Keep every few tokens")
    assert "step=1  distance of two kept tokens, 1 or more" in shown
    with pytest.raises(UserError, match="did you mean step"):
        plan("every:steps=2")


def test_a_registered_method_is_not_written_into_a_checkpoint(table, tmp_path):
    register_pruner(module())
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").touch()
    (source / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(UserError, match="every cannot be written into a checkpoint"):
        prune_into(source, tmp_path / "target", "every", 0.5, None)


def test_a_method_may_be_given_as_a_record_and_need_signals_of_a_layer(table):
    def prune(signals: Signals, K: int, *, depth: float = 0.5) -> Reduction:
        return METHODS["cls_attention"].prune(signals, K)

    register_pruner(
        Method("mine", "By CLS.", Stage.FEATURES, needs={"cls_attention": "depth"}, prune=prune)
    )
    assert plan("mine").signal_layers(12) == {"cls_attention": 6}


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.stage is not Stage.IMAGE])
def test_the_methods_of_the_table_pass_the_same_checks(name, table):
    register_pruner(replace(METHODS[name], name="copied"))


def in_tower(**held) -> ModuleType:
    return module(stage=Stage.ENCODER, cuts=lambda layers, N, K: [(0, "middle", K)], **held)


def accumulated(signals, *, decay=0.5):
    return None


def completed(signals, kept, K, *, rounds=2):
    return kept


def test_options_of_all_its_functions_are_a_methods_own(table):
    """Of what is called beside `prune`, too."""
    assert Method.of(in_tower(accumulate=accumulated)).options == {"step": 1, "decay": 0.5}
    file = module(stage=Stage.ENHANCER, prune=None, complete=completed)
    assert Method.of(file).options == {"rounds": 2}


def no_budget(signals):
    return None


def no_star(signals, K, step=1):
    return None


def reserved(signals, K, *, keep=1):
    return None


def without_default(signals, K, *, step):
    return None


@pytest.mark.parametrize(
    ("method", "part"),
    [
        (module(__name__="mine.norm"), "called norm already"),
        (module(__name__="duet"), "called duet already"),
        (module(__name__="my-method"), "cannot name a pruner"),
        (module(prune=None), r"no prune\(signals, K\), which a method of stage features"),
        (module(stage=Stage.DECODER), r"no schedule\(layers, N, K\)"),
        (module(stage=Stage.ENCODER), r"no cuts\(layers, N, K\)"),
        (module(stage=Stage.ENHANCER), r"neither attention_bias\(signals, kept\) nor"),
        (module(stage=Stage.IMAGE), "it must be Stage.ENCODER, Stage.FEATURES"),
        (module(stage="features"), "stage is 'features'"),
        (module(prune=no_budget), r"prune takes \(signals\); it must take \(signals, K\)"),
        (module(prune=no_star), "keyword-only"),
        (module(prune=reserved), "another name than keep"),
        (module(prune=without_default), "option step must have a default"),
        (module(prune=3), "is 3, not a function"),
        (module(needs=["cls_attention"]), "needs is no dict"),
        (module(positions=3), "positions is not 'keep' or 'renumber'"),
        (module(needs={"attention": None}), "needs 'attention'; a tower has .*cls_attention"),
        (module(needs={"cls_attention": "layer"}), "'layer', which is no option"),
        (in_tower(adapts=lambda: True), r"has adapts\(\), and no left\(signals, K, remaining\)"),
        (in_tower(attends_to_all=lambda layers: range(1)), r"and no give_back\(signals, kept\)"),
        (ModuleType("package.every"), "has no stage"),
        ("norm", "neither a module nor a Method"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_method_is_refused_and_changes_nothing(method, part, table):
    before = dict(table)
    with pytest.raises(UserError, match=part):
        register_pruner(method)
    assert table == before


WRONG = {
    "it must be a Reduction": lambda B, K: mx.zeros((B, K), mx.uint32),
    "without index_BK and weight_BKN": lambda B, K: Reduction(),
    "only one of slot_BN and share_BN": lambda B, K: Reduction(
        mx.zeros((B, K), dtype=mx.int32), slot_BN=mx.zeros((B, 16), dtype=mx.int32)
    ),
    r"index_BK of shape \(1, 7\); it must be \(1, 8\)": lambda B, K: Reduction(mx.arange(7)[None]),
    r"index_BK of shape \(8,\)": lambda B, K: Reduction(mx.arange(K)),
    "index_BK of mlx.core.float32; give": lambda B, K: Reduction(mx.zeros((B, K))),
    "index_BK as list": lambda B, K: Reduction([[0] * K]),
    "an index outside the 16 tokens: give 0 to 15": lambda B, K: Reduction(9 + mx.arange(K)[None]),
    "indices that do not ascend": lambda B, K: Reduction(mx.arange(K)[::-1][None]),
    "or one twice; sort them": lambda B, K: Reduction(mx.zeros((B, K), mx.int32)),
    r"weight_BKN of shape \(1, 8, 3\)": lambda B, K: Reduction(None, mx.zeros((B, K, 3))),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_an_answer_that_is_no_reduction_to_K_slots_is_refused_by_the_methods_name(sentence):
    def prune(signals: Signals, K: int) -> Reduction:
        return WRONG[sentence](len(signals.x_BND), K)

    method = Pruner("mine", Method("mine", "", Stage.FEATURES, prune=prune))
    with pytest.raises(UserError, match=f"^mine returned .*{sentence}"):
        method(Signals(mx.ones((1, 16, 4)), (4, 4)), 8)


def test_indices_are_read_of_the_first_finite_answer_and_not_while_mlx_traces():
    calls = []

    def prune(signals: Signals, K: int) -> Reduction:
        calls.append(K)
        return Reduction(mx.zeros((len(signals.x_BND), K), mx.int32))

    method = Pruner("mine", Method("mine", "", Stage.FEATURES, prune=prune))

    def kept(x_BND: mx.array) -> mx.array:
        return method(Signals(x_BND, (4, 4)), 8).index_BK

    with mx.stream(mx.cpu), precision("float32"):
        assert mx.compile(kept)(mx.ones((1, 16, 4))).shape == (1, 8)
        assert kept(mx.full((1, 16, 4), float("nan"))).shape == (1, 8)
    with pytest.raises(UserError, match="or one twice"):
        kept(mx.ones((1, 16, 4)))
    assert len(calls) == 3
