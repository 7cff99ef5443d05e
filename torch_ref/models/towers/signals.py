"""Signals that are read between a tower's layers, and tokens that leave there.

Shapes: B images, N patches, S tokens with CLS where there is one, D features, H heads,
d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlx_vlm_prune.checkpoints.errors import UserError

from ...pruners import Reduction, Signals, Step, entry, reduce
from ...pruners.numerics import nearest_slots


def attention(q_BHSd: Tensor, k_BHSd: Tensor, bias_B11S: Tensor | None) -> Tensor:
    """Who attends to whom, mean over heads, (B, S, S)."""
    logits_BHSS = (q_BHSd @ k_BHSd.mT).float() / q_BHSd.shape[-1] ** 0.5
    if bias_B11S is not None:
        logits_BHSS = logits_BHSS + bias_B11S
    return logits_BHSS.softmax(-1).mean(1)


@dataclass(frozen=True)
class Encoded:
    """The tokens on their way through the tower: what they are, and what they came from."""

    signals: Signals
    kept: Reduction | None  # of the whole image, where tokens left
    cls_BCD: Tensor  # C = 1, or 0 in a tower without CLS
    N: int  # of the whole image
    away: "Away | None" = None  # tokens that left and are still known

    def with_tokens(self, x_BSD: Tensor) -> "Encoded":
        signals = self.signals.replace(x_BND=x_BSD[:, self.first :])
        return replace(self, signals=signals, cls_BCD=x_BSD[:, : self.first])

    @property
    def first(self) -> int:
        """Where the patches begin."""
        return self.cls_BCD.shape[1]

    @property
    def x_BSD(self) -> Tensor:
        return torch.cat([self.cls_BCD, self.signals.x_BND], dim=1)

    @property
    def bias_B11S(self) -> Tensor | None:
        """Log of how many patches each token is; CLS is one."""
        size_BN = self.signals.get("size_BN")
        return None if size_BN is None else F.pad(size_BN.log(), (self.first, 0))[:, None, None]

    def read(self, names: set[str], keys: dict[str, Tensor], q: Tensor, k: Tensor) -> "Encoded":
        """Note the signals that are wanted of this layer."""
        values: dict[str, Any] = {
            f"{name}_BNHd": keys[f"{name}_BNHd"] for name in names & {"keys", "queries"}
        }
        if "cls_query" in names:  # without CLS the mean patch stands in for it
            values["cls_query_BHd"] = q[:, :, 0] if self.first else q.mean(2)
        if "cls_key" in names:
            values["cls_key_BHd"] = k[:, :, 0] if self.first else k.mean(2)
        if names - {"keys", "queries", "cls_query", "cls_key"}:
            attention_BSS = attention(q, k, self.bias_B11S)
            received_BN = attention_BSS.mean(1)[:, self.first :]
            columns = dict.fromkeys(
                ("received_attention", "object_attention", "layer_attention"), received_BN
            )
            cls_BN = attention_BSS[:, 0, 1:] if self.first else received_BN
            columns["cls_attention"] = columns["local_attention"] = cls_BN
            values |= {f"{name}_BN": column for name, column in columns.items() if name in names}
        return replace(self, signals=self.signals.replace(**values))

    def accumulated(self, step: Step, **keys: Any) -> "Encoded":
        """With the scores that a step adds up from layer to layer."""
        if "accumulate" not in vars(step.method):
            return self
        accumulated_BN = step.call("accumulate", self.signals.replace(**keys))
        return replace(self, signals=self.signals.replace(accumulated_BN=accumulated_BN))

    def cut(self, step: Step, K: int, **keys: Any) -> "Encoded":
        """After a step that leaves K tokens."""
        kept = reduce(step.name, self.signals.replace(**keys), K, **step.options)
        assert kept.index_BK is not None
        away = self.away
        if entry(step.method, "give_back") is not None:
            all_tokens = step.call("give_back", self.signals, kept)
            away = Away(self, all_tokens, kept.index_BK, step)
        signals = self.signals.take(kept.index_BK)
        if step.merges and kept.weight_BKN is not None:
            members = (kept.weight_BKN > 0).to(self.signals.size_BN)
            size_BN = (members @ self.signals.size_BN[..., None])[..., 0]
            signals = signals.replace(size_BN=size_BN, place_BN=kept.place_BK)
        if self.signals.get("represented_BN") is not None:
            signals = signals.replace(represented_BN=represented_by(kept, self.signals))
        signals = signals.replace(x_BND=kept.tokens(self.signals.x_BND))
        return replace(self, signals=signals, kept=kept.after(self.kept, self.N), away=away)

    @property
    def whole(self) -> "Encoded":
        """With all tokens again: those that left as they may be by now."""
        assert self.away is not None
        x_BND = self.away.all_tokens(self.signals.x_BND)
        before = self.away.before
        return replace(before, signals=before.signals.replace(x_BND=x_BND), cls_BCD=self.cls_BCD)


@dataclass(frozen=True)
class Away:
    """Tokens that left: all as they were, and what makes all of the kept ones."""

    before: Encoded
    all_tokens: Callable[[Tensor], Tensor]
    index_BK: Tensor  # those that stayed
    step: Step

    def takes_part(self, layer: int, layers: int, is_wanted: bool) -> bool:
        """Are they attended to in a layer, of which signals may be wanted?"""
        return layer in self.step.call("attends_to_all", layers) or (
            is_wanted and self.step.gives_back
        )


def represented_by(kept: Reduction, signals: Signals) -> Tensor:
    """How many patches each kept token stands for, (B, K): those of its members, or its own and
    those of the dropped tokens that are most like it."""
    represented_BN, index_BK = signals.represented_BN, kept.index_BK
    if kept.weight_BKN is not None:
        return ((kept.weight_BKN > 0).to(represented_BN) @ represented_BN[..., None])[..., 0]
    assert index_BK is not None
    counts_BK = torch.zeros(index_BK.shape, device=represented_BN.device)
    for b, x_ND in enumerate(signals.x_BND):
        for i, slot in enumerate(nearest_slots(x_ND, index_BK[b].tolist())):
            counts_BK[b, slot] += represented_BN[b, i]
    return counts_BK


def inside_layer(run: Encoded, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """What a cut between attention and MLP may read beside queries and keys."""
    attention_BSS = attention(q, k, run.bias_B11S)
    row_BS = attention_BSS[:, 0] if run.first else attention_BSS.mean(1)
    return {
        "values_BNHd": v[:, :, run.first :].transpose(1, 2),
        "cls_value_BHd": v[:, :, 0] if run.first else v.mean(2),
        "cls_row_BN": row_BS[:, run.first :],
    }


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Images that went through the tower one by one, as one batch."""
    first, values = parts[0], [vars(part.signals) for part in parts]
    tensors = [name for name, value in values[0].items() if isinstance(value, Tensor)]
    signals = first.signals.replace(**{n: torch.cat([each[n] for each in values]) for n in tensors})
    kept = None
    if first.kept is not None:
        fields = [vars(part.kept) for part in parts]
        names = [name for name, value in fields[0].items() if value is not None]
        kept = Reduction(**{name: torch.cat([each[name] for each in fields]) for name in names})
    return Encoded(signals, kept, torch.cat([part.cls_BCD for part in parts]), first.N)


