"""Small random models in the published layout, for tests.

They are made by the reference, written as MiniMind2-V publishes them (a float .pth and
a CLIP folder), and brought over by the shipped converter, so every test that uses one
tests the converter too.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from convert.__main__ import main as convert
from mlx_vlm_prune.checkpoints.config import CLIPConfig, MiniMindConfig
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.scenes.vocabulary import tokenizer, words
from mlx_vlm_prune.scenes.vocabulary import write as write_words
from torch_ref.models.language.twig import grown
from torch_ref.models.vlm import VLM, VLMConfig
from torch_ref.pruners import METHODS

VISION = CLIPConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=64,
    patch_size=16,
)
TEXT = MiniMindConfig(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=len(words()),
)
GRID, N = (4, 4), 16
IMAGE = words().index("@")


def reference(seed: int = 0) -> VLM:
    """A random reference model, its scores well apart."""
    torch.manual_seed(seed)
    model = VLM(VLMConfig(VISION, TEXT, image_token_id=IMAGE)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def taught(model: VLM, noise: float = 0.1) -> VLM:
    """The model with random weights of the learned methods that keep whatever K they are told; its
    twig guesses the better the less noise there is."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        scorers = {
            n: METHODS[n].make_weights(VISION.hidden_size, 1) for n in ("score_prune", "mlp")
        }
        model.learned = {**scorers, "twig": grown(model.language, 1, 2)}
        for weights in model.learned.values():
            _disturb(weights, noise)
        # Behind the others, whose goldens were recorded without it.
        model.learned["learn_prune"] = METHODS["learn_prune"].make_weights(VISION.hidden_size, 1)
        _disturb(model.learned["learn_prune"], noise)
    return model


def _disturb(weights: torch.nn.Module, noise: float) -> None:
    for parameter in weights.eval().parameters():
        parameter.data += noise * torch.randn_like(parameter)


def publish(model: VLM, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """Write FOLDER/published.pth and FOLDER/clip."""
    state = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}
    flat = {k: v for k, v in state.items() if not k.startswith("vision_encoder.")}
    flat["lm_head.weight"] = flat["model.embed_tokens.weight"].clone()
    torch.save(flat, folder / "published.pth")
    clip = folder / "clip"
    clip.mkdir()
    vision = {k.removeprefix("vision_encoder."): v for k, v in state.items() if k not in flat}
    save_file(vision, clip / "model.safetensors", metadata={"format": "pt"})
    config = {**asdict(model.config.vision), "hidden_act": "quick_gelu"}
    (clip / "config.json").write_text(json.dumps(config))
    return folder / "published.pth", clip


def checkpoint(model: VLM, folder: Path) -> Path:
    """The model as an MLX checkpoint folder, through the shipped converter; what it was taught
    lies beside."""
    pth, clip = publish(model, folder)
    words_folder = folder / "words"
    write_words(words_folder)
    target = folder / "mlx"
    convert(
        ["to-mlx", str(pth), str(target), "--vision", str(clip), "--tokenizer", str(words_folder)]
    )
    write_learned(model, target)
    return target


def write_learned(model: VLM, folder: Path) -> None:
    """What the model was taught, beside a checkpoint of it."""
    beside = {
        f"{name}.{key}": tensor.contiguous()
        for name, weights in model.learned.items()
        for key, tensor in weights.state_dict().items()
    }
    if beside:
        save_file(beside, folder / "pruners.safetensors", metadata={"format": "mlx"})


def row(text: str) -> Prompt:
    """A prompt of scenes words; every # is an image."""
    ids: list[int] = []
    runs = []
    for i, part in enumerate(text.split("#")):
        if i:
            runs.append((len(ids), N))
            ids += [IMAGE] * N
        ids += tokenizer().encode(part, add_special_tokens=False).ids
    return Prompt(ids, runs)
