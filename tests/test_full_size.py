"""Once at full size, as published, against transformers: MiniMind2-V small, and MiniMind-3V.

Shapes: L tokens of the prompt, N visual tokens, D features.
"""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convert.__main__ import main as convert
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.chat import main as chat
from mlx_vlm_prune.plot import main as plot
from mlx_vlm_prune.sweep import main as sweep
from torch_ref.models.vlm import VLM, VLMConfig

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


def transformers_answer(state: dict[str, torch.Tensor], image: Path, words: Path) -> list[int]:
    """The same weights in transformers' own classes, spliced by hand."""
    from PIL import Image
    from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig
    from transformers import LlamaForCausalLM as Llama
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tower = CLIPVisionModel(CLIPVisionConfig(patch_size=16)).eval()
    vision = {k.removeprefix("vision_encoder."): v for k, v in state.items()}
    names = tower.state_dict()
    tower.load_state_dict({k: vision.get(k, vision.get(f"vision_model.{k}")) for k in names})
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
    messages = [{"role": "user", "content": "@" * 196 + "\n" + QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids_L = torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    pixels = CLIPImageProcessorPil()(Image.open(image), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features_1ND = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        weight, bias = (state[f"vision_proj.vision_proj.0.{k}"].float() for k in ("weight", "bias"))
        embeds_1LD = llama.get_input_embeddings()(ids_L[None])
        embeds_1LD[:, ids_L == 34] = features_1ND @ weight.T + bias
        answer = llama.generate(inputs_embeds=embeds_1LD, max_new_tokens=TOKENS, do_sample=False)
    return answer[0].tolist()


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
    expected = transformers_answer(state, photograph, words)
    model, processor = load(target, dtype="float32")
    answer = generate(model, processor, QUESTION, image=photograph, max_tokens=TOKENS)
    assert len(set(expected)) > 4, "an answer that repeats itself would prove little"
    assert answer.token_ids == expected
    half = generate(model, processor, QUESTION, image=photograph, max_tokens=TOKENS, pruner="norm")
    assert half.visual_tokens_kept == 98 and half.token_ids != expected


def test_sweep_plot_and_chat_take_the_published_layout(
    published, shared_data, tmp_path, monkeypatch, capsys
):
    _, target, _ = published
    photograph = str(shared_data / "images" / "dance.jpg")
    model = ["--model", str(target), "--image", photograph, "--pruner", "divprune"]
    short = ["--keep-ratio", "0.25", "--max-tokens", "4"]
    file = tmp_path / "sweep.json"
    sweep([*model, *short, "--prompt", QUESTION, "--runs", "1", "--json", str(file)])
    full, pruned = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert (full["kept"], pruned["kept"]) == (196, 49)
    assert pruned["operations"]["first_token"] < full["operations"]["first_token"]
    plot([str(file), "--out", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "dashboard.html").is_file()
    capsys.readouterr()
    lines = [QUESTION, "/stats", "/clear", f"/image {photograph}", "/keep 0.5", QUESTION, "/stats"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    chat([*model, *short])
    quarter, half = re.findall(r"^Prompt: (\d+) tokens", capsys.readouterr().out, re.M)
    assert int(half) - int(quarter) == 98 - 49


class MiniMind3V:
    """MiniMind-3V in transformers' own classes: Qwen3 and SigLIP 2's base tower at 256 pixels."""

    def __init__(self):
        import transformers

        torch.manual_seed(0)
        self.tower = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(image_size=256, patch_size=32)
        ).eval()
        self.text = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=6400, hidden_size=768, intermediate_size=2432, num_hidden_layers=8,
                num_attention_heads=8, num_key_value_heads=4, head_dim=96, rms_norm_eps=1e-6,
                tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        ).eval()  # fmt: skip
        norm = torch.nn.LayerNorm(768)
        layers = [norm, torch.nn.Linear(768, 768), torch.nn.GELU(), torch.nn.Linear(768, 768)]
        self.projector = torch.nn.Sequential(*layers)
        for model in (self.text, self.tower, self.projector):
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and "embed" not in name:
                    parameter.data *= 3  # as they are, the answer would be one token for ever
                parameter.data = parameter.data.half().float()

    def publish(self, folder: Path) -> None:
        """float16, both tied tensors, the tower apart."""
        text = {k: v.half().clone() for k, v in self.text.state_dict().items()}
        words = {f"vision_proj.mlp.{k}": v.half() for k, v in self.projector.state_dict().items()}
        torch.save(text | words, folder / "sft_vlm_768.pth")
        self.tower.half().save_pretrained(folder / "siglip2-base-p32-256-ve")
        self.tower.float()
        preprocessor = {"size": {"height": 256, "width": 256}, "resample": 2, "do_resize": True}
        preprocessor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
        file = folder / "siglip2-base-p32-256-ve" / "preprocessor_config.json"
        file.write_text(json.dumps(preprocessor), encoding="utf-8")

    @torch.no_grad()
    def answer(self, image: Path, words: Path) -> list[int]:
        from PIL import Image
        from transformers import AutoTokenizer
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        tokenizer = AutoTokenizer.from_pretrained(words)
        messages = [{"role": "user", "content": "<|image_pad|>" * 64 + "\n" + QUESTION}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids_L = torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        processor = SiglipImageProcessorPil(size={"height": 256, "width": 256}, resample=2)
        pixels = processor(Image.open(image).convert("RGB"), return_tensors="pt")["pixel_values"]
        embeds_1LD = self.text.get_input_embeddings()(ids_L[None])
        features_1ND = self.tower(pixels).last_hidden_state
        embeds_1LD[:, ids_L == 12] = self.projector(features_1ND)
        answer = self.text.generate(
            inputs_embeds=embeds_1LD, max_new_tokens=TOKENS, do_sample=False
        )
        return answer[0].tolist()


def test_minimind_3v_says_what_transformers_says_and_less_of_it_pruned(tmp_path, shared_data):
    words, photograph = shared_data / "minimind3", shared_data / "images" / "dance.jpg"
    model = MiniMind3V()
    expected = model.answer(photograph, words)
    model.publish(tmp_path)
    target = tmp_path / "mlx"
    convert(["to-mlx", str(tmp_path / "sft_vlm_768.pth"), str(target), "--tokenizer", str(words)])
    ours, processor = load(target, dtype="float32")
    answer = generate(ours, processor, QUESTION, image=photograph, max_tokens=TOKENS)
    assert len(set(expected)) > 4, "an answer that repeats itself would prove little"
    assert answer.token_ids == expected and answer.visual_tokens == 64
    few = generate(
        ours, processor, QUESTION, image=photograph, max_tokens=TOKENS,
        pruner="visionzip", keep_tokens=16,
    )  # fmt: skip
    assert few.visual_tokens_kept == 16 and few.token_ids != expected
    shutil.rmtree(target)
