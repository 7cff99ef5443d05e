"""Signals that methods need of a tower, computed between its layers, where tokens leave too.

Where g patches become one visual token after the tower, they leave together: a group is a token
here, its patches side by side.

Shapes: B images, N tokens at present, S = gN + 1 rows with CLS, H heads, D features, d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ...pruners.contract import Reduction, Signals, segment_sum
from ...pruners.numerics import choice_dtype, choosing
from ...pruners.rows import nearest_slots

INSIDE = {"layer_attention", "cls_row", "values"}  # of the layer inside which tokens leave
QUERY_CHUNK = 16  # queries whose attention is computed at once; MLX holds up to eight chunks
MOST_HELD = 2**25  # numbers of attention in a chunk on a GPU, where a launch costs more than memory


@dataclass(frozen=True)
class Cut:
    """A layer of the tower at which K tokens stay.

    `place` is "before" the layer, or in its "middle": between attention and MLP, where
    the keys are known. The layers of `whole` attend to what left here, too; where it `gives_back`,
    that comes back at the tower's end.
    """

    layer: int
    place: str
    K: int
    pruner: Any
    whole: frozenset[int] = frozenset()
    gives_back: bool = False


@dataclass(frozen=True)
class Encoded:
    """What a tower hands over: the signals at its end, what was kept where tokens left, and CLS
    where it has one."""

    signals: Signals
    kept: Reduction | None = None
    cls_BD: mx.array | None = None

    @property
    def arrays(self) -> mx.array:
        """The arrays that `end_part` computes."""
        return self.signals.x_BND


@dataclass(frozen=True)
class Absent:
    """Tokens that left at a cut and are attended to, or come back."""

    cut: Cut
    signals: Signals  # of all tokens, those that left and those that stayed
    all_tokens: Callable[[mx.array], mx.array]  # of the kept ones as they are now
    kept: Reduction | None  # of the whole image, before the cut


class TowerPass:
    """One pass through a tower's layers: the signals read so far, of the tokens still there.

    `want` has the layer of each signal, negative from the end, or None for the tower's entrance;
    the number `layers` is that of the layer behind, which reads what the tower hands over.
    `group` is how many patches, one behind another in the rows, are one token of `signals`.
    `beside` is what else tokens have, (B, N, D) each: it goes along where they leave.
    """

    def __init__(
        self,
        signals: Signals,
        want: Mapping[str, int | None],
        layers: int,
        cuts: Sequence[Cut],
        has_cls: bool = True,
        group: int = 1,
    ):
        self.first, self.group = int(has_cls), group  # where the patches begin
        numbers = [*range(layers + 1), *range(layers)]  # from 0 on, or backwards from the last
        self.want = {name: numbers[i] for name, i in want.items() if i is not None}
        self.cuts, self.N = cuts, signals.x_BND.shape[1]
        self.kept: Reduction | None = None
        self.absent: Absent | None = None
        self.beside: list[mx.array] = []
        needs = [(cut.layer, name) for cut in cuts for name in cut.pruner.method.needs]
        self.inside = {(at, n) for at, n in needs if n in INSIDE}  # signals of layers with cuts
        if self.want.get("before") == 0:
            signals = signals.replace(before_BND=mx.zeros_like(signals.x_BND))
        if any(cut.pruner.is_proportional for cut in cuts):
            signals = signals.replace(size_BN=mx.ones(signals.x_BND.shape[:2]))
        if "represented" in want:
            signals = signals.replace(represented_BN=mx.ones(signals.x_BND.shape[:2]))
        self.signals = signals.replace(has_cls=has_cls)

    @property
    def bias_BS(self) -> mx.array | None:
        """Log of how many tokens each is; CLS is one."""
        if (size_BN := self.signals.get("size_BN")) is None:
            return None
        bias_BN = mx.log(size_BN)
        bias_BN = mx.repeat(bias_BN, self.group, axis=1) if self.group > 1 else bias_BN
        return mx.pad(bias_BN, [(0, 0), (self.first, 0)])

    def tokens(self, x_BSD: mx.array) -> mx.array:
        """The rows of the patches, those of a token side by side, (B, N, gD)."""
        return x_BSD[:, self.first :].reshape(len(x_BSD), -1, self.group * x_BSD.shape[-1])

    def _rows_of(self, x_BND: mx.array, x_BSD: mx.array) -> mx.array:
        """CLS of the rows, and the patches of tokens."""
        patches = x_BND.reshape(len(x_BSD), -1, x_BSD.shape[-1])
        return mx.concatenate([x_BSD[:, : self.first], patches], axis=1)

    def _means(self, x_BS: mx.array) -> mx.array:
        """Of each token the mean of its patches' numbers, (B, N)."""
        return x_BS if self.group == 1 else x_BS.reshape(len(x_BS), -1, self.group).mean(axis=2)

    def cut(
        self, x_BSD: mx.array, layer: int, place: str, keys: dict[str, Any] | None = None
    ) -> mx.array:
        """The tokens that stay, behind CLS. `keys`: what `read` returned of this layer."""
        for cut in self.cuts:
            if (cut.layer, cut.place) == (layer, place):
                x_BSD = self._cut(x_BSD, cut, keys or {})
        if place == "before" and self.want.get("before") == layer + 1:
            self.signals = self.signals.replace(before_BND=self.tokens(x_BSD))
        return x_BSD

    def _cut(self, x_BSD: mx.array, cut: Cut, keys: dict[str, Any]) -> mx.array:
        x_BND = self.tokens(x_BSD)
        signals = self._accumulated(cut.pruner, self.signals.replace(x_BND=x_BND, **keys))
        K = self._left(cut, signals)
        if x_BND.shape[1] == K:
            return x_BSD
        kept = cut.pruner(signals, K)
        if cut.whole or cut.gives_back:
            all_tokens = cut.pruner.call(cut.pruner.method.give_back, signals, kept)
            self.absent = Absent(cut, signals, all_tokens, self.kept)
        self.signals = _with_sizes(self.signals.reduced(kept), self.signals, kept)
        if signals.get("represented_BN") is not None:
            represented_BK = represented_by(kept, signals)
            self.signals = self.signals.replace(represented_BN=represented_BK)
        self.kept = kept.after(self.kept, self.N) if self.kept else kept
        if not cut.gives_back:
            self.beside = [kept.apply(x) for x in self.beside]
        return self._rows_of(kept.tokens(x_BND), x_BSD)

    def attended(self, x_BSD: mx.array, layer: int) -> mx.array:
        """What a layer attends to: the tokens, or with them those that left."""
        absent = self._absent_in(layer)
        return self._whole(absent, x_BSD) if absent else x_BSD

    def _absent_in(self, layer: int) -> Absent | None:
        """The tokens that left and that a layer attends to."""
        absent = self.absent
        return absent if absent and layer in absent.cut.whole else None

    def given_back(self, x_BSD: mx.array) -> mx.array:
        """Behind the last layer: the tokens, with those that come back."""
        absent, x_BSD = self.absent, self.with_returning(x_BSD)
        if absent and absent.cut.gives_back:
            self.signals, self.kept = absent.signals, absent.kept
        self.absent = None
        return x_BSD

    def with_returning(self, x_BSD: mx.array) -> mx.array:
        """The tokens, with those that will come back as they are now."""
        absent = self.absent
        return self._whole(absent, x_BSD) if absent and absent.cut.gives_back else x_BSD

    def _accumulated(self, pruner: Any, signals: Signals) -> Signals:
        """With the scores of all layers so far, where a method adds them up."""
        if pruner.method.accumulate is None:
            return signals
        accumulated_BN = pruner.call(pruner.method.accumulate, signals)
        self.signals = self.signals.replace(accumulated_BN=accumulated_BN)
        return signals.replace(accumulated_BN=accumulated_BN)

    def _left(self, cut: Cut, signals: Signals) -> int:
        """How many tokens stay at a cut: as planned, or as the one image there decides."""
        if not cut.pruner.adapts:
            return cut.K
        last = [other for other in self.cuts if other.pruner is cut.pruner][-1]
        K: int = cut.pruner.call(cut.pruner.method.left, signals, last.K, last.layer - cut.layer)
        return K

    def read(
        self,
        layer: int,
        q_BHSd: mx.array,
        k_BHSd: mx.array,
        received: Callable[[mx.array, mx.array], mx.array] | None = None,
        all_queries: Callable[[], mx.array] | None = None,
        v_BHSd: mx.array | None = None,
    ) -> dict[str, Any]:
        """Note the signals wanted of this layer; return its queries and keys by name.

        `received`: what gives the attention that each row gets (B, S) by queries and keys, where a
        layer of a tower without CLS attends within windows.
        `all_queries`: those of all tokens, where a layer attends to some that left.
        Where a tower has no CLS, the mean patch stands in for it: the attention that a token
        gets from all is taken for that from CLS, the mean query and key for CLS's.
        """
        names = {name for name, wanted_layer in self.want.items() if wanted_layer == layer}
        names = names - {"before"} | {name for at, name in self.inside if at == layer}
        absent = self._absent_in(layer)
        if absent and names and all_queries:
            q_BHSd = all_queries()
        by_token = {name: self._by_token(x) for name, x in (("queries", q_BHSd), ("keys", k_BHSd))}
        values: dict[str, Any] = {
            f"{name}_BNHd": by_token[name].mean(axis=3) for name in names & {"keys", "queries"}
        }
        if v_BHSd is not None and "values" in names:
            values["values_BNHd"] = self._by_token(v_BHSd).mean(axis=3)
            values["cls_value_BHd"] = v_BHSd[:, :, 0] if self.first else v_BHSd.mean(axis=2)
        values |= self._rows(names, q_BHSd, k_BHSd, received)
        if absent:
            self.absent = replace(absent, signals=absent.signals.replace(**values))
        else:
            self.signals = self.signals.replace(**values)
        return {f"{name}_BNHd": x_BNHgd.flatten(3) for name, x_BNHgd in by_token.items()}

    def _by_token(self, x_BHSd: mx.array) -> mx.array:
        """Queries or keys by token, (B, N, H, g, d)."""
        x_BHPd = x_BHSd[:, :, self.first :]
        x_BHNgd = x_BHPd[:, :, :, None]
        if self.group > 1:
            B, H, P, d = x_BHPd.shape
            x_BHNgd = x_BHPd.reshape(B, H, P // self.group, self.group, d)
        return x_BHNgd.swapaxes(1, 2)

    def _rows(
        self, names: set[str], q_BHSd: mx.array, k_BHSd: mx.array,
        received: Callable[[mx.array, mx.array], mx.array] | None,
    ) -> dict[str, mx.array]:  # fmt: skip
        """What CLS asks and is, and what tokens get of its attention, or of all queries'."""
        first, has_cls, values = self.first, bool(self.first), dict[str, mx.array]()
        if "cls_query" in names:
            values["cls_query_BHd"] = q_BHSd[:, :, 0] if has_cls else q_BHSd.mean(axis=2)
        if "cls_key" in names:
            values["cls_key_BHd"] = k_BHSd[:, :, 0] if has_cls else k_BHSd.mean(axis=2)
        rows = {"cls_attention", "local_attention", "cls_row"}
        columns = {"received_attention", "object_attention", "layer_attention"}
        columns |= set() if has_cls else rows
        if has_cls and names & rows:
            attention_BQS = attention(q_BHSd[:, :, :1], k_BHSd, self.bias_BS)
            values |= {f"{name}_BN": self._means(attention_BQS[:, 0, 1:]) for name in names & rows}
        if names & columns:
            if received is None:
                received_BS = received_attention(q_BHSd, k_BHSd, self.bias_BS)[:, first:]
            else:
                received_BS = received(q_BHSd, k_BHSd)
            values |= {f"{name}_BN": self._means(received_BS) for name in names & columns}
        return values

    def _whole(self, absent: Absent, x_BSD: mx.array) -> mx.array:
        return self._rows_of(absent.all_tokens(self.tokens(x_BSD)), x_BSD)

    def end(self, x_BSD: mx.array) -> Encoded:
        cls_BD = x_BSD[:, 0] if self.first else None
        return Encoded(self.signals.replace(x_BND=x_BSD[:, self.first :]), self.kept, cls_BD)


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Images that went through a tower one by one, as one batch."""
    arrays = [part.signals.arrays for part in parts]
    signals = {name: mx.concatenate([each[name] for each in arrays]) for name in arrays[0]}
    reductions, cls = [part.kept for part in parts if part.kept], [part.cls_BD for part in parts]
    kept = None
    if reductions:
        names, marks = reductions[0].parts, [one.is_finite for one in reductions]
        rows = {name: mx.concatenate([one.parts[name] for one in reductions]) for name in names}
        is_finite = mx.stack([mark for mark in marks if mark is not None]).all()
        scores = [one.score_BN for one in reductions if one.score_BN is not None]
        score_BN = mx.concatenate(scores) if len(scores) == len(reductions) else None
        kept = Reduction(**rows, is_finite=is_finite, score_BN=score_BN)
    cls_BD = mx.concatenate([one for one in cls if one is not None]) if cls[0] is not None else None
    return Encoded(parts[0].signals.replace(**signals), kept, cls_BD)


def _with_sizes(reduced: Signals, signals: Signals, kept: Reduction) -> Signals:
    """The reduced signals, with the sizes of each slot's members summed up, and their places."""
    size_BN = signals.get("size_BN")
    if size_BN is None or not kept.merges or kept.index_BK is None:
        return reduced
    return reduced.replace(size_BN=kept.sizes(size_BN), place_BN=kept.place_BK)


def represented_by(kept: Reduction, signals: Signals) -> mx.array:
    """How many patches each kept token stands for, (B, K): those of its members, or its own and
    those of the dropped tokens that are most like it."""
    represented_BN = signals.represented_BN
    if kept.index_BK is None or kept.merges:
        return kept.sizes(represented_BN)
    with choosing():
        slot_BN = nearest_slots(signals.x_BND, kept.index_BK)[1]
    return segment_sum(represented_BN[..., None], slot_BN, kept.slots)[..., 0]


def attention(q_BHQd: mx.array, k_BHSd: mx.array, bias_BS: mx.array | None) -> mx.array:
    """Attention of Q queries, mean over heads, (B, Q, S) float32."""
    logits_BHQS = (q_BHQd @ k_BHSd.swapaxes(2, 3)).astype(mx.float32) * k_BHSd.shape[-1] ** -0.5
    if bias_BS is not None:
        logits_BHQS = logits_BHQS + bias_BS[:, None, None]
    return mx.softmax(logits_BHQS, axis=-1).mean(axis=1)


def received_attention(q_BHSd: mx.array, k_BHSd: mx.array, bias_BS: mx.array | None) -> mx.array:
    """Attention that each token gets, mean over heads and queries, (B, S); no S x S array on a CPU,
    on a GPU none of more than `MOST_HELD` numbers."""
    B, H, S, _ = q_BHSd.shape
    size = (
        QUERY_CHUNK if choice_dtype() == mx.float64 else max(QUERY_CHUNK, MOST_HELD // (B * H * S))
    )
    total_BS = None
    for begin in range(0, S, size):
        if total_BS is not None:
            (k_BHSd,) = mx.depends([k_BHSd], [total_BS])  # one chunk after another
        rows_BQS = attention(q_BHSd[:, :, begin : begin + size], k_BHSd, bias_BS)
        sum_BS = rows_BQS.sum(axis=1)
        total_BS = sum_BS if total_BS is None else total_BS + sum_BS
    assert total_BS is not None
    return total_BS / S


def received_attention_in_windows(
    windows: Sequence[mx.array], q_BHSd: mx.array, k_BHSd: mx.array
) -> mx.array:
    """The same where attention stays within windows, which divide the S tokens."""
    S, parts = q_BHSd.shape[2], []
    for index_W in windows:
        within_BW = received_attention(q_BHSd[:, :, index_W], k_BHSd[:, :, index_W], None)
        parts.append(within_BW * (len(index_W) / S))
    back_S = mx.argsort(mx.concatenate(list(windows)))
    return mx.concatenate(parts, axis=1)[:, back_S]
