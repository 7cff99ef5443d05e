"""A budget is enough in every way in: `auto` chooses, says why, and answers as the method named."""

import json

import pytest
from PIL import Image

from mlx_vlm_prune import Chat, batch_generate, generate, load, stream_generate
from mlx_vlm_prune.chat import Session
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluate import main as evaluate
from mlx_vlm_prune.explore import main as explore
from mlx_vlm_prune.generate import main as generate_main
from mlx_vlm_prune.hosts import auto
from mlx_vlm_prune.hosts.auto import Why, noted
from mlx_vlm_prune.inputs import image as image_files
from mlx_vlm_prune.planning import auto_budgets, command_budget
from mlx_vlm_prune.planning.auto_budgets import choose_within
from mlx_vlm_prune.planning.budgets import Budget, BudgetChoice
from mlx_vlm_prune.pruners.auto import AutoChoice
from mlx_vlm_prune.scenes import compose, pages
from mlx_vlm_prune.scenes.pages import draw
from mlx_vlm_prune.sweep import main as sweep

CHOSEN = "divprune+restore"  # on the built-in model, tests/test_auto.py
SCENES = [compose(1_000_000_100 + n).image() for n in range(2)]
COLOUR, COUNT = "What colour is the star?", "How many squares are there?"


@pytest.fixture(autouse=True)
def _no_real_cache(tmp_path, monkeypatch):
    """Calibrations of other tests would say what is gained."""
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def scenes():
    return load(dtype="float32")


def test_in_python_an_answer_is_that_of_the_chosen_method_and_says_why(scenes):
    named = generate(*scenes, COLOUR, SCENES[0], pruner=CHOSEN, keep_ratio=0.25, max_tokens=4)
    for options in (
        {"keep_ratio": 0.25},
        {"keep_tokens": 49},
        {"pruner": "auto", "keep_ratio": 0.25},
    ):
        answer = generate(*scenes, COLOUR, SCENES[0], **options, max_tokens=4)
        assert (answer.pruner, answer.kept_indices) == (CHOSEN, named.kept_indices)
        assert (answer.text, answer.token_ids) == (named.text, named.token_ids)
        assert answer.auto.startswith(f"auto: {CHOSEN}: ") and "\n" not in answer.auto
    assert named.auto is None
    *_, last = stream_generate(*scenes, COLOUR, SCENES[0], keep_ratio=0.25, max_tokens=2)
    assert last.result.auto == answer.auto


def test_the_time_that_choosing_takes_is_counted(scenes):
    answer = generate(*scenes, COLOUR, SCENES[0], max_tokens=1)
    later = noted(answer, Why("auto: why", 5.0))
    assert later.auto == "auto: why"
    for part, ms in answer.ttft_ms.items():
        assert later.ttft_ms[part] == ms + 5.0 * (part in ("image", "total"))


def test_a_page_keeps_more_and_is_opened_once(scenes, tmp_path, monkeypatch):
    draw(pages.compose(1_000_000_100)).save(tmp_path / "page.png")
    opened, read = [], auto.open_image
    monkeypatch.setattr(auto, "open_image", lambda *a: opened.append(1) or read(*a))
    answer = generate(*scenes, COLOUR, tmp_path / "page.png", keep_tokens=22, max_tokens=1)
    assert answer.visual_tokens_kept == 44 and opened == [1]
    assert "a picture is a document, so 44 of the tokens stay in place of 22" in answer.auto
    again = generate(*scenes, COLOUR, tmp_path / "page.png", keep_tokens=22, max_tokens=1,
                     caution=False)  # fmt: skip
    assert again.visual_tokens_kept == 22 and opened == [1]
    with pytest.raises(UserError, match=r"prompt 2 of 2: there is no image file"):
        batch_generate(*scenes, [COLOUR] * 2, [SCENES[0], "no.png"], keep_tokens=22)
    with pytest.raises(UserError, match=r"prompt 2 of 2: there is no image file"):
        batch_generate(*scenes, [COLOUR, COUNT], [SCENES[0], "no.png"], keep_tokens=22)


def test_what_is_named_stays_and_nothing_is_pruned_without_a_budget(scenes):
    answer = generate(*scenes, COLOUR, SCENES[0], max_tokens=1)
    assert (answer.pruner, answer.visual_tokens_kept, answer.auto) == ("none", 196, None)
    answer = generate(*scenes, COLOUR, SCENES[0], pruner="norm", keep_ratio=0.25, max_tokens=1)
    assert (answer.pruner, answer.auto) == ("norm", None)
    answer = generate(*scenes, COLOUR, SCENES[0], keep_ratio=1.0, max_tokens=1)
    assert (answer.pruner, answer.visual_tokens_kept) == ("none", 196)
    answer = generate(*scenes, "yes ?", keep_ratio=0.25, max_tokens=1)  # without a picture
    assert (answer.pruner, answer.auto) == ("none", None)
    answer = generate(*scenes, COLOUR, SCENES[0], pruner="auto", max_tokens=1)
    assert answer.visual_tokens_kept == 98
    with pytest.raises(UserError, match="keeps all 196"):
        generate(*scenes, COLOUR, SCENES[0], pruner="none", keep_ratio=0.25)
    with pytest.raises(UserError, match="caution is 1; it must be True or False"):
        generate(*scenes, COLOUR, SCENES[0], keep_ratio=0.25, caution=1)


