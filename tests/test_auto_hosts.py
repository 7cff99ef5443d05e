"""`auto` in mlx-vlm's models: by the published order, in answers, blocks, folders and servers."""

import json

import pytest

from convert.__main__ import main as convert
from mlx_vlm_prune import attach, generate, load, pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.mlx_vlm_folder import RECORD
from mlx_vlm_prune.hosts.auto import facts_of, facts_of_folder, has_cls
from mlx_vlm_prune.machine.remembered import remember
from mlx_vlm_prune.planning.auto_budgets import choose_within, first_method
from mlx_vlm_prune.planning.budgets import Budget, BudgetChoice
from mlx_vlm_prune.pruners.auto import choose

from . import host_folders
from .host_models import KINDS

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
CHOSEN = {"llava": "scope+restore", "qwen2_5_vl": "divprune+restore"}
ORDER = "by the published order, since no evaluation of this {} model is known"
# Whose rows can get no more attention: the method alone.
PLAIN = {"paligemma": "divprune", "qwen3_5": "divprune", "qwen3_5_moe": "divprune"}
CLS = ("llava", "llava_next", "internvl_chat")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return host_folders.desk(tmp_path_factory.mktemp("hosts"), [*CHOSEN])


@pytest.fixture(scope="module")
def loaded(home):
    return {name: load(home / name) for name in CHOSEN}


@pytest.fixture(autouse=True)
def _no_real_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mlx_vlm_prune.pruners.auto.choice.on_cuda", lambda: False)


@pytest.mark.parametrize("name", KINDS)
def test_every_family_has_a_method_of_the_published_order(name):
    model = KINDS[name].make()
    known = facts_of(model)
    choice = choose(known, 0.25, None)
    expected = PLAIN.get(known.kind, "scope+restore" if known.kind in CLS else "divprune+restore")
    assert choice.pruner == expected, name
    assert ORDER.format(known.kind) in choice.line and choice.keep_ratio == 0.25
    with pruned(model, keep_ratio=0.25) as report:
        assert report.pruner == expected and report.auto == choice.line


@pytest.mark.parametrize("name", CHOSEN)
def test_an_answer_is_that_of_the_chosen_method_and_says_that_it_is_by_the_order(
    name, home, loaded
):
    options = {"keep_ratio": 0.25, "max_tokens": 3}
    answer = generate(*loaded[name], "w7 w9", home / "a.png", **options)
    named = generate(*loaded[name], "w7 w9", home / "a.png", pruner=CHOSEN[name], **options)
    assert (answer.pruner, answer.token_ids) == (CHOSEN[name], named.token_ids)
    assert answer.kept_indices == named.kept_indices
    assert ORDER.format(name) in answer.auto and named.auto is None


def test_an_evaluation_of_the_model_comes_before_the_order(home, loaded):
    model, processor = loaded["qwen2_5_vl"]
    rows = [
        {"pruner": name, "tokens": tokens, "of": 100, "overall": figure}
        for name, tokens, figure in (
            ("none", 100, 0.9), ("random", 25, 0.5), ("norm", 25, 0.4), ("zoo_prune", 25, 0.99),
            ("tome", 25, 0.95), ("fastv:layer=0.5", 25, 0.85), ("apet", 25, 0.8),
            ("divprune", 25, 0.7),
        )
    ]  # fmt: skip
    about = {"questions": "mine", "question_set": "0123", "count": 60, "date": "2026-11-27"}
    remember(home / "qwen2_5_vl", about | {"rows": rows})
    choice = choose(facts_of(model, processor), 0.25, None)
    assert choice.pruner == "tome"  # zoo_prune has no projector to ask
    assert "95.0% right with 0.25 of the tokens in the evaluation of this model" in choice.line
    with pruned(model, keep_ratio=0.25) as report:
        assert report.pruner == "tome"
    assert first_method(model, processor).pruner == "tome"
    assert first_method(model, processor, is_batched=True).pruner == "tome"


def test_a_time_that_cannot_be_met_tries_a_shorter_tower_last(home, loaded):
    names = []

    def keep_within(name):
        names.append(name)
        return BudgetChoice(Budget(9), None, name, 4, 4, None, "it cannot be met")

    for name, method in CHOSEN.items():
        _, line = choose_within(*loaded[name], keep_within)
        assert line == "auto: none: it cannot be met"
        assert names == [method, "patch_norm:keep=0.75+divprune+restore"]
        names.clear()


def test_options_of_a_request_leave_methods_out(home, loaded):
    options = {"keep_ratio": 0.25, "max_tokens": 1}
    cache = {"host_options": {"max_kv_size": 512}}
    for name, method in (("llava", "scope"), ("qwen2_5_vl", "divprune")):
        answer = generate(*loaded[name], "w7 w9", home / "a.png", **options, **cache)
        assert answer.pruner == method and f"auto: {method}: " in answer.auto
    with pytest.raises(UserError, match="positions='keep' is not possible in a llava model"):
        generate(*loaded["llava"], "w7", home / "a.png", **options, positions="keep")


def test_attach_takes_a_method_that_is_named_and_refuses_a_wrong_budget(loaded):
    model, _ = loaded["llava"]
    report, detach = attach(model, "norm", keep_ratio=0.5)
    assert (report.pruner, report.auto) == ("norm", None)
    detach()
    with pytest.raises(UserError, match="above 0 and at most 1"):
        attach(model, keep_ratio=0)


@pytest.mark.parametrize("name", CHOSEN)
def test_prune_into_writes_the_method_that_is_chosen(name, home, tmp_path, capsys):
    convert(["prune-into", str(home / name), str(tmp_path / "out"), "--keep-ratio", "0.25"])
    out = capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config[RECORD]["pruner"] == CHOSEN[name] and config[RECORD]["keep_ratio"] == 0.25
    assert f"by {CHOSEN[name]}\nauto: {CHOSEN[name]}: {ORDER.format(name)}" in out
    assert f'PRUNER = "{CHOSEN[name]}"' in (tmp_path / "out/pruned.py").read_text()


def test_a_folder_says_whether_its_tower_has_a_cls_token(tmp_path):
    assert has_cls("llava", None) and has_cls("llava_next", "clip_vision_model")
    assert has_cls("internvl_chat", "intern_vit_6b")
    assert not has_cls("llava", "siglip_vision_model") and not has_cls("qwen2_vl", None)
    config = {"model_type": "llava", "text_config": {"num_hidden_layers": 32}}
    known = facts_of_folder(tmp_path, config, lambda spec: None)
    assert (known.has_cls, known.layers) == (True, 32)
