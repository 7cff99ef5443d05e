"""Record what one of our models computes under each method, for a comparison with a framework.

python -m mlx_vlm_prune.generation.recording my-model --image photo.jpg --pruner norm --out FOLDER

`torch_ref.verify` starts it in a process of its own and recomputes FOLDER/record.json and
FOLDER/record.safetensors. All is computed in float32.

Shapes: I images, K visual rows of all images, D features, T tokens of the answer, V words.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..checkpoints.command_line import Parser, in_one_sentence
from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import write_json
from ..inputs.budget import DEFAULT_KEEP_RATIO, check_budget, tokens_for
from ..inputs.processor import Processor
from ..machine.hardware import environment
from ..models.loading import find_folder, load_folder
from ..models.vlm import VLM
from ..pruners.own_methods import method_spec
from .request import check_decoding
from .stream import PreparedPrompt, pipeline_for, prepare_prompt

FACTS, ARRAYS = "record.json", "record.safetensors"
DESCRIPTION = "Record what a model computes under each method; torch_ref.verify compares it."


# fmt: off
def build_parser() -> Parser:
    """The command line that `torch_ref.verify` fills in."""
    parser = Parser("mlx_vlm_prune.generation.recording", description=DESCRIPTION)
    add = parser.add_argument
    add("model", metavar="MLX_FOLDER", help="a folder that `convert to-mlx` made, or a LLaVA")
    add("--image", action="append", required=True, metavar="FILE",
        help="an image file; repeat for several (default: none)")
    add("--prompt", default="What is in the picture?", metavar="TEXT", help="the question")
    add("--pruner", action="append", type=method_spec, required=True, metavar="SPEC",
        help="a method or a chain; repeat for several (default: none)")
    add("--keep-ratio", type=float, default=DEFAULT_KEEP_RATIO, metavar="R",
        help="share of an image's visual tokens to keep")
    add("--max-tokens", type=int, default=16, metavar="N", help="longest answer, in tokens")
    add("--device", choices=("cpu", "gpu"), help="where MLX computes (default: MLX's own choice)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="an existing folder to write to")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        check_budget(args.keep_ratio, None)
        check_decoding(args.max_tokens, 0.0, 1.0, 0)
        if args.device:
            mx.set_default_device(mx.cpu if args.device == "cpu" else mx.gpu)
        record(args)


def record(args: argparse.Namespace) -> None:
    """Load the model, answer under every method, and write both files."""
    model, processor = load_folder(find_folder(args.model), args.model, "float32")
    if model.config.quantization:
        raise UserError(
            f"{args.model} is quantized, and so holds other numbers than its source; give a folder"
            " that was converted without -q"
        )
    prepared = prepare_prompt(model, processor, args.prompt, args.image)
    assert prepared.pixels is not None, "there is an image"
    arrays, methods = {"pixels": prepared.pixels}, []
    for number, spec in enumerate(tqdm(args.pruner, desc="MLX", file=sys.stderr)):
        try:
            facts, computed = compute(model, processor, prepared, spec, args)
        except UserError as mistake:
            methods.append({"pruner": spec, "refused": str(mistake)})
            continue
        methods.append({"pruner": spec, **facts})
        arrays |= {f"{number}.{name}": array for name, array in computed.items()}
    mx.save_safetensors(str(args.out / ARRAYS), arrays)
    facts = {
        "N": model.N, "ids": list(prepared.prompt.ids), "runs": list(prepared.prompt.runs),
        "methods": methods, "environment": environment(model.dtype),
    }  # fmt: skip
    write_json(args.out / FACTS, facts)


def compute(
    model: VLM, processor: Processor, prepared: PreparedPrompt, spec: str, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """What one method keeps and answers, and the arrays on the way. Raises UserError.

    `features` (K, D) are the visual rows that the language model's first layer reads, `logits`
    (T, V) those that chose each token.
    """
    pipeline = pipeline_for(model, spec)
    K = model.N if spec == "none" else tokens_for(model.N, args.keep_ratio)
    K = pipeline.trained_tokens or pipeline.own_budget(model.N) or K
    read = model.splice_images([prepared.prompt], prepared.pixels, pipeline, K)
    decoded, cache = model.decode(read)
    prefill = model.finish_prefill(read, decoded, cache)
    columns = [column for columns in read.spliced.image_columns for column in columns]
    logits, tokens, logits_V = [], list[int](), prefill.logits_BV[0]
    while True:
        logits.append(logits_V)
        tokens.append(int(np.array(mx.argmax(logits_V))))
        if len(tokens) == args.max_tokens or tokens[-1] in processor.tokenizer.eos_token_ids:
            break
        logits_V = prefill.step(mx.array([[tokens[-1]]]))[0, -1]
    layers = prefill.trace.layers(model.config.text.num_hidden_layers)
    kept = [[layer["first"], layer["kept_indices"]] for layer in layers]
    facts = {"K": K, "tokens": tokens, "kept": kept, "text": processor.tokenizer.decode(tokens)}
    features_KD = read.spliced.x_BLD[0][mx.array(columns)]
    return facts, {"features": features_KD, "logits": mx.stack(logits)}


if __name__ == "__main__":
    main()
