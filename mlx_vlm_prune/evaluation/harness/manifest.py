"""The entry point of group `lmms_eval.models`: which classes `--model mlx_vlm_prune` names."""

from typing import Any

CLASSES = "mlx_vlm_prune.evaluation.harness.model"


def manifest() -> Any:
    """lmms-eval's `ModelManifest`; lmms-eval imports a class when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "mlx_vlm_prune",
        simple_class_path=f"{CLASSES}.SimplePrunedModel",
        chat_class_path=f"{CLASSES}.PrunedModel",
    )
