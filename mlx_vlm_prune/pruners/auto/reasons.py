"""The table of reasons of `auto`: which method comes first where, when more is kept, and by whom.

`PUBLISHED` is for a model of which no evaluation is known; the first line that fits a model, and
that it can do, holds. Percentages are of the score with all tokens; figures of different sources do
not compare. `CAUTIOUS` is about prompts that lose most by pruning.
"""

from dataclasses import dataclass

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")
# Deeper ones than MiniMind's: LLaVA-1.5 has 32 layers, Qwen2.5-VL 28.
DEEP = 24


@dataclass(frozen=True)
class Published:
    """A method, the models that it is listed for, why, and who says so."""

    pruner: str
    why: str
    source: str
    has_cls: bool = False  # of towers with a CLS token alone
    kinds: tuple[str, ...] = ()  # of these families alone, by model_type
    least_layers: int = 0  # of language models with so many alone
    on_cuda: bool = False  # where MLX computes on a CUDA GPU alone
    in_tower: bool = False  # of budgets in ms alone that no method after the tower meets

    @property
    def models(self) -> str:
        """The models that the line is for, in words."""
        parts = ["with a CLS token"] if self.has_cls else []
        parts += [", ".join(self.kinds)] if self.kinds else []
        parts += [f"{self.least_layers} layers or more"] if self.least_layers else []
        parts += ["on a CUDA GPU"] if self.on_cuda else []
        parts += ["a time that only a shorter tower meets"] if self.in_tower else []
        return "; ".join(parts) or "any model"


PUBLISHED = (
    Published(
        "cls_attention",
        "there a slow choice costs more time than it saves: on an NVIDIA H200, with 144 of 576"
        " tokens in the shape of LLaVA-1.5-7B, the first token came 1.37 times as fast as with all"
        " by cls_attention, 0.81 times by divprune and 0.64 times by scope",
        "benchmarks/results/device-h200.json; arXiv:2412.01818",
        has_cls=True,
        on_cuda=True,
    ),
    Published(
        "scope+restore",
        "in one table of LLaVA-1.5 SCOPE keeps 95.4 % at 64 of 576 tokens (HoloV 94.4, VisionZip"
        " 93.0, DART 92.8, SparseVLM 90.6, FastV 74.0), and RESTORE adds 1.5 to 2.3 points to a"
        " selector",
        "README of PIO-FVLM; arXiv:2510.24214, arXiv:2606.01711",
        has_cls=True,
    ),
    Published(
        "scope",
        "in one table of LLaVA-1.5 SCOPE keeps 95.4 % at 64 of 576 tokens (HoloV 94.4, VisionZip"
        " 93.0, DART 92.8, SparseVLM 90.6, FastV 74.0)",
        "README of PIO-FVLM; arXiv:2510.24214",
        has_cls=True,
    ),
    Published(
        "vscan",
        "VScan keeps 96.8 % at 64 of 576 tokens of LLaVA-1.5 (VisionZip 94.4, PyramidDrop 90.8),"
        " half of it by a cut at half of a deep language model",
        "README of VisionTrim; arXiv:2505.22654",
        has_cls=True,
        least_layers=DEEP,
    ),
    Published(
        "divprune+restore",
        "of Qwen2.5-VL DivPrune keeps 91.8 % at a fifth of the tokens (FastV 89.6, CDPruner 84.2,"
        " DART 83.2), and RESTORE works with its positions",
        "table of Hi-Lo, github.com/sealost/Hi-Lo_Prune; arXiv:2606.01711",
        kinds=QWEN,
    ),
    Published(
        "divprune+restore",
        "diversity needs no attention of a tower, and RESTORE lifts DivPrune from 96.9 % to 98.7 %"
        " at 192 of 576 tokens",
        "arXiv:2503.02175, arXiv:2606.01711",
    ),
    Published(
        "divprune",
        "diversity needs no attention of a tower: DivPrune keeps 94.7 % at 64 of 576 tokens of"
        " LLaVA-1.5 (VisionZip 94.4, FastV 74.9)",
        "table of CDPruner, arXiv:2506.10967",
    ),
    Published(
        "patch_norm:keep=0.75+divprune+restore",
        "a quarter of the tokens leaves before the tower, which is shorter then: of the built-in"
        " questions 96.1 % are answered at a ninth of the tokens, by divprune+restore after the"
        " tower 98.5",
        "benchmarks/results/scenes.json (there keep=147 of 196)",
        in_tower=True,
    ),
)


# Of a clip, whose frames repeat one another; nothing of it was evaluated here.
CLIPS = Published(
    "vidcom2",
    "a clip's frames repeat one another: of LLaVA-OneVision VidCom2 keeps 99.6 % at a quarter of"
    " the tokens; nothing was evaluated here",
    "arXiv:2505.14454",
)


@dataclass(frozen=True)
class Cautious:
    """What prompts ask for that loses most by pruning, the words that say so, and the source."""

    subject: str
    words: tuple[str, ...]  # regular expressions, of whole words in small letters
    why: str
    source: str


# A prompt of these keeps so many times as many tokens, but not more than this share for it: on the
# built-in questions counting comes back from 92.5 % at 22 tokens to 97.9 at 49, and 98 keep 98.2
# (divprune+restore, benchmarks/results/scenes.json).
FACTOR, MOST_SHARE = 2, 0.5
CAUTIOUS = (
    Cautious(
        "counting",
        (r"how many", r"count(?:s|ing)?", r"number of", "几个", "多少个", "数一数", "数量"),
        "of the six kinds of built-in questions counting or reading loses most in 226 of 240"
        " results: counting 68.3 % at 22 of 196 tokens by divprune, 92.5 % with restore, 100 % with"
        " all",
        "benchmarks/results/scenes.json",
    ),
    Cautious(
        "places",
        (r"where(?:'s)?", r"bounding box(?:es)?", r"bbox", r"coordinates?", r"locate", r"point to",
         r"location of", r"position of", r"which (?:cell|corner|part|side)",
         "哪里", "在哪", "位置", "坐标"),
        "RefCOCO keeps 47.2 % at 64 of 576 tokens by Nüwa, 7.3 by VisionZip, 3.8 by FastV, and at"
        " half of the tokens 99.6 by IVC-Prune",
        "README of Nüwa (ICLR 2026); arXiv:2602.03060",
    ),
    Cautious(
        "reading",
        (r"read(?:s|ing)?", r"written", r"do(?:es)? .{1,60}\bsay", r"spell(?:s|ed)?",
         r"transcribe", r"ocr", r"the text", r"what text", "写着", "写了", "文字", "读出"),
        "reading of text is the most fragile kind under every method compared",
        "UniPruneBench, github.com/TianfanPeng/VLMUniPruneBench",
    ),
)  # fmt: skip
# Of a picture, whatever the prompt says: by the ink that docprune counts, see document.py.
DOCUMENT = Cautious(
    "a document",
    (),
    "on documents FastV loses 2.9 points and VTW 11.6; 36 % of their patches are background",
    "DocPrune, arXiv:2604.22281",
)
