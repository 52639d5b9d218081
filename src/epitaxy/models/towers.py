"""Checkpoints that hold no classifier of pictures, and the config and key names under which one opens them.

CLIP's and SigLIP's vision tower may come alone; a distilled DeiT has two heads, and new labels need one.
"""

from __future__ import annotations

from typing import Any

TOWERS = {"clip_vision_model": "CLIPConfig", "siglip_vision_model": "SiglipConfig"}
PREFIXED = {r"^(?!vision_model\.|classifier\.)": "vision_model."}  # saved alone, a tower has no prefix
TEACHER = "DeiTForImageClassificationWithTeacher"


def as_classifier(config: Any) -> tuple[Any, dict[str, str] | None]:
    """The config of a classifier on top of a tower, and how its keys are called there; others unchanged and None."""
    import transformers

    if config.model_type not in TOWERS:
        return config, None
    whole = getattr(transformers, TOWERS[config.model_type])(vision_config=config.to_dict())
    return whole, PREFIXED


def with_one_head(config: Any) -> None:
    """Let a distilled DeiT open with the head of its class token alone."""
    if TEACHER in (config.architectures or ()):
        config.architectures = [TEACHER.removesuffix("WithTeacher")]
