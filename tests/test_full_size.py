"""Once at full size: ViT-B/16 and MiniMind2-Small, as published, against transformers.

Shapes: L tokens of the prompt, N visual tokens, D features.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convert.__main__ import main as convert
from mlx_vlm_prune import generate, load
from torch_ref.model import VLM, VLMConfig

QUESTION = "这张图片里有什么？"
TOKENS = 16
CLIP = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}


def publish(folder: Path) -> tuple[dict[str, torch.Tensor], Path, Path]:
    """Random weights as MiniMind2-V publishes them: float16, vision apart, both tied tensors."""
    torch.manual_seed(0)
    state = {k: v.half() for k, v in VLM(VLMConfig()).state_dict().items()}
    for name, tensor in state.items():  # as they are, the answer would be one token for ever
        if name.startswith("model.layers.") and "norm" not in name:
            tensor *= 4
    state["model.embed_tokens.weight"] *= 0.1
    vision = {k: v for k, v in state.items() if k.startswith("vision_encoder.")}
    rest = {k: v for k, v in state.items() if k not in vision}
    rest["lm_head.weight"] = rest["model.embed_tokens.weight"].clone()
    pth, clip = folder / "published.pth", folder / "clip"
    torch.save(rest, pth)
    clip.mkdir()
    named = {k.removeprefix("vision_encoder."): v for k, v in vision.items()}
    named["vision_model.embeddings.position_ids"] = torch.arange(197)[None]
    named["logit_scale"] = torch.tensor(2.6)  # a whole CLIP lies in the folder, its text half too
    named["text_model.final_layer_norm.weight"] = torch.ones(512)
    save_file(named, clip / "model.safetensors")
    config = {"model_type": "clip", "projection_dim": 512, "vision_config": CLIP}
    (clip / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (clip / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    return state, pth, clip


def transformers_says(state: dict[str, torch.Tensor], image: Path, words: Path) -> list[int]:
    """The same weights in transformers' own classes, spliced by hand."""
    from PIL import Image
    from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig
    from transformers import LlamaForCausalLM as Llama
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tower = CLIPVisionModel(CLIPVisionConfig(patch_size=16)).eval()
    vision = {k.removeprefix("vision_encoder."): v for k, v in state.items()}
    own = tower.state_dict()
    tower.load_state_dict({k: vision.get(k, vision.get(f"vision_model.{k}")) for k in own})
    config = LlamaConfig(
        vocab_size=6400, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    llama = Llama(config).eval()
    text = {k: v for k, v in state.items() if k.startswith("model.")}
    llama.load_state_dict(text, strict=False)
    llama.tie_weights()

    tokenizer = AutoTokenizer.from_pretrained(words)
    asked = [{"role": "user", "content": "@" * 196 + "\n" + QUESTION}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids_L = torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    pixels = CLIPImageProcessorPil()(Image.open(image), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen_1ND = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        weight, bias = (state[f"vision_proj.vision_proj.0.{k}"].float() for k in ("weight", "bias"))
        embeds_1LD = llama.get_input_embeddings()(ids_L[None])
        embeds_1LD[:, ids_L == 34] = seen_1ND @ weight.T + bias
        said = llama.generate(inputs_embeds=embeds_1LD, max_new_tokens=TOKENS, do_sample=False)
    return said[0].tolist()


@pytest.fixture(scope="module")
def published(tmp_path_factory, shared_data):
    folder = tmp_path_factory.mktemp("full")
    state, pth, clip = publish(folder)
    words = shared_data / "minimind2"
    target = folder / "mlx"
    convert(["to-mlx", str(pth), str(target), "--vision", str(clip), "--tokenizer", str(words)])
    yield state, target, words
    shutil.rmtree(folder)


def test_sixteen_greedy_tokens_about_a_photograph_equal_those_of_transformers(
    published, shared_data
):
    state, target, words = published
    photograph = shared_data / "images" / "dance.jpg"
    expected = transformers_says(state, photograph, words)
    model, processor = load(target, dtype="float32")
    answer = generate(model, processor, QUESTION, image=photograph, max_tokens=TOKENS)
    assert len(set(expected)) > 4, "an answer that repeats itself would prove little"
    assert answer.token_ids == expected
    half = generate(model, processor, QUESTION, image=photograph, max_tokens=TOKENS, pruner="norm")
    assert half.visual_tokens_kept == 98 and half.token_ids != expected
