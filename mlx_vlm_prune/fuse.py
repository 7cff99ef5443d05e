"""Fuse adapters into the model that they were trained for.

mlx-vlm-prune fuse --model my-model --adapter-path adapters --save-path fused-model

`generate`, `evaluate` and `convert` take the folder. In a quantized model the adapted matrices are
quantized again with the same number of bits, and the rounding error is printed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .checkpoints.command_line import Parser, in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.families import read_checkpoint
from .checkpoints.reading.files import check_target
from .checkpoints.writing import write_folder
from .hosts.fusing import fuse_into_folder
from .hosts.loading import kind_of
from .models.adapters import load_adapters
from .models.fusing import Fusion, fuse
from .models.loading import find_folder, load_folder

DESCRIPTION = "Fuse adapters into the model that they were trained for."


# fmt: off
def build_parser() -> Parser:
    """The command line of `fuse`; its options are mlx-lm's."""
    parser = Parser("mlx_vlm_prune.fuse", description=DESCRIPTION)
    add = parser.add_argument
    add("--model", help="folder or Hugging Face name (default: the built-in scenes model)")
    add("--revision",
        help="branch, tag or commit of a Hugging Face name (default: its main branch)")
    add("--adapter-path", default="adapters", metavar="FOLDER", help="the adapters")
    add("--save-path", type=Path, default=Path("fused_model"), metavar="FOLDER",
        help="the folder to write")
    add("--dequantize", action="store_true",
        help="write full matrices instead of quantized ones, without rounding")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Load, fuse, write, and say what became of the adapters."""
    check_target(args.save_path, replace=False)
    folder = find_folder(args.model, args.revision)
    if kind := kind_of(folder):
        if args.dequantize:
            raise UserError(
                f"{folder} is a {kind} model of mlx-vlm's, whose matrices stay quantized here;"
                " mlx_vlm.convert can dequantize them first"
            )
        fusion = fuse_into_folder(folder, args.adapter_path, args.save_path)
        print(_outcome(fusion, args.save_path, is_ours=False))
        return
    model, _ = load_folder(folder, args.model or "scenes", "float32")
    learned = load_adapters(model, args.adapter_path)
    checkpoint = read_checkpoint(folder)
    if args.dequantize and not checkpoint.config.get("quantization"):
        raise UserError(f"{folder} is not quantized: there is nothing to dequantize")
    fused, fusion = fuse(checkpoint, model, learned, args.dequantize)
    write_folder(fused, args.save_path, source=args.model)
    print(_outcome(fusion, args.save_path, is_ours=True))


def _outcome(fusion: Fusion, target: Path, is_ours: bool) -> str:
    """What was done, and what quantizing again cost."""
    text = f"Fused {fusion.matrices} adapters into {target}"
    if not fusion.requantized:
        return text
    text += (
        f"; {fusion.requantized} matrices were quantized again, which rounds by"
        f" {fusion.rounded_share:.0%} of what the adapters change"
    )
    if fusion.unchanged and fusion.change:
        text += f", and {fusion.unchanged} of them came out as they were"
    return text + (" (--dequantize rounds nothing off)" if is_ours else "")


if __name__ == "__main__":
    main()
