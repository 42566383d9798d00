"""DINO and DINOv2 (arXiv 2104.14294, 2304.07193): the cosine of pictures with pictures. They tell one thing from another of
its class, which CLIP hardly does (arXiv 2208.12242), and cannot read."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor

from vgm_peft.scores.features import FeatureScorer


class DinoScorer(FeatureScorer):
    """A vision transformer of transformers that was trained without labels; what its class token holds at the end."""

    name: ClassVar[str] = "dino"
    kinds: ClassVar[Mapping[str, str]] = {
        "dinov2": "Dinov2Model",
        "dinov2_with_registers": "Dinov2WithRegistersModel",
        "dinov3_vit": "DINOv3ViTModel",
        "vit": "ViTModel",
    }
    example: ClassVar[str] = "facebook/dinov2-base"
    usual: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    spare: ClassVar[tuple[str, ...]] = ("pooler.",)

    def features(self, pixels: Tensor) -> Tensor:
        """The normalised class token."""
        return cast(Any, self.network)(pixel_values=pixels).last_hidden_state[:, 0]