def enter(
    x_BSD: Tensor,
    first: int,
    patches_BND: Tensor,
    pixels_B3HW: Tensor,
    grid: tuple[int, int],
    names: set[str],
    cuts: Sequence[tuple[int, str, int, Step]],
) -> Encoded:
    """What goes into the first layer, with the signals of the entrance that are wanted."""
    merges = any(step.merges for *_, step in cuts)
    size = pixels_B3HW.shape[2] // grid[0]
    signals = Signals(
        x_BSD[:, first:], grid, bool(first),
        size_BN=torch.ones_like(patches_BND[..., 0]) if merges else None,
        represented_BN=torch.ones_like(patches_BND[..., 0]) if "represented" in names else None,
        patches_BND=patches_BND if "patches" in names else None,
        pixels_BND=F.unfold(pixels_B3HW, size, stride=size).mT if "pixels" in names else None,
        grey_BNP=greys(pixels_B3HW, size) if "grey" in names else None,
        before_BND=torch.zeros_like(x_BSD[:, first:]) if "before" in names else None,
    )  # fmt: skip
    return Encoded(signals, None, x_BSD[:, :first], grid[0] * grid[1])


def greys(pixels_B3HW: Tensor, size: int) -> Tensor:
    """Each patch's pixels as greys, (B, N, size * size)."""
    red, green, blue = pixels_B3HW.float().unbind(1)
    grey_B1HW = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
    return F.unfold(grey_B1HW, size, stride=size).mT


