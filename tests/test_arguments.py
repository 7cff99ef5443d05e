"""Promises of `generate` in Python: an argument of another type is refused."""

import re

import pytest

from mlx_vlm_prune import generate
from mlx_vlm_prune.checkpoints.errors import UserError


def test_of_images_the_wrong_one_is_named():
    with pytest.raises(UserError, match="an image is None; give a path"):
        generate(None, None, "Is there a red star?", image=["a.png", None])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image", 3),
        ("max_tokens", 1.5),
        ("temperature", "x"),
        ("top_p", "x"),
        ("seed", 0.5),
    ],
)
def test_an_argument_of_another_type_is_refused_with_its_value(option, value):
    with pytest.raises(UserError, match=re.escape(f" is {value!r}; ")):
        generate(None, None, "Is there a red star?", **{option: value})
