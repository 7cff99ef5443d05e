"""Promises of the public API: names, signatures, types, one default budget, and the logger."""

import ast
import inspect
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mlx_vlm_prune
from mlx_vlm_prune import generate, load, pruned, stream_generate
from mlx_vlm_prune.checkpoints.command_line import notes_on_stderr
from mlx_vlm_prune.generation.request import GenerateOptions, Request
from mlx_vlm_prune.inputs import budget

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = (
    "pruner=None, keep_ratio=None, keep_tokens=None, caution=True, positions=None, max_tokens=256,"
    " temperature=0.0, top_p=1.0, seed=0, top_k=0, min_p=0.0, repetition_penalty=None,"
    " repetition_context_size=20, sampler=None, logits_processors=None, eos_tokens=None,"
    " num_draft_tokens=None, system=None, chat_template_config=None, max_pixels=None,"
    " allow_url=False, host_options=None, video=None, fps=2.0, max_frames=32"
)
BUDGET = "keep_ratio=None, keep_tokens=None, positions=None"
SIGNATURES = {
    "Chat": "(model, processor, **options)",
    "GenerationResponse": "(text, token, from_draft, prompt_tokens, prompt_tps, generation_tokens,"
    " generation_tps, peak_memory, finish_reason=None, result=None)",
    "GenerationResult": "(text, token_ids, prompt_tokens, generation_tokens, prompt_tps,"
    " generation_tps, peak_memory, finish_reason, visual_tokens, visual_tokens_kept, kept_indices,"
    " pruner, positions, ttft_ms, layers=<factory>, cache_bytes=0, trace=None, views=(),"
    " drafted=None, accepted=None, rows_reused=0, images=<factory>, layouts=(), auto=None,"
    " video=None)",
    "Pruner": "(name, method, options=<factory>, weights=None, keep=None, defaults=<factory>,"
    " enhancer=None, reference=None)",
    "Reduction": "(index_BK=None, weight_BKN=None, value_BND=None, slot_BN=None, share_BN=None,"
    " place_BK=None, is_finite=None, score_BN=None)",
    "Signals": "(x_BND, grid, has_cls=True, frames=1, **others)",
    "attach": f"(model, pruner='auto', *, {BUDGET}, allow_videos=False, processor=None)",
    "batch_generate": "(model, processor, prompts, images=None, **options)",
    "encode_images": "(model, processor, images, pruner='none', *, keep_ratio=None,"
    " keep_tokens=None, batch_size=8)",
    "encode_texts": "(model, processor, texts)",
    "generate": "(model, processor, prompt, image=None, *, verbose=False, **options)",
    "load": "(path_or_hub_name=None, *, dtype='auto', revision=None, adapter_path=None,"
    " trust_remote_code=False)",
    "load_encoder": "(path_or_hub_name, *, dtype='auto', revision=None)",
    "pruned": f"(model, pruner='auto', *, {BUDGET}, processor=None)",
    "register_pruner": "(method)",
    "stream_generate": f"(model, processor, prompt, image=None, *, {OPTIONS})",
}
OTHERS = {"PRUNERS", "Stage", "UserError", "__version__"}
MAY_PRINT = {  # what a command writes; the others log
    "checkpoints/command_line.py", "generation/printing.py", "pruners/listing.py",
    "training/display.py",
}  # fmt: skip


