"""From a checkpoint folder that mlx-vlm runs to one that it runs pruned.

Weights are linked, all else is copied: nothing but config.json and pruned.py differs, so the old
folder stays as it is, and the new one takes no room.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from ... import __version__
from ...checkpoints.elsewhere import RECORD
from ...checkpoints.errors import UserError
from ...checkpoints.files import appearing, read_json, write_json
from ...pruners import Pipeline, Pruner, Stage, plan
from ...request import check_budget
from ..families import FAMILIES, REFUSED
from .source import INTO, ROOT, Writer

FILE = "pruned.py"
LLAVA = ("llava", "llava_next")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CLIP = "clip_vision_model"
PACKAGES = {"llava_qwen2": "fastvlm"}  # mlx-vlm's, where it has another name than the model
MODULES = {"smolvlm": "idefics3", "llava_qwen2": "fastvlm"}  # ours
TITLES = {
    "llava": "LLaVA", "llava_next": "LLaVA-NeXT", "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "fastvlm": "FastVLM",
    "llava_qwen2": "FastVLM", "gemma3": "Gemma 3", "idefics3": "Idefics3", "smolvlm": "SmolVLM",
    "paligemma": "PaliGemma", "internvl_chat": "InternVL", "pixtral": "Pixtral",
}  # fmt: skip
ELSEWHERE = {
    Stage.IMAGE: "makes the picture smaller, which the processor would have to do",
    Stage.ENCODER: "works between the tower's layers",
    Stage.DECODER: "works between the language model's layers",
}
GLOBAL_IMAGE = "<global-img>"


@dataclass(frozen=True)
class Written:
    """What was made."""

    linked: int  # files
    copied: int
    leans: bool  # does pruned.py import this package?


def prune_into(
    source: Path, target: Path, pruner: str, keep_ratio: float | None, keep_tokens: int | None
) -> Written:
    """Write `target`, which is `source` with a model that prunes.

    Raises UserError, and leaves nothing, where the model, the method or the budget cannot be.
    """
    config = _config(source)
    pipeline = _pipeline(pruner, config["model_type"])
    check_budget(keep_ratio, keep_tokens)
    if keep_ratio is None and keep_tokens is None:
        raise UserError("give --keep-ratio or --keep-tokens")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} lies inside {source}, which stays as it is; write elsewhere")
    text, leans = _source(source, config, pipeline, keep_ratio, keep_tokens)
    record: dict[str, Any] = {"pruner": pipeline.name, "version": __version__}
    record |= {"keep_ratio": keep_ratio} if keep_tokens is None else {"keep_tokens": keep_tokens}
    with appearing(target, folder=True) as folder:
        linked, copied = _take_over(source, folder)
        write_json(folder / "config.json", config | {"model_file": FILE, RECORD: record})
        (folder / FILE).write_text(text, encoding="utf-8")
    return Written(linked, copied, leans)


def _config(source: Path) -> dict[str, Any]:
    """The folder's config.json, once it is known that pruning can be written into it."""
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; prune-into takes a local one")
    config = read_json(source / "config.json")
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in REFUSED:
        raise UserError(f"{source} is a {kind} model: {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{source} is a {kind} model; prune-into knows mlx-vlm's {', '.join(FAMILIES)}"
        )
    if RECORD in config:
        raise UserError(f"{source} prunes already; give the folder that it was made from")
    if "model_file" in config:
        raise UserError(f"{source} has a model of its own in {config['model_file']}")
    if not any(source.glob("*.safetensors")):
        raise UserError(f"{source} holds no .safetensors, and mlx-vlm reads no other weights")
    if kind in LLAVA:
        _check_llava(config, source)
    return config


def _check_llava(config: Mapping[str, Any], source: Path) -> None:
    """Are the visual tokens the patches of one layer?"""
    layer = config.get("vision_feature_layer", -2)
    how = config.get("vision_feature_select_strategy", "default")
    has_cls = _tower(config) == CLIP
    if not isinstance(layer, int):
        raise UserError(f"{source}: vision_feature_layer is {layer}; of several none can be pruned")
    if (how == "default") is not has_cls:
        raise UserError(
            f"{source}: vision_feature_select_strategy is {how!r} over a {_tower(config)}, so its"
            " visual tokens are not the patches of a grid"
        )


def _tower(config: Mapping[str, Any]) -> Any:
    told = config.get("vision_config")
    return told.get("model_type", CLIP) if isinstance(told, Mapping) else CLIP


def _pipeline(spec: str, kind: str) -> Pipeline:
    pipeline = plan(spec)
    for step in pipeline.steps:
        if step.stage in ELSEWHERE:
            raise UserError(
                f"{step.name} cannot be written into a checkpoint: it {ELSEWHERE[step.stage]}, and"
                f" {FILE} chooses among the tokens that the tower hands over"
            )
    if pipeline.enhancer:
        raise UserError(
            f"{pipeline.enhancer.name} cannot be written into a checkpoint: it adds to the"
            " attention of the language model, which stays as it is"
        )
    if pipeline.name == "none":
        raise UserError("none prunes nothing, so there is nothing to write")
    return pipeline


