"""`prune_into`: a checkpoint folder that mlx-vlm runs, written again as one that it runs pruned.

Weights are linked, other files copied; config.json changes, and pruned.py is added. So the new
folder takes no room, and the old one stays as it is. pruned.py attaches pruning to mlx-vlm's model
by this package, or with `vendor` by a copy of it in the folder. The copy is imported under another
name, so that it neither uses nor shadows an installed package.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from string import Template
from textwrap import fill
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.mlx_vlm_folder import RECORD
from ..checkpoints.reading.files import atomic_path, read_header, read_json, write_json
from ..checkpoints.reading.paths import LARGEST_TOKENIZER
from ..checkpoints.version import __version__
from ..inputs.budget import check_budget, default_keep_ratio
from ..pruners import AUTO, NAMES, Pipeline, Stage, plan
from ..pruners.auto import choose
from .auto import facts_of_folder
from .compatibility import why_not_in_family
from .families import FAMILIES, REFUSED
from .families.idefics3 import GLOBAL_IMAGE
from .families.llava import CLIP, has_cls
from .linked_folder import link_or_copy, mlx_vlm_weight_files
from .llava_processor import LLAVA as LLAVA_TYPE

MODEL_FILE = "pruned.py"
PACKAGE = Path(__file__).resolve().parents[1]
LLAVA = (LLAVA_TYPE, "llava_next")
LLAVA_PARTS = (
    "vision_tower.vision_model.", "language_model.", "multi_modal_projector.", "image_newline",
)  # fmt: skip
TILED = ("idefics3", "smolvlm")
HOST_MODULES = {
    "llava_qwen2": "fastvlm",
    "lfm2-vl": "lfm2_vl",
}  # mlx-vlm's, where it has another name than the model
WHY_NOT_IN_FOLDER = {
    Stage.IMAGE: "makes the picture smaller, which the processor would have to do",
    Stage.DECODER: "works between the language model's layers",
}
GLOBAL_IMAGE_MARK = "<global-img>"  # before the tile that shows the whole image
MODEL_FILE_TEXT = Template('''\
"""$about
"""

$attach

PRUNER = $pruner
KEEP_RATIO, KEEP_TOKENS = $keep_ratio, $keep_tokens  # of an image's tokens: a share, or so many


class Model(stock.Model):
    """mlx-vlm's own, but that the language model reads fewer tokens of an image."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)$more
        options = {"keep_ratio": KEEP_RATIO, "keep_tokens": KEEP_TOKENS}$options
        self.pruning_report, _ = attach(self, PRUNER, **options, allow_videos=True)


def __getattr__(name: str) -> Any:
    """All else that mlx-vlm looks for here is its own."""
    return getattr(stock, name)
