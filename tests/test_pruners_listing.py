"""The listing of the methods: every option is explained once, every unknown name answered."""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.pruners import METHODS, PRESETS, listing, plan
from mlx_vlm_prune.pruners.contract import Signals


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_option_is_explained_and_nothing_else_is(method):
    assert method.option_help.keys() == method.options.keys()
    assert list(method.option_help) == list(method.options)  # in the order of the parameters
    assert all(len(meaning) > 10 for meaning in method.option_help.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_shown_with_its_options_defaults_and_meanings(name, capsys):
    method = METHODS[name]
    listing.main([name])
    shown = capsys.readouterr().out
    text, options = shown.split("Options:")
    assert text.startswith(method.summary[:40]) and "Shapes:" not in shown
    assert f"Stage: {method.stage.name.lower()}." in text
    for option, default in method.options.items():
        (line,) = [line for line in options.splitlines() if line.startswith(f"  {option}=")]
        typed, meaning = line.split(maxsplit=1)
        assert meaning == method.option_help[option]
        value = typed.removeprefix(f"{option}=")
        assert type(default)(value == "true" if isinstance(default, bool) else value) == default


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_shown_beside_its_authors_code(name, capsys):
    method = METHODS[name]
    alike, differences = method.fidelity
    listing.main([name])
    shown = " ".join(capsys.readouterr().out.split())
    if not method.authors_code:
        assert "Not compared with code of its authors." in shown and "Differs: -" not in shown
        return
    assert alike.startswith("As the authors' code (") and method.authors_code in alike
    assert shown.count("As the authors' code (") == 1 and alike in shown
    assert ("Differs: -" in shown) is bool(differences)
    assert all(f" - {difference}" in shown for difference in differences)


def test_differences_are_read_from_the_docstring():
    pact, scope = METHODS["pact"].fidelity, METHODS["scope"].fidelity
    assert METHODS["pact"].authors_code == "orailix/PACT@cf9a0c9" and len(pact[1]) == 3
    assert pact[1][1] == "of too few centres, the most worthy tokens fill up"
    assert "github.com" not in pact[0] and not scope[1]


def test_a_preset_is_shown_as_its_chain(capsys):
    listing.main(["vscan"])
    assert capsys.readouterr().out == f"vscan is short for {PRESETS['vscan']}\n"


@pytest.mark.parametrize(
    ("name", "first"),
    [("avgpol", "avgpool"), ("vscam", "vscan"), ("prumerge-plus", "prumerge_plus")],
)
def test_an_unknown_method_or_preset_gets_the_three_nearest_names(name, first, capsys):
    with pytest.raises(UserError, match=f"did you mean {first}") as refusal:
        plan(name)
    sentence = str(refusal.value)
    nearest = re.split(", | or ", re.findall(r"mean (.+)\?", sentence)[0])
    assert len(nearest) == 3 and {*nearest} <= {*METHODS, *PRESETS}
    assert "mlx_vlm_prune.pruners lists all" in sentence and len(sentence) < 160
    with pytest.raises(SystemExit):
        listing.main([name])
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_an_unknown_option_gets_the_nearest_of_its_method():
    with pytest.raises(UserError) as refusal:
        plan("global_local:lokal=0.5")
    sentence = "global_local has no option 'lokal'; did you mean local, local_layer or layer?"
    assert str(refusal.value) == sentence


def test_the_listing_says_which_methods_can_be_one_and_the_same_choice(capsys):
    listing.main([])
    shown = " ".join(capsys.readouterr().out.split())
    assert "In a tower without a CLS token cls_attention is received_attention." in shown
    rng = np.random.default_rng(0)
    received_BN, objects_BN = (mx.array(rng.random((2, 64), np.float32)) for _ in range(2))
    signals = Signals(mx.zeros((2, 64, 4)), (8, 8), received_attention_BN=received_BN,
                      object_attention_BN=objects_BN)  # fmt: skip
    names = ("received_attention", "hiprune")
    for K, is_same in ((25, True), (40, False)):
        chosen = [np.array(plan(name).steps[0](signals, K).index_BK) for name in names]
        assert np.array_equal(*chosen) is is_same