def _source(
    source: Path,
    config: Mapping[str, Any],
    pipeline: Pipeline,
    keep_ratio: float | None,
    keep_tokens: int | None,
) -> tuple[str, bool]:
    """The text of pruned.py, and whether it imports this package."""
    kind, (first, *more) = config["model_type"], pipeline.steps
    needs = set(first.method.needs) - {"grid"}
    has_cls = kind == "internvl_chat" or (kind in LLAVA and _tower(config) == CLIP)
    is_free = not more and needs <= ({"cls_attention"} if has_cls else set())
    values = {"KEEP_RATIO": repr(keep_ratio), "KEEP_TOKENS": repr(keep_tokens)}
    if MODULES.get(kind, kind) == "idefics3":
        values["GLOBAL_IMAGE"] = str(_token(source, GLOBAL_IMAGE))
    budget = f"{keep_ratio:.4g} of" if keep_tokens is None else f"{keep_tokens} of"
    title = f"{TITLES[kind]} that keeps {budget} each image's visual tokens: {pipeline.name}."
    family = PACKAGES.get(kind, kind)
    if not is_free:
        writer = Writer({}, values | {"PRUNER": json.dumps(pipeline.name)}, family)
        return writer.written(INTO / "leaning.py", _docstring(title, None)), True
    options = {**first.options}
    if needs:
        values["LAYER"] = str(options.pop("layer", first.method.options["layer"]))
    listed = ", ".join(f"{json.dumps(k)}: {_literal(v)}" for k, v in options.items())
    writer = Writer(_instead(first, kind), values | {"OPTIONS": f"{{{listed}}}"}, family)
    shell = INTO / ("mrope.py" if kind in QWEN else "shorter.py")
    return writer.written(shell, _docstring(title, first)), False


def _instead(pruner: Pruner, kind: str) -> dict[tuple[Path, str], Path]:
    """Which modules stand in the places of those that the code is checked with."""
    contract, methods = ROOT / "pruners" / "contract.py", ROOT / "pruners"
    name = MODULES.get(kind, kind) + ("_cls" if "cls_attention" in pruner.method.needs else "")
    places = {(contract, one): INTO / "short.py" for one in ("Signals", "Reduction")}
    places[INTO / "family.py", ""] = INTO / "families" / f"{name}.py"
    places[INTO / "method.py", ""] = methods / f"{pruner.name}.py"
    if pruner.stage is Stage.PROJECTED:
        places[INTO / "features.py", ""] = INTO / "projected.py"
    return places


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _token(source: Path, text: str) -> int:
    """The id of a special token; UserError where the tokenizer has none of that name."""
    added = read_json(source / "tokenizer.json").get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("content") == text:
            return int(token["id"])
    raise UserError(
        f"{source}: tokenizer.json has no {text}, which says where the tiles of an image end"
    )


def _docstring(title: str, pruner: Pruner | None) -> str:
    """What pruned.py says of itself."""
    needs = "It needs nothing but mlx-vlm." if pruner else "It needs mlx_vlm_prune beside mlx-vlm."
    undo = (
        f'mlx-vlm runs this file because config.json names it as "model_file"; without that line'
        f" the model is whole again, for the weights are its own. {needs} mlx-vlm's server reads"
        " several prompts at once with it. A chat reads every turn from its beginning: mlx-vlm"
        " finds what it has read by ids, and a prompt has fewer rows than ids here. Written by"
        f" mlx_vlm_prune {__version__}."
    )
    parts = [fill(title, 97)]
    if pruner:
        told, _, _ = pruner.method.doc.partition("\n\nShapes:")
        parts.append(told.strip())
    parts.append(fill(undo, 97))
    parts.append(
        "Shapes: B or I pictures, N visual tokens of one, K kept of it, k of all, S tokens with\n"
        "CLS, H heads, d head size, L rows of the prompt, l of them left, D features."
    )
    return "\n\n".join(parts)


def _take_over(source: Path, folder: Path) -> tuple[int, int]:
    """Everything but config.json and what is hidden; how many files were linked, and copied.

    Weights alone are linked: a small file that an editor changes in place would change in both.
    """
    linked = copied = 0
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if any(part.startswith(".") for part in name.parts) or not file.is_file():
            continue
        if str(name) in ("config.json", FILE):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors" and _link(file, folder / name):
            linked += 1
        else:
            shutil.copyfile(file, folder / name)
            copied += 1
    return linked, copied


def _link(file: Path, there: Path) -> bool:
    """A hard link, if the disk makes one; a hub's file is itself a link to another."""
    try:
        os.link(file.resolve(), there)
    except OSError:
        return False
    return True
