"""Every generation of MiniMind-V, small and random, in its exact published layout.

Weights are made by transformers' own classes where one computes the same, and by the plain
loops below where none does: interleaved rotation, and a mixture with a shared expert.

Shapes: L rows of a prompt, D features, H heads, d head size, N visual tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F

from mlx_vlm_prune.scenes.vocabulary import words
from mlx_vlm_prune.scenes.vocabulary import write as write_words

LAYERS, D, INNER, HEADS, KV, V = 2, 48, 64, 8, 2, len(words())
d = D // HEADS
SIDE, PATCH, WIDTH = 64, 16, 32
CASES = [
    ("minimind2-v-2025-02", False),
    ("minimind2-v-2025-02", True),
    ("minimind2-v", False),
    ("minimind2-v", True),
    ("minimind-3v-2026-03", False),
    ("minimind-3v-2026-03", True),
    ("minimind-3v-2026-04-19", False),
    ("minimind-3v", False),
    ("minimind-3v", True),
]
NAMES = [f"{name}{'-moe' * moe}" for name, moe in CASES]
State = dict[str, torch.Tensor]


@dataclass
class Release:
    """What was published, under its published names, and what it computes."""

    name: str
    moe: bool
    text: State
    tower: State
    tower_config: dict
    N: int
    image_token: str

    @property
    def third(self) -> bool:
        return self.name.startswith("minimind-3v")

    def write(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """FOLDER/published.pth, FOLDER/tower, FOLDER/words."""
        head = "output.weight" if "output.weight" in self.text else "lm_head.weight"
        state = {k: v.to(dtype).clone() for k, v in self.text.items()}
        assert head in state
        torch.save(state, folder / "published.pth")
        (folder / "tower").mkdir()
        from safetensors.torch import save_file

        held = {k: v.to(dtype).contiguous() for k, v in self.tower.items()}
        save_file(held, folder / "tower" / "model.safetensors", metadata={"format": "pt"})
        (folder / "tower" / "config.json").write_text(json.dumps(self.tower_config))
        write_words(folder / "words")
        if self.third:
            _rename_image_token(folder / "words" / "tokenizer.json", self.image_token)

    def logits(self, ids: list[int], start: int, pixels_13HW: torch.Tensor) -> torch.Tensor:
        """Of every row of one prompt whose image stands at `start`, (L, V)."""
        x_LD = self.embedding[torch.tensor(ids)].clone()
        x_LD[start : start + self.N] = self.project(self.encode_image(pixels_13HW))
        model = self.transformers()
        if model is None:
            return self.logits_by_hand(x_LD)
        with torch.no_grad():
            return model(inputs_embeds=x_LD[None]).logits[0]

    @property
    def embedding(self) -> torch.Tensor:
        early = "tok_embeddings.weight" in self.text
        return self.text["tok_embeddings.weight" if early else "model.embed_tokens.weight"]

    def encode_image(self, pixels_13HW: torch.Tensor) -> torch.Tensor:
        """The tower of transformers, (N, D)."""
        config = {k: v for k, v in self.tower_config.items() if k != "model_type"}
        kind = self.tower_config["model_type"]
        tower = _tower(kind, config)
        _fill(tower, self.tower)
        with torch.no_grad():
            if kind == "clip_vision_model":
                return tower(pixels_13HW, output_hidden_states=True).hidden_states[-1][0, 1:]
            if kind == "siglip_vision_model":
                return tower(pixels_13HW).last_hidden_state[0]
            n = SIDE // PATCH
            cells = pixels_13HW.reshape(1, 3, n, PATCH, n, PATCH).permute(0, 2, 4, 3, 5, 1)
            flat = cells.reshape(1, n * n, -1)
            mask = torch.ones(1, n * n, dtype=torch.long)
            return tower(flat, mask, torch.tensor([[n, n]])).last_hidden_state[0]

    def project(self, x_ND: torch.Tensor) -> torch.Tensor:
        """By the projector's own definition, its blocks of patches written out as loops."""
        w = {k.removeprefix("vision_proj."): v for k, v in self.text.items() if "vision_proj" in k}
        if "vision_proj.0.weight" in w:
            return F.linear(x_ND, w["vision_proj.0.weight"], w["vision_proj.0.bias"])
        n = SIDE // PATCH
        if self.name == "minimind-3v-2026-03":
            x_ND = torch.stack([x_ND[i : i + 4].flatten() for i in range(0, n * n, 4)])
            x = F.gelu(F.linear(x_ND, w["mlp.0.weight"], w["mlp.0.bias"]))
            return F.linear(x, w["mlp.2.weight"], w["mlp.2.bias"])
        if self.name == "minimind-3v-2026-04-19":
            corners = [r * n + c for r in range(0, n, 2) for c in range(0, n, 2)]
            blocks = [
                torch.cat([x_ND[i], x_ND[i + 1], x_ND[i + n], x_ND[i + n + 1]]) for i in corners
            ]
            x_ND = torch.stack(blocks)
        x = F.layer_norm(x_ND, x_ND.shape[-1:], w["mlp.0.weight"], w["mlp.0.bias"])
        x = F.gelu(F.linear(x, w["mlp.1.weight"], w["mlp.1.bias"]))
        return F.linear(x, w["mlp.3.weight"], w["mlp.3.bias"])

    def transformers(self):
        """The class that computes the same, with these weights; None where there is none."""
        model = transformers_model(self.name, self.moe)
        if model is not None:
            _load_text(model.eval(), {k: v for k, v in self.text.items() if "vision_proj" not in k})
        return model

    def logits_by_hand(self, x_LD: torch.Tensor) -> torch.Tensor:
        """MiniMind2 as its trainer computes it, (L, V)."""
        early, s = "tok_embeddings.weight" in self.text, self.text
        for i in range(LAYERS):
            at = f"layers.{i}." if early else f"model.layers.{i}."
            names = EARLY_NAMES if early else LATER_NAMES
            w = {ours: s.get(at + theirs) for ours, theirs in names.items()}
            h_LD = rms(x_LD, w["norm1"], 1e-5)
            q, k, v = (F.linear(h_LD, w[x]).unflatten(-1, (-1, d)).transpose(0, 1) for x in "qkv")
            rotated = rotated_as_pairs if early else rotated_as_halves
            q, k = rotated(q), rotated(k)
            k, v = (t.repeat_interleave(HEADS // KV, dim=0) for t in (k, v))
            logits = q @ k.mT / d**0.5
            logits = logits + torch.full(logits.shape[1:], -torch.inf).triu(1)
            y_LD = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
            x_LD = x_LD + F.linear(y_LD, w["o"])
            x_LD = x_LD + mixture(rms(x_LD, w["norm2"], 1e-5), s, at, early)
        norm, head = ("norm", "output") if early else ("model.norm", "lm_head")
        return F.linear(rms(x_LD, s[f"{norm}.weight"], 1e-5), s[f"{head}.weight"])


def _rename_image_token(file: Path, token: str) -> None:
    """As in MiniMind-3's tokenizer, where it is a special token."""
    tokenizer = json.loads(file.read_text())
    number = tokenizer["model"]["vocab"].pop("@")
    tokenizer["model"]["vocab"][token] = number
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": number, "content": token, "special": True, **flags})
    file.write_text(json.dumps(tokenizer))


EARLY_NAMES = {
    "q": "attention.wq.weight", "k": "attention.wk.weight", "v": "attention.wv.weight",
    "o": "attention.wo.weight", "norm1": "attention_norm.weight", "norm2": "ffn_norm.weight",
}  # fmt: skip
LATER_NAMES = {
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight",
    "norm1": "input_layernorm.weight", "norm2": "post_attention_layernorm.weight",
}  # fmt: skip


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotated_as_pairs(x_HLd: torch.Tensor) -> torch.Tensor:
    """Neighbours (0, 1), (2, 3), … as complex numbers, each turned by its angle."""
    rate = 1e6 ** (-torch.arange(0, d, 2).float() / d)
    angle = torch.arange(x_HLd.shape[1])[:, None] * rate
    pairs = torch.view_as_complex(x_HLd.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def rotated_as_halves(x_HLd: torch.Tensor) -> torch.Tensor:
    rate = 1e6 ** (-torch.arange(0, d, 2).float() / d)
    angle = torch.arange(x_HLd.shape[1])[:, None] * rate
    a, b = x_HLd.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def mixture(x_LD: torch.Tensor, s: State, at: str, early: bool) -> torch.Tensor:
    """Two of four experts with shares that sum to one, and the shared one; row by row."""
    names = [f"w{n}.weight" for n in (1, 2, 3)]
    names = names if early else [f"{x}_proj.weight" for x in ("gate", "down", "up")]
    at += "feed_forward." if early else "mlp."

    def swiglu(x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, down, up = (s[prefix + name] for name in names)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    if f"{at}gate.weight" not in s:
        return swiglu(x_LD, at)
    rows = []
    for x_D in x_LD:
        share_E = F.linear(x_D, s[f"{at}gate.weight"]).softmax(-1)
        best = sorted(range(4), key=lambda e: (-share_E[e].item(), e))[:2]
        total = sum(share_E[e] for e in best)
        y_D = sum(share_E[e] / total * swiglu(x_D, f"{at}experts.{e}.") for e in best)
        rows.append(y_D + swiglu(x_D, f"{at}shared_experts." + ("" if early else "0.")))
    return torch.stack(rows)


def transformers_model(name: str, moe: bool):
    """transformers' own class for the language model, random."""
    common = {
        "vocab_size": V, "hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    if name == "minimind2-v" and not moe:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, rms_norm_eps=1e-5))
    if name.startswith("minimind2-v"):
        return None
    common |= {"rms_norm_eps": 1e-6, "head_dim": d}
    if not moe:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common))
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **common, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=INNER,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        )
    )  # fmt: skip


TOWERS = {
    "clip_vision_model": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
    "siglip_vision_model": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
    "siglip2_vision_model": (transformers.Siglip2VisionModel, transformers.Siglip2VisionConfig),
}


def _tower(kind: str, config: dict):
    """Random."""
    model_class, config_class = TOWERS[kind]
    return model_class(config_class(**config, attn_implementation="sdpa")).eval()


def _fill(model: torch.nn.Module, state: State) -> None:
    short = {k.removeprefix("vision_model."): v for k, v in state.items()}
    names = model.state_dict()
    model.load_state_dict({k: short[k.removeprefix("vision_model.")] for k in names})


def _load_text(model: torch.nn.Module, state: State) -> None:
    """Into transformers' own names, where the experts of a layer are one array."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            each = [
                torch.cat([state[f"{name[:-12]}{e}.{x}_proj.weight"] for x in ("gate", "up")])
                for e in range(4)
            ]
            renamed[name] = torch.stack(each)
        elif name.endswith("experts.down_proj"):
            renamed[name] = torch.stack(
                [state[f"{name[:-9]}{e}.down_proj.weight"] for e in range(4)]
            )
        else:
            renamed[name] = state[name]
        assert renamed[name].shape == tensor.shape
    model.load_state_dict(renamed)


def release(name: str, moe: bool, seed: int = 0) -> Release:
    """A random release."""
    torch.manual_seed(seed)
    third = name.startswith("minimind-3v")
    text = _text(name, moe)
    merge = {"minimind-3v-2026-03": 4, "minimind-3v-2026-04-19": 4}.get(name, 1)
    wide = WIDTH * merge
    sizes = {"vision_proj.vision_proj.0.weight": (D, wide), "vision_proj.vision_proj.0.bias": (D,)}
    if name == "minimind-3v-2026-03":
        sizes = {"vision_proj.mlp.0.weight": (D, wide), "vision_proj.mlp.0.bias": (D,)}
        sizes |= {"vision_proj.mlp.2.weight": (D, D), "vision_proj.mlp.2.bias": (D,)}
    elif third:
        sizes = {"vision_proj.mlp.0.weight": (wide,), "vision_proj.mlp.0.bias": (wide,)}
        sizes |= {"vision_proj.mlp.1.weight": (D, wide), "vision_proj.mlp.1.bias": (D,)}
        sizes |= {"vision_proj.mlp.3.weight": (D, D), "vision_proj.mlp.3.bias": (D,)}
    text |= {k: 0.3 * torch.randn(shape) for k, shape in sizes.items()}
    tower, config = _vision(name)
    return Release(
        name, moe, text, tower, config, (SIDE // PATCH) ** 2 // merge,
        "<|image_pad|>" if third else "@",
    )  # fmt: skip


def _text(name: str, moe: bool) -> State:
    shapes: dict[str, tuple[int, ...]] = {}
    early, third = name == "minimind2-v-2025-02", name.startswith("minimind-3v")
    top = "" if early else "model."
    names = EARLY_NAMES if early else LATER_NAMES
    rows = {"q": (D, D), "k": (KV * d, D), "v": (KV * d, D), "o": (D, D)}
    rows |= {"norm1": (D,), "norm2": (D,)}
    mlp = {"w1": (INNER, D), "w2": (D, INNER), "w3": (INNER, D)}
    if not early:
        mlp = {"gate_proj": (INNER, D), "down_proj": (D, INNER), "up_proj": (INNER, D)}
    shapes["tok_embeddings.weight" if early else "model.embed_tokens.weight"] = (V, D)
    for i in range(LAYERS):
        at = f"{top}layers.{i}."
        shapes |= {at + names[x]: shape for x, shape in rows.items()}
        if third:
            shapes |= {f"{at}self_attn.{x}_norm.weight": (d,) for x in "qk"}
        block = at + ("feed_forward." if early else "mlp.")
        prefixes = [""]
        if moe:
            shapes[f"{block}gate.weight"] = (4, D)
            prefixes = [f"experts.{e}." for e in range(4)]
            prefixes += [] if third else ["shared_experts." if early else "shared_experts.0."]
        for prefix in prefixes:
            shapes |= {f"{block}{prefix}{x}.weight": shape for x, shape in mlp.items()}
    shapes[f"{top}norm.weight"] = (D,)
    text = {k: _random(k, shape) for k, shape in shapes.items()}
    head = "output.weight" if early else "lm_head.weight"
    embedding = "tok_embeddings.weight" if early else "model.embed_tokens.weight"
    return text | {head: text[embedding].clone()}


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if "norm" in name:
        return 1 + 0.2 * torch.randn(shape)
    return torch.randn(shape) * (0.5 if len(shape) == 2 else 0.2) * shape[-1] ** -0.25


def _vision(name: str) -> tuple[State, dict]:
    common = {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": PATCH,
    }  # fmt: skip
    config, kind = {**common, "image_size": SIDE}, "siglip_vision_model"
    if name.startswith("minimind2-v"):
        kind = "clip_vision_model"
    elif name == "minimind-3v-2026-03":
        config, kind = {**common, "num_patches": (SIDE // PATCH) ** 2}, "siglip2_vision_model"
    model = _tower(kind, config)
    state = {}
    for k, v in model.state_dict().items():
        if "position_ids" not in k:
            full = k if k.startswith("vision_model.") else f"vision_model.{k}"
            state[full] = v + 0.1 * torch.randn_like(v)
    return state, {**config, "model_type": kind}
