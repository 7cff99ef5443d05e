"""A method of your own in one file: keep the tokens that differ most from their neighbours.

python examples/new_method.py
mlx-vlm-prune generate --pruner examples/new_method.py --keep-ratio 0.5 --overlay kept.png
mlx-vlm-prune evaluate --pruner random examples/new_method.py --keep-ratio 0.25 --per-kind 20

`mlx-vlm-prune new-method NAME` writes such a file, and its twin in PyTorch to check it against.

Options:
    power: exponent of a difference

Shapes: B images, N = H x W tokens, K kept, D features.
"""

import mlx.core as mx

from mlx_vlm_prune import Reduction, Signals, Stage, UserError
from mlx_vlm_prune.pruners.numerics import choosing, constant, keep_highest, to_choice_dtype

stage = Stage.FEATURES  # at the end of the vision tower
needs: dict[str, str | None] = {}  # signals beside the tokens, such as {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, power: float = 1.0) -> Reduction:
    """Keep K of N tokens; keyword-only parameters are the options."""
    if not signals.is_whole:
        raise UserError("new_method needs all tokens of the image; it cannot follow another method")
    with choosing():  # in float64 on a CPU, in float32 on a GPU
        B, N, D = signals.x_BND.shape
        x_BHWD = to_choice_dtype(signals.x_BND).reshape(B, *signals.grid, D)

        def difference(a_BHWD: mx.array, b_BHWD: mx.array) -> mx.array:
            distance_BHW = mx.sqrt(mx.square(a_BHWD - b_BHWD).sum(axis=-1))
            return mx.power(distance_BHW, constant(power))

        right_BHW = difference(x_BHWD[:, :, 1:], x_BHWD[:, :, :-1])
        below_BHW = difference(x_BHWD[:, 1:], x_BHWD[:, :-1])
        score_BHW = mx.zeros((B, *signals.grid), dtype=x_BHWD.dtype)
        for side in ((0, 1), (1, 0)):  # each difference counts for both of its tokens
            score_BHW = score_BHW + mx.pad(right_BHW, ((0, 0), (0, 0), side))
            score_BHW = score_BHW + mx.pad(below_BHW, ((0, 0), side, (0, 0)))
        return Reduction(index_BK=keep_highest(score_BHW.reshape(B, N), K))


if __name__ == "__main__":  # a question about a drawn scene, full and pruned
    from mlx_vlm_prune.generate import main

    main(["--pruner", __file__, "--keep-ratio", "0.5"])
