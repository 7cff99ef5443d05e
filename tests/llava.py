"""A small random LLaVA, made and saved by transformers, with a tokenizer that has <image>.

Shapes: N visual tokens.
"""

import json
from math import prod
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2Config, SiglipVisionConfig
from transformers import LlavaForConditionalGeneration as Llava

from mlx_vlm_prune.checkpoints.config import parse_sizes
from mlx_vlm_prune.checkpoints.llava.layouts import LAYOUTS
from mlx_vlm_prune.checkpoints.llava.sizes import text_config, vision_config
from mlx_vlm_prune.checkpoints.names.rules import to_published
from mlx_vlm_prune.checkpoints.shapes import expected_shapes
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.scenes.vocabulary import words
from mlx_vlm_prune.scenes.vocabulary import write as write_words

SIDE, PATCH, N = 64, 16, 16
IMAGE = words().index("@")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "vocab_size": len(words()),
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
KINDS = {
    "vicuna": (LlamaConfig(**SIZES, num_key_value_heads=4), CLIPVisionConfig(**TOWER), {}),
    "vicuna, last layer": (
        LlamaConfig(**SIZES, num_key_value_heads=2), CLIPVisionConfig(**TOWER),
        {"vision_feature_layer": -1},
    ),
    "vicuna, heads as wide as OpenAI's": (
        LlamaConfig(**SIZES), CLIPVisionConfig(**TOWER | {"hidden_size": 128}), {},
    ),
    "qwen2 and siglip": (
        Qwen2Config(**SIZES, num_key_value_heads=2, rope_theta=1e6), SiglipVisionConfig(**TOWER),
        {"vision_feature_select_strategy": "full"},
    ),
    "qwen2, tied": (
        Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
        CLIPVisionConfig(**TOWER), {"tie_word_embeddings": True, "vision_feature_layer": 2},
    ),
}  # fmt: skip
# How tensors were called by one release or another, from transformers 5's names on disk.
RENAMED = {
    "llava-hf-flat": {},
    "llava-hf": {"vision_tower.": "vision_tower.vision_model."},
    "llava-hf-inner-flat": {
        "language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "llava-hf-inner": {
        "language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "llava-hf-old-inner": {  # 5.4.0's
        "language_model.model.": "model.language_model.model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}  # fmt: skip
TEMPLATE = (  # reads parts only, as the published one does
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }} "
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def random_model(kind: str = "vicuna", seed: int = 0) -> Llava:
    """Random, its scores well apart."""
    torch.manual_seed(seed)
    text, vision, more = KINDS[kind]
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **more)
    model = Llava(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def write(model: Llava, folder: Path, layout: str = "llava-hf-flat", dtype=torch.float32) -> Path:
    """FOLDER as transformers saves it, its tensors called as in `layout`."""
    from safetensors.torch import load_file, save_file

    model.to(dtype).save_pretrained(folder)
    model.to(torch.float32)
    file = folder / "model.safetensors"
    state = {}
    for name, tensor in load_file(file).items():
        for old, new in RENAMED[layout].items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        state[name] = tensor
    save_file(state, file, metadata={"format": "pt"})
    write_words(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    preprocessor = {"size": {"shortest_edge": SIDE}, "crop_size": SIDE}
    if model.config.vision_config.model_type == "siglip_vision_model":
        preprocessor = {"size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


WORDS = 99  # of the authors' vocabulary: those of `llama_words` that lie in front of <image>
MOVED = {  # from transformers 5's names on disk to those of LLaVA's authors
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
}


def write_original(model: Llava, folder: Path, dtype=torch.float32, inside=False, **fields) -> Path:
    """FOLDER as LLaVA's authors publish it, with other `fields` in config.json. The tower is
    inside, or in FOLDER/../clip, a whole CLIP. Of the vocabulary the first `WORDS` are left."""
    from safetensors.torch import load_file

    model.to(dtype).save_pretrained(folder)
    model.to(torch.float32)
    moved = MOVED | {"vision_tower.": "vision_model."}
    if inside:
        moved = MOVED | {"vision_tower.": "model.vision_tower.vision_tower.vision_model."}
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next(old for old in moved if name.startswith(old))
        words = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        state[moved[old] + name.removeprefix(old)] = tensor[:WORDS].clone() if words else tensor
    for file in folder.iterdir():
        file.unlink()
    tower = {name: state.pop(name) for name in [*state] if name.startswith("vision_model.")}
    if tower:
        _write_clip(model, tower, folder.parent / "clip")
    write_pickles(state, folder)
    (folder / "config.json").write_text(json.dumps(_authors_config(model) | fields))
    return llama_words(folder)


def write_pickles(state: dict[str, torch.Tensor], folder: Path) -> None:
    """In two files, as PyTorch does."""
    names, where = [*state], {}
    for i in range(2):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save({name: state[name] for name in names[i::2]}, folder / file)
        where |= dict.fromkeys(names[i::2], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def _write_clip(model: Llava, tower: dict[str, torch.Tensor], folder: Path) -> None:
    """As openai/clip-vit-large-patch14-336 has it: with the half that reads text."""
    folder.mkdir()
    vision = model.config.vision_config.to_dict()
    config = {"model_type": "clip", "text_config": {"hidden_size": 8}, "vision_config": vision}
    other = {"text_model.embeddings.token_embedding.weight": torch.ones(3, 8)}
    torch.save(tower | other | {"logit_scale": torch.ones(())}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = {"size": SIDE, "crop_size": SIDE, "do_center_crop": True, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def _authors_config(model: Llava) -> dict:
    """The fields of liuhaotian/llava-v1.5-7b's, its sizes those of the model."""
    text = model.config.text_config
    names = [*SIZES, "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"]
    return {
        **{name: getattr(text, name) for name in names},
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "vocab_size": WORDS,
        "bos_token_id": 1, "eos_token_id": 2, "freeze_mm_mlp_adapter": False, "hidden_act": "silu",
        "image_aspect_ratio": "pad", "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "use_mm_proj": True,
    }  # fmt: skip


SEVEN_BILLION = {  # config.json of llava-hf/llava-1.5-7b-hf, what it leaves out left out
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
    "ignore_index": -100, "image_token_index": IMAGE, "projector_hidden_act": "gelu",
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "torch_dtype": "float16",
    "text_config": {
        "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
    },
}  # fmt: skip


def write_seven_billion(folder: Path) -> None:
    config = SEVEN_BILLION
    write_without_values(folder, config, text_config(config["text_config"], config, folder))


def write_without_values(folder: Path, config: dict, text: dict) -> None:
    """Names and shapes of every tensor, as transformers 4 saved them; the values take no disk."""
    sizes = {
        "text_config": text,
        "vision_config": vision_config(config, folder),
        "projector": {"merge": [1, 1], "norm": False},
    }
    header, end = {}, 0
    table = LAYOUTS["llava-hf"].table(True, text)
    for ours, shape in expected_shapes(parse_sizes(sizes, folder)).items():
        name, rule = to_published(table, ours)
        shape = [shape[i] for i in (0, 3, 1, 2)] if rule.reordering else shape
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    write_words(folder)


LLAVA_1_5 = (  # what llava-hf/llava-1.5-7b-hf's template comes to for one user turn
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'ASSISTANT:' }}{% endif %}"
)


def llama_words(folder: Path, template: str | None = None) -> Path:
    """A tokenizer that does what Llama's does to a text: <s> before it, a space before each piece
    between special tokens, and spaces as a sign of their own. <image> and <pad> come last, as
    Hugging Face added them: LLaVA's authors have neither."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    signs = ["<unk>", "<s>", "</s>", "\n", "▁", *map(chr, range(33, 127)), "<image>", "<pad>"]
    model = models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def prompt(images: int = 1) -> Prompt:
    """Words, and images between them."""
    ids, runs = [5, 9], []
    for i in range(images):
        runs.append((len(ids), N))
        ids += [*[IMAGE] * N, 7 + i, 11]
    return Prompt([*ids, 30, 12], runs)
