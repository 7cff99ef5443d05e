"""Promises of the licence: what is another's is named, with the licence that it is under."""

from pathlib import Path

from mlx_vlm_prune.evaluation.questions import mmvet
from mlx_vlm_prune.scenes.pages import FONTS
from mlx_vlm_prune.scenes.pages.draw import FOLDER

ROOT = Path(__file__).resolve().parents[1]


def test_the_prompt_of_mm_vet_has_the_notice_and_the_text_of_its_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    ours, _, theirs = text.partition("The prompt GRADING in mlx_vlm_prune/evaluation/questions/")
    assert ours.startswith("MIT License") and "mmvet.py is part of MM-Vet's" in theirs
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in theirs
    assert "9. Accepting Warranty or Additional Liability." in theirs
    assert "Apache License 2.0" in (mmvet.__doc__ or "")
    assert (
        'license = "MIT AND Apache-2.0 AND Bitstream-Vera"' in (ROOT / "pyproject.toml").read_text()
    )


def test_every_font_that_ships_is_named_with_its_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert sorted(path.stem for path in FOLDER.glob("*.ttf")) == sorted(FONTS)
    families = {
        name.partition("-")[0].removesuffix("SansMono").removesuffix("Serif") for name in FONTS
    }
    assert families == {"Caladea", "DejaVu", "Roboto"} and all(name in text for name in families)
    licences = {
        path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("LICENSE-*.txt")
    }
    assert "Apache License" in licences["LICENSE-APACHE.txt"]
    assert "Bitstream Vera" in licences["LICENSE-DEJAVU.txt"]
