"""The models of the drawn worlds before training, and what they are trained on: their losses.

Shapes: B pictures, N patches, S = N + 1 with CLS, L prompt and question tokens, D features.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlx_vlm_prune.checkpoints.config import CLIPConfig, MiniMindConfig, VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.scenes.vocabulary import IMAGE_TOKEN

from ..models.towers.vit import Layer, VisionTower
from ..models.vlm import VLM
from .layout_targets import LAYOUT_GROUPS
from .scenes_data import Batch
from .worlds import (
    BACKGROUND,
    GLYPHS,
    IGNORE,
    LARGE,
    PAGE_GROUPS,
    PAGES,
    SMALL,
    SUMMARY,
    THIRDS,
    Curriculum,
)


@dataclass(frozen=True)
class ModelSize:
    """The two halves of a model, and what it learns."""

    vision: CLIPConfig
    text: MiniMindConfig
    curriculum: Curriculum


# fmt: off
SIZES = {
    "small": ModelSize(
        CLIPConfig(hidden_size=192, intermediate_size=768, num_hidden_layers=4,
                   num_attention_heads=6),
        MiniMindConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                       num_attention_heads=4, num_key_value_heads=2),
        SMALL,
    ),
    "large": ModelSize(
        CLIPConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
                   num_attention_heads=8, image_size=LARGE.size),
        MiniMindConfig(hidden_size=256, intermediate_size=768, num_hidden_layers=12,
                       num_attention_heads=4, num_key_value_heads=2),
        LARGE,
    ),
}
# fmt: on
SIZES["deep"] = replace(SIZES["small"], text=replace(SIZES["small"].text, num_hidden_layers=12))
SIZES["pages"] = replace(SIZES["small"], curriculum=PAGES)
SIZES["pages-deep"] = replace(SIZES["deep"], curriculum=PAGES)
NEIGHBOURS = (
    ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1), (0, 0)),
)
FREQUENCIES = 8  # per axis, in the position features


def build_model(size: ModelSize) -> VLM:
    """The untrained model."""
    words = size.curriculum.ids
    text = replace(size.text, vocab_size=len(words))
    model = VLM(VLMConfig(size.vision, text, image_token_id=words[IMAGE_TOKEN]))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.02 if "embed_tokens" not in name else 0.05)
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            parameter.data /= (2 * text.num_hidden_layers) ** 0.5
    nn.init.normal_(model.tower.embeddings.patch_embedding.weight, std=0.03)
    attend_to_neighbours(model.tower)
    return model


@torch.no_grad()
def attend_to_neighbours(tower: VisionTower) -> None:
    """Begin with sine positions, and with heads that look at one neighbouring patch each.

    A transformer spends its first hours finding out which patches touch; the first two
    layers are told. A query turned by an offset's angles matches the key of the patch
    at that offset.
    """
    (side, _), pairs = tower.config.grid, 2 * FREQUENCIES
    rate = 2 * torch.pi / (2 * side) * torch.arange(1, FREQUENCIES + 1)
    row, column = torch.arange(side**2) // side, torch.arange(side**2) % side
    angle = torch.cat([row[:, None] * rate, column[:, None] * rate], dim=1)  # (N, pairs)
    embeddings = tower.embeddings
    embeddings.position_embedding.weight[:, : 2 * pairs] = 0
    embeddings.position_embedding.weight[1:, : 2 * pairs] = torch.cat([angle.sin(), angle.cos()], 1)
    embeddings.patch_embedding.weight[: 2 * pairs] = 0
    embeddings.class_embedding[: 2 * pairs] = 0
    d = tower.config.hidden_size // tower.config.num_attention_heads
    assert d == 2 * pairs, "a head's size must hold a sine and a cosine per frequency and axis"
    for layer, offsets in zip(tower.encoder.layers, NEIGHBOURS, strict=False):
        assert isinstance(layer, Layer)
        q, k = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        for head, (down, right) in enumerate(offsets):
            turn = torch.cat([down * rate, right * rate])
            cos, sin = torch.diag(turn.cos()), torch.diag(turn.sin())
            rows = slice(head * d, (head + 1) * d)
            q[rows] = k[rows] = 0
            q[rows, : 2 * pairs] = 1.6 * torch.cat(
                [torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)]
            )
            k[rows, : 2 * pairs] = 1.6 * torch.eye(d)


def check_can_grow(
    model: VLM, shallow: VLM, words: dict[str, int], more_words: dict[str, int], folder: Path
) -> None:
    """Raises UserError unless `shallow`, read from a folder, is `model` with fewer layers and with
    the first of its words."""
    ours, theirs = model.config, shallow.config
    fewer = {"num_hidden_layers": 0, "vocab_size": 0}
    if (ours.vision, replace(ours.text, **fewer)) != (theirs.vision, replace(theirs.text, **fewer)):
        raise UserError(f"{folder} has other sizes than the model that is to grow from it")
    depth, layers = ours.text.num_hidden_layers, theirs.text.num_hidden_layers
    if depth % layers:
        raise UserError(f"{folder} has {layers} layers, which cannot become {depth}")
    if any(more_words.get(word) != number for word, number in words.items()):
        raise UserError(f"{folder} has other words than the model that is to grow from it")


@torch.no_grad()
def grow(model: VLM, shallow: VLM) -> None:
    """Give a model the weights of one with fewer layers in its language model, or fewer words, that
    `check_can_grow` allows.

    Each of those layers becomes several, one after another, which each add a part of what it added:
    so the deeper model begins near the other's answers, and no layer is idle. The other's words are
    the first of this one's; further words keep their random weights.
    """
    state, begin = shallow.state_dict(), "model.layers."
    depth, layers = model.config.text.num_hidden_layers, shallow.config.text.num_hidden_layers
    grown = {}
    for name, value in model.state_dict().items():
        number, _, rest = name.removeprefix(begin).partition(".")
        if not name.startswith(begin):
            grown[name] = torch.cat([state[name], value[len(state[name]) :]])
            continue
        part = state[f"{begin}{int(number) * layers // depth}.{rest}"]
        adds = rest.endswith(("o_proj.weight", "down_proj.weight"))
        grown[name] = part * layers / depth if adds else part
    model.load_state_dict(grown)


class Trainee(nn.Module):
    """The model and its losses.

    Every projected patch must predict its words through the tied embedding (kind, colour, cell,
    letter), the patches of a page their letters and LAYOUT_GROUPS, CLS what is in the picture, and,
    once `questions` are asked, the language model the answers.
    """

    def __init__(self, dense_weight: float, size: ModelSize = SIZES["small"]) -> None:
        super().__init__()
        self.curriculum = size.curriculum
        self.vlm, self.dense_weight = build_model(size), dense_weight
        self.summary = nn.Linear(size.vision.hidden_size, SUMMARY)  # from CLS
        self.glyphs = self.layout = None  # from a patch, where there are pages
        if PAGE_GROUPS.keys() & self.curriculum.groups.keys():
            self.glyphs = nn.Linear(size.vision.hidden_size, len(THIRDS) * len(GLYPHS))
            self.layout = nn.Linear(size.vision.hidden_size, sum(LAYOUT_GROUPS.values()))

    def forward(self, batch: Batch, questions: bool) -> tuple[Tensor, dict[str, Tensor]]:
        vlm, tower = self.vlm, self.vlm.tower
        encoded = tower(batch.pixels)
        summary = self.summary(tower.post_layernorm(encoded.cls_BCD[:, 0]))
        cls_loss = F.binary_cross_entropy_with_logits(summary.float(), batch.summary)
        visual_BND = vlm.projector(encoded.signals.x_BND)
        dense, figures = self.dense_loss(visual_BND, batch.dense)
        loss = dense + 0.3 * cls_loss
        figures["cls"] = cls_loss.detach()
        x_BND = encoded.signals.x_BND
        if self.glyphs and self.layout and x_BND.requires_grad:  # they teach the tower alone
            glyph_loss, figures["glyph"] = self.glyph_loss(x_BND, batch.glyphs)
            layout_loss, shares = self.layout_loss(x_BND, batch.layout)
            loss, figures = loss + glyph_loss + layout_loss, figures | shares
        if questions:
            logits = self.answers(visual_BND, batch)
            answer_loss = F.cross_entropy(logits.float(), batch.targets)
            loss = self.dense_weight * loss + answer_loss
            figures["answer"] = answer_loss.detach()
        return loss, figures

    def dense_loss(self, visual_BND: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        figures: dict[str, Tensor] = {}
        x = F.rms_norm(visual_BND.float(), visual_BND.shape[-1:])
        losses = []
        for i, (name, ids) in enumerate(self.curriculum.group_ids.items()):
            table = self.vlm.language.embed_tokens.weight[ids].float()
            logits = (x @ table.T).flatten(0, 1)
            target = targets[..., i].flatten()
            weight = torch.ones(len(ids), device=logits.device)
            background = (
                list(self.curriculum.groups[name]).index(BACKGROUND) if name == "kind" else -1
            )
            if background >= 0:
                weight[background] = 0.05
            summed = F.cross_entropy(logits, target, weight, ignore_index=IGNORE, reduction="sum")
            known = target != IGNORE
            weights = (weight[target.clamp(min=0)] * known).sum()
            losses.append(summed / weights.clamp(min=1e-3))  # a batch may have no sign, or no page
            with torch.no_grad():
                on = known & (target != background)
                right = (logits.argmax(-1) == target) & on
                figures[name] = right.sum() / on.sum().clamp(min=1)
        return torch.stack(losses).mean() * 2, figures

    def glyph_loss(self, x_BND: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Every patch names its letters, a third of a patch each; the share that is right."""
        assert self.glyphs, "there are pages"
        x = F.layer_norm(x_BND.float(), x_BND.shape[-1:])
        return _named(self.glyphs(x).unflatten(-1, (len(THIRDS), len(GLYPHS))), targets)

    def layout_loss(self, x_BND: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Patches of texts and bars name LAYOUT_GROUPS; of each group the share that is right."""
        assert self.layout, "there are pages"
        x = F.layer_norm(x_BND.float(), x_BND.shape[-1:])
        parts = self.layout(x).split(list(LAYOUT_GROUPS.values()), dim=-1)
        pairs = [_named(logits, targets[..., i]) for i, logits in enumerate(parts)]
        losses, shares = zip(*pairs, strict=True)
        return torch.stack(losses).sum() / 2, dict(zip(LAYOUT_GROUPS, shares, strict=True))

    def answers(self, visual_BND: Tensor, batch: Batch) -> Tensor:
        """Logits at the answers' tokens, (answer tokens of the whole batch, V)."""
        language = self.vlm.language
        embeds_BLD = language.embed_tokens(batch.ids)
        first = batch.first_visual
        after_BLD = embeds_BLD[:, first + visual_BND.shape[1] :]
        pieces = [embeds_BLD[:, :first], visual_BND.type_as(embeds_BLD), after_BLD]
        embeds_BLD = torch.cat(pieces, dim=1)
        hidden = language(embeds_BLD, batch.positions, batch.visible())
        return language.logits(hidden.flatten(0, 1)[batch.answer_at])


def _named(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of scores (..., classes) at the targets that are known, and the share that is
    right."""
    logits, target = logits.flatten(0, -2), target.flatten()
    known = (target != IGNORE).sum().clamp(min=1)
    summed = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return summed / known, ((logits.argmax(-1) == target).sum() / known).detach()