def attend(run: Encoded, layer: Any, names: set[str], is_whole: bool) -> tuple[Encoded, dict]:
    """After a layer's attention, with what is wanted of it; and its queries and keys. Where it
    `is_whole`, tokens that left take part in it, and then leave again."""
    taking_part = run.whole if is_whole else run
    x_BSD = taking_part.x_BSD
    y_BSD, q, k, v = layer.self_attn(layer.layer_norm1(x_BSD), taking_part.bias_B11S)
    by_token = {"queries_BNHd": q.transpose(1, 2), "keys_BNHd": k.transpose(1, 2)}
    keys = {name: vectors[:, run.first :] for name, vectors in by_token.items()}
    if "values" in names:
        keys |= inside_layer(taking_part, q, k, v)
    read = taking_part.with_tokens(x_BSD + y_BSD).read(names - {"values"}, keys, q, k)
    if not is_whole:
        return read, keys
    assert run.away is not None
    before = replace(run.away.before, signals=read.signals)
    stayed_BKD = read.signals.x_BND.take_along_dim(run.away.index_BK[..., None], dim=1)
    x_BSD = torch.cat([read.cls_BCD, stayed_BKD], dim=1)
    return replace(run.with_tokens(x_BSD), away=replace(run.away, before=before)), keys


def left_at(
    run: Encoded,
    cuts: Sequence[tuple[int, str, int, Step]],
    cut: tuple[int, int, Step],
    keys: dict[str, Tensor],
) -> int:
    """How many tokens stay at a cut: as planned, or as the image says."""
    layer, K, step = cut
    if not step.adapts:
        return K
    of_step = [(at, left) for at, _, left, other in cuts if other is step]
    last, final = max(at for at, _ in of_step), min(left for _, left in of_step)
    stays: int = step.call("left", run.signals.replace(**keys), final, last - layer)
    return stays


def run_layers(
    layers: Any,  # a ModuleList
    run: Encoded,
    want: Mapping[str, int | None],
    cuts: Sequence[tuple[int, str, int, Step]],
) -> Encoded:
    """The tokens after all layers, with those that come back there.

    Layers count from 0, or from -1 backwards; one behind the last is not read here. At each of
    `cuts` (layer, "before" it or in its "middle", K, step) the step leaves K tokens. Raises
    UserError for a layer that does not exist.
    """
    for number in want.values():
        if number is not None and not -len(layers) <= number <= len(layers):
            raise UserError(
                f"the tower has no layer {number}; give {-len(layers)} to {len(layers) - 1}"
            )
    for i, layer in enumerate(layers):
        for at, place, K, step in cuts:
            if (at, place) == (i, "before"):
                run = run.cut(step, K)
        if want.get("before") == i + 1:
            run = replace(run, signals=run.signals.replace(before_BND=run.signals.x_BND))
        names = {name for name, at in want.items() if at in (i, i - len(layers))} - {"before"}
        is_whole = run.away is not None and run.away.takes_part(i, len(layers), bool(names))
        if any((at, place) == (i, "middle") for at, place, *_ in cuts):
            names = names | {"layer_attention", "values"} & set(want)
        run, keys = attend(run, layer, names, is_whole)
        for at, place, K, step in cuts:
            if (at, place) == (i, "middle"):
                run = run.accumulated(step, **keys)
                run = run.cut(step, left_at(run, cuts, (i, K, step), keys), **keys)
        x_BSD = run.x_BSD
        run = run.with_tokens(x_BSD + layer.mlp(layer.layer_norm2(x_BSD)))
    return run.whole if run.away is not None and run.away.step.gives_back else run
