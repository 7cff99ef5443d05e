"""Small random CLIPs and SigLIPs, made and saved by transformers, with a few words."""

import io
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

SIDE, PATCH, N = 64, 16, 16
WORDS = "a photo of the cat dog hot red blue star it is this and two in on white big small".split()
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def random_clip(vision: dict | None = None, text: dict | None = None, dims: int = 24) -> CLIPModel:
    """A CLIP of these sizes; without any, tiny."""
    vocabulary, _ = clip_vocabulary()
    text = TEXT | {"vocab_size": len(vocabulary)} if text is None else text
    ids = {"bos_token_id": text["vocab_size"] - 2, "eos_token_id": text["vocab_size"] - 1}
    config = CLIPConfig(
        vision_config=VISION if vision is None else vision,
        text_config=text | ids,
        projection_dim=dims,
    )
    return spread(CLIPModel(config))


def random_siglip(vision: dict | None = None, text: dict | None = None) -> SiglipModel:
    """A SigLIP of these sizes; without any, tiny."""
    text = TEXT | {"vocab_size": 120, "max_position_embeddings": 24} if text is None else text
    config = SiglipConfig(vision_config=VISION if vision is None else vision, text_config=text)
    return spread(SiglipModel(config))


def spread(model):
    """Random weights whose scores lie well apart."""
    torch.manual_seed(0)
    for parameter in model.eval().parameters():
        parameter.data += 0.5 * parameter.numel() ** -0.2 * torch.randn_like(parameter)
    return model


def write(model, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """FOLDER as transformers saves the model, its processor and a tokenizer."""
    model.to(dtype).save_pretrained(folder)
    model.to(torch.float32)
    side = model.config.vision_config.image_size
    if model.config.model_type == "clip":
        clip_tokenizer(model.config.text_config.vocab_size).save_pretrained(folder)
        preprocessor = {"size": {"shortest_edge": side}, "crop_size": side, "resample": 3}
    else:
        write_siglip_tokenizer(folder)
        preprocessor = {"size": {"height": side, "width": side}, "resample": 3}
        preprocessor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def clip_vocabulary(size: int = 0) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens and merges of a byte-level BPE in which the words are whole; `size` tokens, where
    those are fewer."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for part in parts[1:]:
            merges.append((parts[0], part))
            parts[0] += part
            tokens.append(parts[0])
    names = list(dict.fromkeys(tokens))
    names += [f"unused {i}" for i in range(len(names), size - 2)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(names)}, list(dict.fromkeys(merges))


def clip_tokenizer(size: int = 0) -> transformers.CLIPTokenizer:
    vocabulary, merges = clip_vocabulary(size)
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def write_siglip_tokenizer(folder: Path) -> None:
    """A sentencepiece model of SigLIP's kind, and the same as tokenizer.json."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    rng, trained = np.random.default_rng(0), io.BytesIO()
    lines = [" ".join(rng.choice(WORDS, size=6)) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, vocab_size=60, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(trained.getvalue())
    pieces = proto.ModelProto.FromString(trained.getvalue())
    scores = [(piece.piece, piece.score) for piece in pieces.pieces]
    backend = Tokenizer(models.Unigram(scores, unk_id=2))
    charsmap = pieces.normalizer_spec.precompiled_charsmap
    backend.normalizer = normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "eos_token": "</s>",
        "pad_token": "</s>", "unk_token": "<unk>", "model_max_length": 64,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def pictures(count: int, side: int = SIDE) -> list[Image.Image]:
    """Random pictures: noise over planes of colour."""
    rng = np.random.default_rng(1)
    planes = rng.integers(0, 200, size=(count, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
    noise = rng.integers(0, 56, size=(count, side, side, 3))
    return [
        Image.fromarray((plane + n).astype(np.uint8))
        for plane, n in zip(planes, noise, strict=True)
    ]


def write_pictures(folder: Path, count: int, classes: tuple[str, ...] = ()) -> Path:
    """FOLDER/0.png and so on, or FOLDER/CLASS/0.png in turns."""
    for i, picture in enumerate(pictures(count)):
        home = folder / classes[i % len(classes)] if classes else folder
        home.mkdir(parents=True, exist_ok=True)
        picture.save(home / f"{i}.png")
    return folder
