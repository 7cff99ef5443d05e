"""Promises of `prune-into --vendor`: the folder answers where this package is not, and takes no
installed one's place. Without it the folder says in one sentence what is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_vlm_prune.hosts.pruned_folder import PACKAGE, prune_into

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from . import into_folders
from .host_models import KINDS
from .into_folders import assert_same, checkpoint, inputs_of, max_images, ours
from .test_skeleton import forbidden_imports

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
FOLDERS = {  # one that reads the tower's layers, one of words, a chain, and a mark of tiles
    "llava": ("vispruner", 0.4, None),
    "qwen3_vl": ("divprune", 0.4, None),
    "gemma3": ("cdpruner", 0.5, None),
    "internvl_chat": ("norm+divprune", 0.5, None),
    "smolvlm": ("uniform", None, 3),
}
# A process in which nobody finds this package, however it was installed.
ALONE = """
import importlib.util, json, sys, warnings

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("mlx_vlm_prune", "convert", "torch_ref"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
warnings.simplefilter("ignore")
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_vlm.generate.ar import generate_step
from mlx_vlm.utils import load_model
home, answers = Path(sys.argv[1]), {}
for kind in sys.argv[2:]:
    model, prompt = load_model(home / f"{kind}-copy"), dict(mx.load(f"{home}/{kind}.safetensors"))
    tiles = prompt.pop("num_patches_list", None)
    if tiles is not None:
        prompt["num_patches_list"] = tiles.tolist()
    ids, pixels, mask = (prompt.pop(x) for x in ("input_ids", "pixel_values", "mask"))
    options = {"max_tokens": 5, "temperature": 0, **prompt}
    steps = list(generate_step(ids, model, pixels, mask, **options))
    odds = np.stack([np.array(one) for _, one in steps])
    np.savez(home / f"{kind}.npz", tokens=[int(token) for token, _ in steps], odds=odds)
    report = model.pruning_report
    answers[kind] = report.kept, sys.modules[type(report).__module__].__file__
try:
    load_model(home / "llava-bare")
except ImportError as problem:
    answers["bare"] = str(problem)
ours = {n: m.__file__ for n, m in sys.modules.items() if n.startswith("mlx_vlm_prune")}
print(json.dumps({"answers": answers, "modules": ours}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vendor")
    for kind, (spec, ratio, tokens) in FOLDERS.items():
        prune_into(checkpoint(kind, folder), folder / f"{kind}-copy", spec, ratio, tokens, True)
        inputs = inputs_of(kind, KINDS[kind].make(), max_images(kind))
        into_folders.save_prompt(folder / f"{kind}.safetensors", kind, inputs)
    prune_into(folder / "llava", folder / "llava-bare", "norm", 0.5, None)
    return folder


@pytest.fixture(scope="module")
def alone(home) -> dict:
    """What all folders came to in one such process, which stands elsewhere."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", ALONE, str(home), *FOLDERS]
    done = subprocess.run(command, cwd=home, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", FOLDERS)
def test_without_us_the_folder_answers_by_its_copy_as_our_own_path_does(home, alone, kind):
    from mlx_vlm.utils import load_model

    with np.load(home / f"{kind}.npz") as held:
        answered = held["tokens"].tolist(), held["odds"]
    model = load_model(home / kind)
    assert_same(answered, ours(model, inputs_of(kind, model, max_images(kind)), *FOLDERS[kind]))
    kept, file = alone["answers"][kind]
    assert kept > 0 and Path(file).parents[2].name.endswith("-copy")


def test_all_that_was_imported_of_ours_lies_in_a_folder_and_under_another_name(home, alone):
    assert len(alone["modules"]) > 20
    for name, file in alone["modules"].items():
        assert name.partition(".")[0] != PACKAGE.name
        assert home in Path(file).parents and "-copy" in Path(file).relative_to(home).parts[0]


def test_without_us_and_without_a_copy_the_folder_says_what_is_missing(alone):
    assert alone["answers"]["bare"] == (
        "this folder prunes by mlx_vlm_prune: pip install mlx_vlm_prune"
        " (No module named 'mlx_vlm_prune')"
    )


def test_beside_an_installed_package_each_runs_its_own(home):
    from mlx_vlm.utils import load_model

    import mlx_vlm_prune

    bare = load_model(home / "llava-bare")
    before = {n for n in sys.modules if n.partition(".")[0] == PACKAGE.name}
    copies = [load_model(home / f"{kind}-copy") for kind in ("llava", "qwen3_vl")]
    here, *there = (sys.modules[type(m.pruning_report).__module__] for m in (bare, *copies))
    assert Path(here.__file__).is_relative_to(PACKAGE)
    assert all(home in Path(module.__file__).parents for module in there)
    assert there[0] is there[1]  # of the same sources
    assert {n for n in sys.modules if n.partition(".")[0] == PACKAGE.name} == before
    assert Path(mlx_vlm_prune.__file__).is_relative_to(PACKAGE)


def test_a_copy_of_other_sources_has_another_name(home, monkeypatch, tmp_path):
    from mlx_vlm_prune.hosts import pruned_folder

    real = pruned_folder._package_sources()
    monkeypatch.setattr(
        pruned_folder, "_package_sources", lambda: real | {"mlx_vlm_prune/more.py": b"# more"}
    )
    prune_into(home / "llava", tmp_path / "newer", "norm", 0.5, None, True)
    names = [
        next(line for line in (place / "pruned.py").read_text().splitlines() if "NAME =" in line)
        for place in (home / "llava-copy", home / "qwen3_vl-copy", tmp_path / "newer")
    ]
    assert names[0] == names[1] != names[2]


def test_the_copy_is_the_package_with_its_licence_and_without_its_example(home):
    copy = home / "llava-copy" / PACKAGE.name
    files = {
        str(f.relative_to(copy)) for f in copy.rglob("*") if f.suffix != ".pyc" and f.is_file()
    }
    assert files == {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py")} | {"LICENSE"}
    for name in files - {"LICENSE"}:
        assert (copy / name).read_bytes() == (PACKAGE / name).read_bytes()
    assert "Permission is hereby granted" in (copy / "LICENSE").read_text()


def test_the_package_imports_itself_by_relative_names_so_that_a_copy_runs_under_any():
    assert not forbidden_imports(PACKAGE.name, PACKAGE.name)
