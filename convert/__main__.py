"""Trained weights from PyTorch to MLX and back, byte for byte: `python -m convert`."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.checkpoint import DTYPES, as_mlx
from mlx_vlm_prune.checkpoints.errors import Parser, UserError, in_one_sentence, whole
from mlx_vlm_prune.checkpoints.hub import found
from mlx_vlm_prune.checkpoints.llava.composed import READER
from mlx_vlm_prune.checkpoints.minimind.generations import KV_HEADS
from mlx_vlm_prune.checkpoints.quantization import BITS, GROUPS, MODES

from .describe import describe
from .quantise import dequantised, quantised
from .twig import read_twig
from .writing import to_hf, to_mlx, to_torch

SIZE = partial(whole, 1, most=1024)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m mlx_vlm_prune convert", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    told = ways.add_parser("inspect", help="what a checkpoint is; its tensors are not loaded")
    told.add_argument("source", metavar="SRC", help="a .pth, a folder, or a hub name")
    told.add_argument("--vision", metavar="FOLDER", help="of its CLIP or SigLIP tower")
    _to_mlx_options(ways.add_parser("to-mlx", help="from MiniMind-V or LLaVA as published to MLX"))
    back = ways.add_parser("to-torch", help="from a folder for MLX to what was published")
    back.add_argument("source", metavar="SRC", type=Path, help="a folder that to-mlx made")
    back.add_argument(
        "target", metavar="DST", type=Path, help="the .pth to write, or of a LLaVA the folder"
    )
    back.add_argument("--vision", type=Path, metavar="FOLDER", help="also write the tower, here")
    hf = ways.add_parser("to-hf", help="for transformers: MiniMind-V's language model, or a LLaVA")
    hf.add_argument("source", metavar="SRC", type=Path, help="a folder that to-mlx made")
    hf.add_argument("target", metavar="DST", type=Path, help="the folder to make")
    _prune_into_options(ways.add_parser("prune-into", help="so that mlx-vlm itself prunes"))
    for way in ways.choices.values():
        way.add_argument("--revision", help="of a hub name: a branch, tag or commit")
    return parser.parse_args(argv)


def _to_mlx_options(there: argparse.ArgumentParser) -> None:
    there.add_argument("source", metavar="SRC", help="a .pth, a folder, or a hub name")
    there.add_argument("target", metavar="DST", type=Path, help="the folder to make")
    there.add_argument(
        "--vision", metavar="FOLDER", help="its CLIP or SigLIP in Hugging Face's layout"
    )
    there.add_argument("--tokenizer", metavar="FOLDER", help="holds tokenizer.json")
    there.add_argument("--dtype", choices=DTYPES, help="default: each tensor's own")
    there.add_argument("--heads", type=SIZE, help="query heads; no .pth says how many")
    there.add_argument("--kv-heads", type=SIZE, help=f"default {KV_HEADS}, as in MiniMind2")
    there.add_argument("--twig", metavar="FILE", help="TwigVLM's, to go with the model")
    there.add_argument("--twig-layer", type=SIZE, help="that it grows on; no file says which")
    fewer = there.add_mutually_exclusive_group()
    fewer.add_argument("-q", "--quantize", action="store_true", help="the language model")
    fewer.add_argument("--dequantize", action="store_true", help="undo -q, but for what it lost")
    there.add_argument("--q-bits", type=int, choices=BITS, help="bits a weight (default 4)")
    there.add_argument("--q-group-size", type=int, choices=GROUPS, help="weights a scale (64)")
    there.add_argument("--q-mode", choices=MODES, default="affine", help="default affine")


def _prune_into_options(there: argparse.ArgumentParser) -> None:
    there.add_argument("source", metavar="SRC", type=Path, help="a folder that mlx-vlm runs")
    there.add_argument("target", metavar="DST", type=Path, help="the folder to make")
    there.add_argument("--pruner", required=True, metavar="NAME", help="as in generate")
    budget = there.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep-ratio", type=float, metavar="R", help="of an image's tokens")
    budget.add_argument("--keep-tokens", type=int, metavar="K", help="so many of an image's")
    there.add_argument("--vendor", action="store_true", help="copy mlx_vlm_prune into DST, too")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    with in_one_sentence():
        print(run(parse(argv)))


def run(args: argparse.Namespace) -> str:
    """Do what is asked, and say what was done and what was assumed."""
    if args.way == "to-torch":
        to_torch(args.source, args.target, args.vision)
        tower = f"; {args.vision}: its vision tower" if args.vision else ""
        return f"{args.target}: as it was published{tower}"
    if args.way == "to-hf":
        reader = to_hf(args.source, args.target)
        part = "the whole model" if reader == READER else "the language model"
        return f"{args.target}: {part}, for transformers' {reader}"
    if args.way == "prune-into":
        return _prune_into(args)
    path, vision = (name and found(name, args.revision) for name in (args.source, args.vision))
    if args.way == "inspect":
        return describe(path, vision)
    return _to_mlx(args, path, vision)


def _to_mlx(args: argparse.Namespace, path: Path, vision: Path | None) -> str:
    words = args.tokenizer and found(args.tokenizer)
    source = as_mlx(path, vision, words, args.heads, args.kv_heads)
    if bool(args.twig) != bool(args.twig_layer):
        raise UserError("--twig and --twig-layer belong together: a twig, and the layer it reads")
    if args.twig:
        twig = read_twig(found(args.twig), args.twig_layer, source.config)
        source = replace(source, twig=twig)
    if (args.q_bits or args.q_group_size or args.q_mode != "affine") and not args.quantize:
        raise UserError("--q-bits, --q-group-size and --q-mode say how; -q says to quantize")
    if args.dequantize:
        source = dequantised(source, args.dtype)
    if args.quantize:
        source = quantised(source, args.q_bits, args.q_group_size, args.q_mode, args.dtype)
    to_mlx(source, args.target, args.dtype, args.source)
    said = f"{args.target}: {sizes(source.config, source.guessed)}"
    if source.reading is None:
        said += "\nno preprocessor_config.json was found: the tower's usual values are assumed"
    return said


def _prune_into(args: argparse.Namespace) -> str:
    # Methods are the product's: for this way alone, convert asks it.
    from mlx_vlm_prune.hosts.pruned_folder import prune_into

    made = prune_into(
        args.source, args.target, args.pruner, args.keep_ratio, args.keep_tokens, args.vendor
    )
    budget = f"{args.keep_tokens}" if args.keep_ratio is None else f"{args.keep_ratio:.4g}"
    needs = "it needs mlx_vlm_prune, where it is run; --vendor copies that into the folder"
    if made.vendored:
        needs = f"it runs the copy of mlx_vlm_prune beside it ({made.vendored} files), and no other"
    return (
        f"{args.target}: {args.source}, and a pruned.py that keeps {budget} of an image's visual"
        f" tokens by {args.pruner}\n"
        f"{made.linked} files of weights are linked, {made.copied} others copied; {needs}\n"
        "warning: mlx-vlm executes pruned.py whenever it loads this folder, without asking; read"
        " it, as you would read any program"
    )


def sizes(config: dict[str, Any], guessed: bool) -> str:
    """A model in half a line."""
    text, vision = config["text_config"], config["vision_config"]
    heads, groups = text.get("num_attention_heads", "no"), text.get("num_key_value_heads", "no")
    said = (
        f"{text['num_hidden_layers']} layers of {text['hidden_size']}, "
        f"{heads} heads, {groups} key/value heads"
        f"{' (assumed, as in every MiniMind2)' if guessed else ''}, "
    )
    if experts := text.get("num_experts"):
        said += f"{experts} experts, "
    if how := config.get("quantization"):
        said += f"{how['bits']} bits, "
    return said + f"tower of {vision['num_hidden_layers']} layers of {vision['hidden_size']}"


if __name__ == "__main__":
    main()