def test_a_prompt_for_counting_keeps_more_and_says_so_but_for_no_caution(scenes):
    answer = generate(*scenes, COUNT, SCENES[0], keep_tokens=22, max_tokens=1)
    assert answer.visual_tokens_kept == 44
    assert answer.auto.endswith(
        "the prompt asks for counting ('how many'), so 44 of the tokens stay in place of 22;"
        " --no-caution keeps 22"
    )
    answer = generate(*scenes, COUNT, SCENES[0], keep_tokens=22, max_tokens=1, caution=False)
    assert answer.visual_tokens_kept == 22 and "caution" not in answer.auto


def test_a_batch_has_the_answers_of_single_requests_each_with_its_budget(scenes):
    prompts, images = [COLOUR, COUNT, "yes ?", COLOUR], [SCENES[0], SCENES[0], None, SCENES[1]]
    answers = batch_generate(*scenes, prompts, images, keep_tokens=22, max_tokens=3)
    for prompt, image, answer in zip(prompts, images, answers, strict=True):
        alone = generate(*scenes, prompt, image, keep_tokens=22, max_tokens=3)
        for name in ("text", "token_ids", "pruner", "kept_indices", "auto"):
            assert getattr(answer, name) == getattr(alone, name), name
    assert [answer.visual_tokens_kept for answer in answers] == [22, 44, 0, 22]


def test_on_the_command_line_a_note_and_the_json_say_why(tmp_path, capsys):
    SCENES[0].save(tmp_path / "a.png")
    question = ["--image", str(tmp_path / "a.png"), "-p", COUNT, "--max-tokens", "2"]
    command = [*question, "--keep-ratio", "0.25", "--json", str(tmp_path / "a.json")]
    generate_main(command)
    out, err = capsys.readouterr()
    written = json.loads((tmp_path / "a.json").read_text())
    assert err == f"note: {written['auto']}\n" and "Visual tokens: 196 -> 98" in out
    assert written["pruner"] == CHOSEN and written["auto"].endswith("--no-caution keeps 0.25")
    generate_main([*command, "--no-caution"])
    assert "Visual tokens: 196 -> 49" in capsys.readouterr().out
    generate_main([*command, "--pruner", "norm"])
    assert not capsys.readouterr().err
    assert json.loads((tmp_path / "a.json").read_text())["auto"] is None


def test_on_the_command_line_a_file_is_decoded_once(tmp_path, capsys, monkeypatch):
    SCENES[0].save(tmp_path / "a.png")
    decoded, decode = [], image_files._decode

    def counted(source, *more):
        decoded.extend([source] if not isinstance(source, Image.Image) else [])
        return decode(source, *more)

    monkeypatch.setattr(image_files, "_decode", counted)
    monkeypatch.setattr("mlx_vlm_prune.generate.warn_of_photographs", lambda *_: None)
    generate_main(["--image", str(tmp_path / "a.png"), "-p", COLOUR, "--keep-ratio", "0.25",
                   "--max-tokens", "1"])  # fmt: skip
    assert "Visual tokens: 196 -> 49" in capsys.readouterr().out and len(decoded) == 1


class Fitting:
    """`keep_within` of made-up calibrations: what each method's K is; 0 for none that fits."""

    def __init__(self, **K_by_method):
        self.K, self.names = K_by_method, []

    def __call__(self, name: str) -> BudgetChoice:
        self.names.append(name)
        K = self.K.get(name.partition("+")[0].partition(":")[0], 0)
        reason = "" if K else f"{name} cannot meet it"
        return BudgetChoice(Budget(9), None, name, K or 196, 196, None, reason)


def test_of_a_budget_in_ms_the_method_is_worth_it_at_the_number_that_fits(scenes):
    fitting = Fitting(divprune=40)
    choice, line = choose_within(*scenes, fitting)
    assert (choice.pruner, choice.K, fitting.names) == (CHOSEN, 40, [CHOSEN])
    assert f"auto: {CHOSEN}: " in line and "with 0.204 of the tokens (between" in line
    choice, line = choose_within(*scenes, Fitting(divprune=196))
    assert choice.K == 196 and line == "auto: none: all 196 visual tokens fit 9 ms"


