"""Attention within windows of a picture out of which tokens leave, each window by another number.

Every row has a place in a window, where it stays: who left leaves room. So nothing depends on which
ones left but an array of places, and nothing returns to the host.

Shapes: S rows at present, Q that ask, W windows of w places each, H heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class PaddedWindows:
    """The places of rows: window by window, of `windows` x `size`."""

    place_S: mx.array
    windows: int
    size: int

    def attend(
        self, q_HQd: mx.array, k_HSd: mx.array, v_HSd: mx.array, bias_S: mx.array | None,
        place_Q: mx.array,
    ) -> mx.array:  # fmt: skip
        """What rows at `place_Q` read within their windows, (H, Q, d); the bias is added to the
        logits of keys."""
        q_WHwd, k_WHwd, v_WHwd = (
            self._spread(q_HQd, place_Q), self._spread(k_HSd), self._spread(v_HSd)
        )  # fmt: skip
        mask_W11w = self._mask(bias_S, q_HQd.dtype)[:, None, None]
        y_WHwd = mx.fast.scaled_dot_product_attention(
            q_WHwd, k_WHwd, v_WHwd, scale=q_HQd.shape[-1] ** -0.5, mask=mask_W11w
        )
        return y_WHwd.swapaxes(0, 1).flatten(1, 2)[:, place_Q]

    def received(
        self, q_1HSd: mx.array, k_1HSd: mx.array, bias_S: mx.array | None = None
    ) -> mx.array:
        """The attention that each row gets, a mean over heads and all rows, (1, S)."""
        q_WHwd, k_WHwd = (self._spread(x[0].astype(mx.float32)) for x in (q_1HSd, k_1HSd))
        logits_WHww = q_WHwd @ k_WHwd.swapaxes(2, 3) * q_1HSd.shape[-1] ** -0.5
        mask_Ww = self._mask(bias_S, mx.float32)
        attention_Www = mx.softmax(logits_WHww + mask_Ww[:, None, None], axis=-1).mean(axis=1)
        is_row_Ww = self._spread(mx.ones((1, len(self.place_S), 1)))[:, 0, :, 0]
        total_Ww = (attention_Www * is_row_Ww[..., None]).sum(axis=1)
        return total_Ww.flatten()[self.place_S][None] / len(self.place_S)

    def _spread(self, x_HSd: mx.array, place_S: mx.array | None = None) -> mx.array:
        """Rows at their places, (W, H, w, d), with 0 where none is."""
        H, _, d = x_HSd.shape
        spread = mx.zeros((H, self.windows * self.size, d), x_HSd.dtype)
        spread[:, self.place_S if place_S is None else place_S] = x_HSd
        return spread.reshape(H, self.windows, self.size, d).swapaxes(0, 1)

    def _mask(self, bias_S: mx.array | None, dtype: mx.Dtype) -> mx.array:
        """What is added to the logits of each place's key, (W, w): next to nothing is read of one
        without a row."""
        absent = mx.full((self.windows * self.size,), mx.finfo(dtype).min, dtype)
        absent[self.place_S] = mx.array(0, dtype) if bias_S is None else bias_S.astype(dtype)
        return absent.reshape(self.windows, self.size)


def windows_of(order_N: np.ndarray, ends: Sequence[int], g: int) -> PaddedWindows:
    """The windows of a whole picture, whose rows stand token by token in raster order.

    `order_N` are the tokens window by window, of g rows each; `ends` the rows where windows begin
    and end.
    """
    begins_W, sizes_W = np.array(ends[:-1]) // g, np.diff(ends) // g
    window_N = np.repeat(np.arange(len(sizes_W)), sizes_W)
    inside_N = np.arange(len(order_N)) - begins_W[window_N]
    size = g * int(sizes_W.max())
    place_N = np.empty(len(order_N), np.int32)
    place_N[order_N] = window_N * size + inside_N * g
    place_S = (place_N[:, None] + np.arange(g, dtype=np.int32)).reshape(-1)
    return PaddedWindows(mx.array(place_S), len(sizes_W), size)
