"""Trained weights from PyTorch to MLX and back, byte for byte: `python -m convert`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.checkpoint import DTYPES
from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence, whole_number
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.hub import resolve_path
from mlx_vlm_prune.checkpoints.llava.published import TRANSFORMERS_CLASS
from mlx_vlm_prune.checkpoints.minimind.generations import KV_HEADS
from mlx_vlm_prune.checkpoints.quantization import BITS, GROUPS, MODES
from mlx_vlm_prune.checkpoints.reading.files import check_target
from mlx_vlm_prune.checkpoints.writing import write_folder

from .describe import as_json, as_text, describe
from .quantise import packed_share, quantised
from .to_hf import to_hf
from .to_torch import to_torch
from .twig import read_twig

SIZE = partial(whole_number, 1, most=1024)
DESCRIPTION = "Convert trained weights from PyTorch to MLX and back, byte for byte."
SOURCE, OURS = "a .pth, a folder, or a Hugging Face name", "a folder that to-mlx made"
TARGET = "the folder to make"
VISION = "its CLIP or SigLIP, in Hugging Face's layout (default: beside SRC)"
REVISION = "branch, tag or commit of a Hugging Face name (default: its main branch)"


# fmt: off
def build_parser() -> Parser:
    """The command line of the converter, one subcommand for each way."""
    parser = Parser("convert", description=DESCRIPTION)
    ways = parser.add_subparsers(dest="way", required=True, title="ways")
    add_way = partial(_add_way, ways)
    inspect = add_way("inspect", "say what a checkpoint is, without loading its tensors")
    inspect.add_argument("source", metavar="SRC", help=SOURCE)
    inspect.add_argument("--vision", metavar="FOLDER", help=VISION)
    inspect.add_argument("--revision", help=REVISION)
    inspect.add_argument("--json", action="store_true", help="print a JSON object")
    _add_to_mlx(add_way("to-mlx", "from MiniMind-V or LLaVA as published to MLX"))
    to_torch = add_way("to-torch", "from a folder for MLX back to the layout as published")
    to_torch.add_argument("source", metavar="SRC", type=Path, help=OURS)
    to_torch.add_argument(
        "target", metavar="DST", type=Path, help="the .pth to write; of a LLaVA, the folder"
    )
    to_torch.add_argument(
        "--vision", type=Path, metavar="FOLDER",
        help="also write the vision tower, to this folder (default: not written)",
    )
    to_hf = add_way("to-hf", "the language model, or a whole LLaVA, for transformers")
    to_hf.add_argument("source", metavar="SRC", type=Path, help=OURS)
    to_hf.add_argument("target", metavar="DST", type=Path, help=TARGET)
    _add_prune_into(add_way("prune-into", "a folder for mlx-vlm in which mlx-vlm itself prunes"))
    return parser


def _add_way(ways: Any, name: str, summary: str) -> Parser:
    return ways.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")


def _add_to_mlx(way: Parser) -> None:
    way.add_argument("source", metavar="SRC", help=SOURCE)
    way.add_argument("target", metavar="DST", type=Path, help=TARGET)
    add = way.add_argument_group("source").add_argument
    add("--vision", metavar="FOLDER", help=VISION)
    add("--tokenizer", metavar="FOLDER",
        help="folder that holds tokenizer.json (default: beside SRC)")
    add("--revision", help=REVISION)
    add("--heads", type=SIZE, metavar="N",
        help="query heads, which no .pth states (default: by the key/value heads)")
    add("--kv-heads", type=SIZE, metavar="N",
        help=f"key/value heads (default: {KV_HEADS}, as in MiniMind2)")
    add("--projector-seed", type=partial(whole_number, 0), metavar="SEED",
        help="give a MiniMind's language model alone an untrained projector (default: refuse it)")
    add("--twig", metavar="FILE", help="TwigVLM's twig, to lie beside the model (default: none)")
    add("--twig-layer", type=SIZE, metavar="N", help="the layer that the twig grows on, which no"
        " file states; needed with --twig")
    add = way.add_argument_group("target").add_argument
    add("--dtype", choices=DTYPES, help="of the tensors (default: each tensor's own)")
    which = way.add_argument_group("quantization, as in mlx-lm")
    exclusive = which.add_mutually_exclusive_group()
    exclusive.add_argument("-q", "--quantize", action="store_true",
                           help="quantize the language model")
    exclusive.add_argument("--dequantize", action="store_true",
                           help="undo -q; what it rounded stays rounded")
    add = which.add_argument
    add("--q-bits", type=int, choices=BITS, help="bits of a weight (default: 4; mxfp8: 8)")
    add("--q-group-size", type=int, choices=GROUPS,
        help="weights that share a scale (default: affine 64, mxfp4 and mxfp8 32, nvfp4 16)")
    add("--q-mode", choices=MODES, default="affine", help="how a group is scaled")
    add("--q-tower", action="store_true", help="quantize the vision tower, too")


def _add_prune_into(way: Parser) -> None:
    way.add_argument("source", metavar="SRC", type=Path, help="a folder that mlx-vlm runs")
    way.add_argument("target", metavar="DST", type=Path, help=TARGET)
    way.add_argument("--pruner", default="auto", metavar="SPEC",
                     help="a method, as in `generate`; auto writes the one that it chooses now")
    budget = way.add_mutually_exclusive_group()
    budget.add_argument("--keep-ratio", type=float, metavar="R",
                        help="share of an image's visual tokens to keep (default: half)")
    budget.add_argument("--keep-tokens", type=int, metavar="K",
                        help="number of an image's visual tokens to keep (default: none)")
    way.add_argument("--vendor", action="store_true",
                     help="copy the sources of mlx_vlm_prune into DST, which then runs these")
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    with in_one_sentence(parser):
        if not arguments:
            parser.print_help(sys.stderr)
            sys.exit(2)
        print(run(parser.parse_args(arguments)))


def run(args: argparse.Namespace) -> str:
    """Convert, and return what was done and what was assumed."""
    if args.way == "to-torch":
        to_torch(args.source, args.target, args.vision)
        tower = f"; {args.vision}: its vision tower, likewise" if args.vision else ""
        return f"{args.target}: every tensor of {args.source}, byte for byte{tower}"
    if args.way == "to-hf":
        class_name = to_hf(args.source, args.target)
        is_whole = class_name == TRANSFORMERS_CLASS
        part = "the whole model" if is_whole else "the language model"
        return f"{args.target}: {part}, for transformers' {class_name}"
    if args.way == "prune-into":
        return _prune_into(args)
    path = resolve_path(args.source, args.revision)
    vision = None if args.vision is None else resolve_path(args.vision, args.revision)
    if args.way == "inspect":
        about = describe(path, vision)
        return as_json(about, path) if args.json else as_text(about, path)
    return _to_mlx(args, path, vision)


def _to_mlx(args: argparse.Namespace, path: Path, vision: Path | None) -> str:
    _check_to_mlx(args)
    tokenizer = None if args.tokenizer is None else resolve_path(args.tokenizer)
    checkpoint = read_checkpoint(
        path, vision, tokenizer, args.heads, args.kv_heads, args.projector_seed
    )
    if args.twig:
        twig = read_twig(resolve_path(args.twig), args.twig_layer, checkpoint.config)
        checkpoint = replace(checkpoint, learned=twig)
    if args.dequantize:
        from mlx_vlm_prune.models.dequantized import dequantised  # imports mlx

        checkpoint = dequantised(checkpoint, args.dtype)
    if args.quantize:
        settings = args.q_bits, args.q_group_size, args.q_mode
        checkpoint = quantised(checkpoint, *settings, args.dtype, args.q_tower)
    write_folder(checkpoint, args.target, args.dtype, args.source)
    report = f"{args.target}: {sizes(checkpoint.config, checkpoint.heads_assumed)}"
    if checkpoint.preprocessor_folder is None:
        report += "\nno preprocessor_config.json was found: the tower's usual values are assumed"
    return f"{report}\n{packed_share(checkpoint)}" if args.quantize else report


def _check_to_mlx(args: argparse.Namespace) -> None:
    """Raises UserError, before anything is read, for options that do not go together and for a
    target that is there."""
    if bool(args.twig) != bool(args.twig_layer):
        raise UserError("--twig and --twig-layer belong together: a twig, and the layer it reads")
    flags = {
        "--q-bits": args.q_bits, "--q-group-size": args.q_group_size,
        "--q-mode": args.q_mode != "affine", "--q-tower": args.q_tower,
    }  # fmt: skip
    without_effect = [flag for flag, is_set in flags.items() if is_set and not args.quantize]
    if without_effect:
        verb = "has" if len(without_effect) == 1 else "have"
        raise UserError(f"{' and '.join(without_effect)} {verb} no effect without -q; add -q")
    check_target(args.target, replace=False)


def _prune_into(args: argparse.Namespace) -> str:
    # Here, since only this way needs the methods, and with them MLX.
    from mlx_vlm_prune.hosts.pruned_folder import prune_into

    written = prune_into(
        args.source, args.target, args.pruner, args.keep_ratio, args.keep_tokens, args.vendor
    )
    needs = "it needs mlx_vlm_prune where it is run; --vendor copies that into the folder"
    if written.vendored:
        needs = (
            f"it runs the copy of mlx_vlm_prune beside it ({written.vendored} files), and no other"
        )
    why = f"{written.auto}\n" if written.auto else ""
    return (
        f"{args.target}: {args.source}, and a pruned.py that keeps {written.budget} of an image's"
        f" visual tokens by {written.pruner}\n{why}"
        f"{written.linked} files of weights are linked, {written.copied} others copied; {needs}\n"
        "warning: mlx-vlm executes pruned.py whenever it loads this folder, without asking; read"
        " it, as you would read any program"
    )


def sizes(config: dict[str, Any], guessed: bool) -> str:
    """Layers, widths and heads of a model, in half a line."""
    text, vision = config["text_config"], config["vision_config"]
    heads, groups = text.get("num_attention_heads", "no"), text.get("num_key_value_heads", "no")
    summary = (
        f"{text['num_hidden_layers']} layers of {text['hidden_size']}, "
        f"{heads} heads, {groups} key/value heads"
        f"{' (assumed, as in every MiniMind2)' if guessed else ''}, "
    )
    if experts := text.get("num_experts"):
        summary += f"{experts} experts, "
    if how := config.get("quantization"):
        summary += f"{how['bits']} bits, "
    return summary + f"tower of {vision['num_hidden_layers']} layers of {vision['hidden_size']}"


if __name__ == "__main__":
    main()