''')
IMPORT_INSTALLED = Template("""\
${path}from typing import Any

from mlx_vlm.models import $family as stock

try:
    from mlx_vlm_prune import attach
except ImportError as problem:
    raise ImportError(
        f"this folder prunes by mlx_vlm_prune: pip install mlx_vlm_prune ({problem})"
    ) from None""")
IMPORT_VENDORED = Template("""\
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from mlx_vlm.models import $family as stock

NAME = "mlx_vlm_prune_$digest"  # no other has it, so none is taken for another
if NAME not in sys.modules:
    copy = spec_from_file_location(NAME, Path(__file__).parent / "mlx_vlm_prune" / "__init__.py")
    sys.modules[NAME] = module_from_spec(copy)
    copy.loader.exec_module(sys.modules[NAME])
attach = sys.modules[NAME].attach""")


@dataclass(frozen=True)
class WrittenFiles:
    """How many files a new folder has of each kind, and how many tokens its model keeps."""

    linked: int
    copied: int
    vendored: int  # of this package
    budget: str  # of an image's visual tokens: a share, or a number
    pruner: str
    auto: str | None  # why this method, where it was chosen


def prune_into(
    source: Path,
    target: Path,
    pruner: str = AUTO,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    vendor: bool = False,
) -> WrittenFiles:
    """Write `target`, which is `source` with a model that prunes; `vendor` adds a copy of this
    package. Without a budget half of an image's visual tokens stay. What `auto` chooses now is
    written.

    Raises UserError, and leaves nothing, where the model, the method or the budget cannot be.
    """
    config, auto = _config(source), None
    kind = str(config["model_type"])
    check_budget(keep_ratio, keep_tokens)
    if pruner == AUTO:
        facts = facts_of_folder(source, config, partial(_pipeline, kind=kind))
        choice = choose(facts, keep_ratio, keep_tokens)
        pruner, keep_ratio, keep_tokens, auto = *choice.options.values(), choice.line
    pipeline = _pipeline(pruner, kind)
    if keep_ratio is None and keep_tokens is None:
        keep_ratio = default_keep_ratio(pipeline.spec)
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} lies inside {source}, which stays as it is; write elsewhere")
    _check_weights(config, source)
    record: dict[str, Any] = {"pruner": pipeline.spec, "version": __version__}
    record |= {"keep_ratio": keep_ratio} if keep_tokens is None else {"keep_tokens": keep_tokens}
    copies = _package_sources() if vendor else {}
    text = _model_file_text(source, kind, pipeline.spec, keep_ratio, keep_tokens, copies)
    with atomic_path(target, folder=True) as folder:
        linked, copied = link_or_copy(source, folder, ["config.json", MODEL_FILE])
        for name, content in copies.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        write_json(folder / "config.json", config | {"model_file": MODEL_FILE, RECORD: record})
        (folder / MODEL_FILE).write_text(text, encoding="utf-8")
    kept = _budget_text(keep_ratio, keep_tokens)
    return WrittenFiles(linked, copied, len(copies), kept, pipeline.spec, auto)


def _config(source: Path) -> dict[str, Any]:
    """The folder's config.json. Raises UserError where no pruned folder can be written from it."""
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; prune-into takes a local one")
    config = read_json(source / "config.json")
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in REFUSED:
        raise UserError(f"{source} is a {kind} model: {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        reason = f"is a {kind} model" if kind else "has no model_type in config.json"
        raise UserError(f"{source} {reason}; prune-into knows mlx-vlm's {', '.join(FAMILIES)}")
    if RECORD in config:
        raise UserError(f"{source} prunes already; give the folder that it was made from")
    if "model_file" in config:
        raise UserError(f"{source} has a model of its own in {config['model_file']}")
    return config


def _check_weights(config: Mapping[str, Any], source: Path) -> None:
    """Raises UserError where mlx-vlm cannot load them."""
    mlx_vlm_weight_files(source)
    if config["model_type"] in LLAVA:
        _check_llava(config, source)


def _check_llava(config: Mapping[str, Any], source: Path) -> None:
    """Raises UserError where the visual tokens are not the patches of one layer, and for tensors
    under names that mlx-vlm does not read."""
    vision, layer = config.get("vision_config"), config.get("vision_feature_layer", -2)
    tower = vision.get("model_type", CLIP) if isinstance(vision, Mapping) else CLIP
    strategy = config.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        raise UserError(f"{source}: vision_feature_layer is {layer}; of several none can be pruned")
    has_cls(f"{source}:", tower, strategy)
    names = (name for file in mlx_vlm_weight_files(source) for name in read_header(file)[0])
    if other := next((name for name in names if not name.startswith(LLAVA_PARTS)), None):
        raise UserError(
            f"{source}: mlx-vlm cannot load it, since it has {other}, a name of other releases of"
            f" transformers; such a folder runs here, by mlx_vlm_prune.load"
        )


def _pipeline(spec: str, kind: str) -> Pipeline:
    """The methods of a specification. Raises UserError where a folder of a family cannot have
    them."""
    pipeline = plan(spec)
    for step in [*pipeline.steps, *pipeline.enhancers]:
        if reason := WHY_NOT_IN_FOLDER.get(step.stage):
            raise UserError(
                f"{step.name} cannot be written into a checkpoint: it {reason}, and"
                f" {MODEL_FILE} chooses among the tokens that the tower hands over"
            )
        if step.name not in NAMES:
            raise UserError(
                f"{step.name} cannot be written into a checkpoint: it is registered in this"
                " process, and whoever loads the checkpoint does not have it"
            )
    if pipeline.spec == "none":
        raise UserError("none prunes nothing, so there is nothing to write")
    _check_family(kind, pipeline)
    return pipeline


def _check_family(kind: str, pipeline: Pipeline) -> None:
    """Raises UserError for a method that this family of models cannot have."""
    for step in [*pipeline.steps, *pipeline.enhancers]:
        if reason := why_not_in_family(FAMILIES[kind], step):
            raise UserError(f"{step.name} cannot prune a {kind} model: {reason}")


def _model_file_text(
    source: Path,
    kind: str,
    pruner: str,
    keep_ratio: float | None,
    keep_tokens: int | None,
    copies: Mapping[str, bytes],
) -> str:
    """The text of pruned.py."""
    budget = _budget_text(keep_ratio, keep_tokens)
    about = [
        f"This {kind} model keeps {budget} of each image's visual tokens, by {pruner}.",
        'mlx-vlm runs this file because config.json names it as "model_file"; without that line the'
        " model is whole again, for the weights are its own. A chat reads every turn from its"
        " beginning: mlx-vlm finds what it has read by ids, and a prompt has fewer rows than ids"
        f" here. mlx_vlm_prune {__version__} wrote this file, which "
        + ("runs the copy of it that lies here." if copies else "needs it beside mlx-vlm."),
    ]
    digest = sha256(b"".join(name.encode() + copies[name] for name in sorted(copies)))
    more = options = ""
    if kind == LLAVA_TYPE:
        options = (
            '\n        options["processor"] = Path(__file__).parent  # it is loaded after this'
        )
    if kind in TILED:
        token = _token_id(source, GLOBAL_IMAGE_MARK)
        more = f"\n        self.config.{GLOBAL_IMAGE} = {token}  # {GLOBAL_IMAGE_MARK}"
    return MODEL_FILE_TEXT.substitute(
        about="\n\n".join(fill(part, 97) for part in about),
        attach=(IMPORT_VENDORED if copies else IMPORT_INSTALLED).substitute(
            family=HOST_MODULES.get(kind, kind), digest=digest.hexdigest()[:8],
            path="from pathlib import Path\n" if options else "",
        ),
        pruner=json.dumps(pruner), keep_ratio=keep_ratio, keep_tokens=keep_tokens, more=more,
        options=options,
    )  # fmt: skip


def _budget_text(keep_ratio: float | None, keep_tokens: int | None) -> str:
    return f"{keep_ratio:.4g}" if keep_tokens is None else f"{keep_tokens}"


def _token_id(source: Path, text: str) -> int:
    """The id of a special token; UserError where the tokenizer has none of that name."""
    whole = read_json(source / "tokenizer.json", most=LARGEST_TOKENIZER)
    added = whole.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("content") == text:
            return int(token["id"])
    raise UserError(
        f"{source}: tokenizer.json has no {text}, which says where the tiles of an image end"
    )


def _package_sources() -> dict[str, bytes]:
    """This package's sources and licence, by their paths in the folder; without the built-in
    example, whose megabytes no model of mlx-vlm's needs."""
    sources = {
        str(file.relative_to(PACKAGE.parent)): file.read_bytes()
        for file in sorted(PACKAGE.rglob("*.py"))
    }
    return {f"{PACKAGE.name}/LICENSE": _license(), **sources}


def _license() -> bytes:
    """The licence: beside the package in a checkout, elsewhere in an installation."""
    if (PACKAGE.parent / "pyproject.toml").is_file():
        return (PACKAGE.parent / "LICENSE").read_bytes()
    files = metadata.files(PACKAGE.name) or []
    return next(Path(str(f.locate())).read_bytes() for f in files if f.name == "LICENSE")
