"""The shape of the repository: who imports whom, lengths, names, and how the commands start."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_vlm_prune
from mlx_vlm_prune.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mlx_vlm_prune", "torch_ref", "convert", "benchmarks")
FOLDERS = (*PACKAGES, "tests")
LONGEST_FILE = 350
LONGEST_FUNCTION = 40
MOST_PARAMETERS = 7
# Names that could stand for anything.
VAGUE = set(
    "told found asked said made own since worded hear heard look looked laid lot see wish"
    " upto".split()
)
# The modules that `pip install mlx_vlm_prune` installs.
INSTALLED = {
    "mlx",
    "numpy",
    "PIL",
    "tokenizers",
    "huggingface_hub",
    "jinja2",
    "safetensors",
    "tqdm",
}


def sources(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from sorted((ROOT / package).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """The absolute names a file imports, wherever in the file: `from a import b` is a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden_imports(package: str, *forbidden: str) -> list[str]:
    """Imports of forbidden packages, as 'file imports name'."""
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources(package)
        for name in sorted(imports(file))
        if name.split(".")[0] in forbidden
    ]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def tracked_files() -> list[Path]:
    """Files that git tracks or would track once added."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.split("\0")[:-1]
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("heavy", ["mlx.core", "torch", "transformers", "numpy", "PIL"])
def test_importing_the_package_imports_nothing_heavy(heavy):
    code = f"import sys, mlx_vlm_prune, mlx_vlm_prune.__main__; sys.exit({heavy!r} in sys.modules)"
    assert python("-c", code).returncode == 0


def test_the_product_imports_no_torch_but_to_read_or_write_a_pth_file():
    imported = forbidden_imports("mlx_vlm_prune", "torch", "torch_ref", "transformers")
    assert set(imported) == {"mlx_vlm_prune/checkpoints/reading/pth.py imports torch"}
    top = ast.parse((ROOT / "mlx_vlm_prune/checkpoints/reading/pth.py").read_text("utf-8")).body
    heads = [ast.unparse(n) for n in top if isinstance(n, ast.Import | ast.ImportFrom)]
    assert "import torch" not in heads


def test_the_scenes_import_no_mlx_since_the_trainer_reads_them():
    assert not forbidden_imports("mlx_vlm_prune/scenes", "mlx")


# What torch_ref shares with the product: data, and how a user's files become data.
SHARED = ("mlx_vlm_prune.scenes", "mlx_vlm_prune.checkpoints")
SHARED_IN_TRAINING = (
    "mlx_vlm_prune.inputs.budget",
    "mlx_vlm_prune.inputs.processor",
    "mlx_vlm_prune.machine.agreement",
    *(
        f"mlx_vlm_prune.training.{name}"
        for name in """
            base_checkpoint batches config curve display formats interrupts metrics options
            run_folder run_loop run_state session stage_rules trained_folder validation
        """.split()
    ),
)


def test_torch_ref_is_independent_but_for_the_scenes_and_checkpoints():
    assert not forbidden_imports("torch_ref", "mlx", "convert")
    imported = [t.split(" imports ") for t in forbidden_imports("torch_ref", "mlx_vlm_prune")]
    others = {(file, name) for file, name in imported if not name.startswith(SHARED)}
    assert imported and all(name.startswith(SHARED_IN_TRAINING) for _, name in others)
    assert all(file.startswith("torch_ref/train") for file, _ in others)


def test_what_torch_ref_trains_with_imports_no_mlx():
    code = "import sys, torch_ref.train, torch_ref.training.run; sys.exit('mlx' in sys.modules)"
    assert python("-c", code).returncode == 0


def test_checkpoints_know_neither_mlx_nor_the_converter():
    """Nor any other part of the product: tests/test_imports.py."""
    assert not forbidden_imports("mlx_vlm_prune/checkpoints", "mlx", "convert", "mlx_vlm_prune")


def test_the_converter_stands_on_checkpoints_and_asks_the_product_for_methods_and_arrays():
    assert not forbidden_imports("convert", "torch_ref", "mlx_lm", "mlx_vlm")
    above = [t for t in forbidden_imports("convert", "mlx_vlm_prune") if ".checkpoints" not in t]
    assert above == [
        "convert/__main__.py imports mlx_vlm_prune.hosts.pruned_folder.prune_into",
        "convert/__main__.py imports mlx_vlm_prune.models.dequantized.dequantised",
        "convert/quantise.py imports mlx_vlm_prune.models.arrays.to_array",
        "convert/quantise.py imports mlx_vlm_prune.models.arrays.to_bytes",
    ]
    assert forbidden_imports("convert", "mlx") == ["convert/quantise.py imports mlx.core"]


def test_the_product_never_imports_the_converter():
    """In a folder that holds a user's convert.py it would be executed; the command takes the one
    that lies beside the package."""
    assert not forbidden_imports("mlx_vlm_prune", "convert", "benchmarks", "tests")


def test_the_product_imports_only_what_installing_it_brings_and_extras_in_one_place_each():
    allowed = INSTALLED | set(sys.stdlib_module_names) | {"mlx_vlm_prune"}
    extras = {
        (name, str(file.relative_to(ROOT)))
        for file in sources("mlx_vlm_prune")
        for name in {n.split(".")[0] for n in imports(file)} - allowed
    }
    assert {name for name, _ in extras} == set(
        "cv2 fastapi gradio lmms_eval matplotlib mlx_lm mlx_vlm pillow_heif pyarrow pydantic torch"
        " uvicorn yaml".split()
    )
    places = {
        "cv2": "mlx_vlm_prune/inputs/video.py",
        "fastapi": ("mlx_vlm_prune/serving/", "mlx_vlm_prune/webui/"),
        "gradio": "mlx_vlm_prune/webui/",
        "lmms_eval": (
            "mlx_vlm_prune/evaluation/harness/manifest.py",
            "mlx_vlm_prune/evaluation/harness/model.py",
        ),
        "matplotlib": ("mlx_vlm_prune/plots/", "mlx_vlm_prune/training/curve.py"),
        "mlx_lm": (
            "mlx_vlm_prune/models/",
            "mlx_vlm_prune/training/",
            "mlx_vlm_prune/generation/sampling.py",
        ),
        "mlx_vlm": "mlx_vlm_prune/hosts/",
        "pillow_heif": "mlx_vlm_prune/inputs/image.py",
        "pyarrow": "mlx_vlm_prune/evaluation/questions/parquet.py",
        "pydantic": "mlx_vlm_prune/serving/request_schema.py",
        "torch": "mlx_vlm_prune/checkpoints/reading/pth.py",
        "uvicorn": ("mlx_vlm_prune/serving/connections.py", "mlx_vlm_prune/app.py"),
        "yaml": "mlx_vlm_prune/training/config.py",
    }
    assert all(file.startswith(places[name]) for name, file in extras)


def test_what_the_product_imports_is_declared():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("dependencies = [")[1].split("\n]")[0]
    declared = {re.split(r"[\[<>=;]", line)[0] for line in re.findall(r'"([^"]+)"', block)}
    assert {"pillow" if name == "PIL" else name for name in INSTALLED} == declared


def test_no_file_is_long():
    lengths = {f: len(f.read_text(encoding="utf-8").splitlines()) for f in sources(*FOLDERS)}
    assert not [f"{f.relative_to(ROOT)}: {n}" for f, n in lengths.items() if n > LONGEST_FILE]


def test_every_file_begins_with_a_sentence_that_says_what_it_is_for():
    """On one line: a reader goes by the list of them."""
    first_lines = {
        file: (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
        for file in sources(*PACKAGES)
    }
    assert len(first_lines) > 200
    assert not [str(file) for file, line in first_lines.items() if not line.endswith((".", "?"))]


def test_no_function_is_long():
    long = []
    for file in sources(*FOLDERS):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                length = node.end_lineno - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not long


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a file gives: variables, parameters, attributes, keywords, functions,
    classes, imports; with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                yield name, node.lineno
            case ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name, node.lineno
            case ast.alias(name=module, asname=alias):
                yield alias or module.split(".")[-1], node.lineno


def vague_names(file: Path) -> list[str]:
    """The identifiers of VAGUE in a file, and its own name if it is one, as 'file:line name'."""
    names = [(file.stem, 1), *identifiers(ast.parse(file.read_text(encoding="utf-8")))]
    return [f"{file}:{line} {name}" for name, line in names if name.strip("_").lower() in VAGUE]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_name_could_stand_for_anything(folder):
    assert not [name for file in sources(folder) for name in vague_names(file)]


def test_a_vague_name_is_seen_wherever_it_is_given(tmp_path):
    file = tmp_path / "lot.py"
    file.write_text(
        "import sound as found\n"
        "class Told: ...\n"
        "def asked(own, *, since=None): ...\n"
        "look, _made = 1, 2\n"
        "config.said = dict(worded=[laid for laid in ()])\n"
        "prompt = [found, config.hear]  # uses are no new names\n"
    )
    reported = [name.split()[-1] for name in vague_names(file)]
    assert sorted(reported) == sorted(
        ["lot", "found", "Told", "asked", "own", "since", "look", "_made", "said", "worded", "laid"]
    )


def test_no_function_below_the_public_api_has_more_than_seven_parameters():
    many = set()
    for file in sources(*PACKAGES):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([a for a in named if a.arg not in ("self", "cls")]) > MOST_PARAMETERS:
                    many.add(node.name)
    assert many == {"stream_generate", "keep_within"}  # public


def test_no_file_tells_of_the_machine_it_was_written_on():
    places = "|".join(("work", "tmp", "home", "root", "Users", "opt"))
    path = re.compile(rf"(?<![\w.:/~])/({places})/")
    kinds = {".py", ".md", ".toml", ".txt", ".json", ".yml", ""}
    lines = []
    for file in tracked_files():
        if file.suffix in kinds:
            for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if path.search(line):
                    lines.append(f"{file.relative_to(ROOT)}:{n}")
    assert not lines


def test_no_file_holds_the_marks_of_an_unfinished_merge():
    marks = re.compile("^(<{7}|>{7}) ", re.MULTILINE)
    texts = [f for f in tracked_files() if f.suffix in {".py", ".md", ".toml", ".txt", ".yml", ""}]
    assert texts and not [f for f in texts if marks.search(f.read_text(encoding="utf-8"))]


def test_there_is_one_version():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"$', text, re.M) == [mlx_vlm_prune.__version__]


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["--no-such-option"]])
def test_without_a_known_command_the_usage_is_printed_and_the_exit_code_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("usage:")


def test_help_lists_every_command(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_version_prints_the_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"mlx_vlm_prune {mlx_vlm_prune.__version__}\n"


def test_where_no_converter_lies_beside_the_package_its_command_says_so(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("mlx_vlm_prune.checkpoints.clone.HOME", tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: there is no converter in {tmp_path}")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_handed_its_own_arguments(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    first, *_ = capsys.readouterr().out.replace("_", "-").splitlines()
    assert command in first


def test_the_installed_script_names_a_function_that_exists():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    scripts = re.findall(r'^"([\w.-]+)" = "([\w.]+):(\w+)"$', text, re.M)
    assert [script for script, *_ in scripts] == ["mlx-vlm-prune", "mlx_vlm_prune.generate"]
    for script, module, function in scripts:
        assert module in (script, "mlx_vlm_prune.__main__")
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        defined = [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
        assert function in defined