def signature(function: Any) -> str:
    """The signature as text, without the types, which Python's versions write differently."""
    full = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in full.parameters.values()]
    return str(full.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_these_names_are_exported_and_no_others():
    assert set(mlx_vlm_prune.__all__) == {*SIGNATURES, *OTHERS}
    assert set(mlx_vlm_prune.__all__) <= set(dir(mlx_vlm_prune))
    assert all(getattr(mlx_vlm_prune, name) is not None for name in mlx_vlm_prune.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_stays_as_it_is(name):
    assert signature(getattr(mlx_vlm_prune, name)) == SIGNATURES[name]


def test_the_options_of_generate_are_those_of_stream_generate():
    options = inspect.signature(stream_generate).parameters.values()
    keywords = {p.name: p.annotation for p in options if p.kind is p.KEYWORD_ONLY}
    assert keywords == GenerateOptions.__annotations__
    fields = [p for p in inspect.signature(Request).parameters.values() if p.name in keywords]
    assert {p.name: p.default for p in fields} == {
        p.name: p.default for p in options if p.kind is p.KEYWORD_ONLY
    }


@pytest.mark.parametrize("name", sorted({*SIGNATURES, "Stage", "UserError"}))
def test_what_is_exported_is_documented(name):
    assert len(inspect.getdoc(getattr(mlx_vlm_prune, name)) or "") > 20


def test_a_type_checker_is_told_that_there_are_types():
    """What it then reads is held by tests/typed_program.py, which mypy checks strictly."""
    assert (ROOT / "mlx_vlm_prune/py.typed").is_file()
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"tests/typed_program.py"' in settings and '"tests.typed_program"' in settings


def test_the_library_prints_nothing():
    prints = set()
    for file in (ROOT / "mlx_vlm_prune").glob("*/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "warnings.warn"):
                prints.add(str(file.relative_to(ROOT / "mlx_vlm_prune")))
    assert prints <= MAY_PRINT


@pytest.fixture
def fresh_default():
    """As if no method had been without a budget yet."""
    budget.default_keep_ratio.cache_clear()
    yield
    budget.default_keep_ratio.cache_clear()


NOTE = "norm has no budget and keeps keep_ratio=0.5"


def test_without_a_budget_half_is_kept_and_it_is_said_once(fresh_default, caplog):
    from mlx_vlm_prune.scenes import compose

    image = compose(seed=1_000_000_007).image()
    model, processor = load()
    for _ in range(2):
        answer = generate(model, processor, "is it red ?", image, pruner="norm", max_tokens=1)
        assert answer.visual_tokens_kept == answer.visual_tokens // 2
    (answer,) = mlx_vlm_prune.batch_generate(
        model, processor, ["is it red ?"], [image], pruner="norm", max_tokens=1
    )
    assert answer.visual_tokens_kept == answer.visual_tokens // 2
    assert [record[1:] for record in caplog.record_tuples] == [(logging.WARNING, NOTE)]
    assert caplog.record_tuples[0][0] == "mlx_vlm_prune"
    generate(model, processor, "is it red ?", image, max_tokens=1)
    generate(model, processor, "is it red ?", image, pruner="norm", keep_ratio=1, max_tokens=1)
    assert len(caplog.records) == 1


def test_a_block_inside_mlx_vlm_keeps_half_and_says_so(fresh_default, caplog, tmp_path):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    import mlx.core as mx

    from .host_models import KINDS

    model = KINDS["llava"].make()
    inputs = KINDS["llava"].inputs(model, 1)
    with pruned(model, "norm") as report:
        model.get_input_embeddings(mx.array(inputs.ids)[None], inputs.pixels, mask=inputs.mask_1L)
    assert report.kept == report.total // 2
    assert caplog.messages == [NOTE]


def test_python_shows_the_warning_without_configuration():
    code = (
        "from mlx_vlm_prune.pruners import plan\n"
        "from mlx_vlm_prune.inputs.budget import budget\n"
        "print(budget(10, None, None, plan('norm')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("5\n", NOTE + "\n")


def test_a_command_writes_the_librarys_messages_as_notes(capsys):
    logger = logging.getLogger("mlx_vlm_prune")
    before = (list(logger.handlers), logger.level)
    with notes_on_stderr(), notes_on_stderr():
        logger.info("reading %d files", 3)
    assert capsys.readouterr().err == "note: reading 3 files\n"
    assert (logger.handlers, logger.level) == before