def test_where_no_number_fits_a_method_that_shortens_the_tower_is_tried(scenes):
    inside = "tome:keep=98+divprune+restore"  # the best of them at a quarter
    fitting = Fitting(tome=30)
    choice, line = choose_within(*scenes, fitting)
    assert (choice.pruner, choice.K, fitting.names) == (inside, 30, [CHOSEN, inside])
    assert line.startswith(f"auto: {inside}: ")
    choice, line = choose_within(*scenes, Fitting())
    assert (choice.K, line) == (196, f"auto: none: {CHOSEN} cannot meet it")


def test_a_method_below_a_baseline_at_that_number_gives_way(scenes, monkeypatch):
    picks = {0.25: "a", 0.1: "b", 0.2: "b"}

    def pick(facts, ratio, tokens, is_timed, in_tower=False):
        return AutoChoice(picks[round(ratio, 2)], ratio, tokens, f"at {ratio:.2f}")

    monkeypatch.setattr(auto_budgets, "choose", pick)
    choice, line = choose_within(*scenes, fitting := Fitting(a=20, b=39))
    assert (choice.pruner, choice.K, fitting.names) == ("b", 39, ["a", "b"])
    assert line == "auto: b: at 0.20"


def test_a_second_method_that_misses_the_budget_leaves_the_first(scenes, monkeypatch):
    monkeypatch.setattr(
        auto_budgets, "choose", lambda facts, ratio, tokens, is_timed, in_tower=False:
        AutoChoice("a" if ratio == 0.25 else "b", ratio, tokens, f"at {ratio:.2f}"),
    )  # fmt: skip
    choice, line = choose_within(*scenes, fitting := Fitting(a=20))
    assert (choice.pruner, choice.K, fitting.names) == ("a", 20, ["a", "b"])
    assert line == "auto: a: at 0.25"


def test_where_no_method_can_be_chosen_a_budget_of_time_says_so(scenes, monkeypatch):
    nothing = AutoChoice("none", None, None, "none is worth it")
    monkeypatch.setattr(auto_budgets, "choose", lambda *_, **__: nothing)
    with pytest.raises(UserError, match="auto: none: none is worth it; a budget of time or"):
        choose_within(*scenes, Fitting())


def test_a_budget_in_ms_or_gb_is_enough_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_budget, "_keep_within", lambda *a: Fitting(divprune=49)(a[-1]))
    SCENES[0].save(tmp_path / "a.png")
    command = ["--image", str(tmp_path / "a.png"), "-p", COUNT, "--max-tokens", "1",
               "--no-verbose"]  # fmt: skip
    for flag in ("--budget-ms", "--budget-gb"):
        generate_main([*command, flag, "9"])
        assert f"note: auto: {CHOSEN}: " in capsys.readouterr().err


def test_a_chat_chooses_in_each_turn(scenes, capsys):
    chat = Chat(*scenes, keep_tokens=22, max_tokens=2)
    assert chat.ask(COLOUR, SCENES[0]).visual_tokens_kept == 22
    counted = chat.ask(COUNT)
    assert (counted.pruner, counted.visual_tokens_kept) == (CHOSEN, 44)
    assert "counting" in counted.auto
    chat.configure(pruner="norm")
    assert (chat.ask(COUNT).visual_tokens_kept, chat.result.auto) == (22, None)
    with pytest.raises(UserError, match="a budget needs a pruner other than none"):
        chat.configure(pruner="none")
    chat = Chat(*scenes, max_tokens=1)
    Session(chat, scenes[1], [SCENES[0]]).run(["/keep 0.25", COLOUR, "/pruner auto", "/stats"])
    assert "Visual tokens: 196 -> 49" in capsys.readouterr().out


def test_evaluate_has_it_as_one_method_more(tmp_path, capsys):
    out = tmp_path / "a.json"
    command = ["--limit", "6", "--pruner", "auto", CHOSEN, "--keep-tokens", "22", "--out", str(out)]
    evaluate(command)
    rows = json.loads(out.read_text())["rows"]
    names = [row["pruner"] for row in rows]
    assert names == ["none", "random", "auto", CHOSEN]
    auto, named = rows[2:]
    assert (auto["chosen"], auto["tokens"]) == (CHOSEN, 22)  # also for counting
    for figure in ("overall", "logprob", "right"):
        assert auto[figure] == named[figure]
    assert f"note: auto: {CHOSEN}: " in capsys.readouterr().err


def test_sweep_and_explore_take_a_budget_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep(["--keep-ratio", "0.25", "--runs", "1", "--warmup", "0", "--max-tokens", "1"])
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [(row["pruner"], row.get("chosen")) for row in rows] == [
        ("none", None),
        ("auto", CHOSEN),
    ]
    explore(["--keep-tokens", "22", "--max-tokens", "2", "--no-predict", "--out", "a.html"])
    page = (tmp_path / "a.html").read_text()
    assert f"--pruner {CHOSEN} --keep-tokens 22" in page
