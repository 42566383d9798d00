"""CLIP (Radford et al. 2021, arXiv 2103.00020): the cosine of pictures with pictures, and of pictures with their prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as nf

from vgm_peft.errors import BaseModelError
from vgm_peft.folders import first_line
from vgm_peft.scores.features import FeatureScorer

WEIGHT = 2.5
"""CLIPScore's (Hessel et al. 2021, arXiv 2104.08718): cosines with a text hardly pass 0.4; this spreads them over 0 .. 1."""

VOCABULARIES = ("tokenizer.json", "vocab.json")


class ClipScorer(FeatureScorer):
    """A CLIP model of transformers, with its tokenizer; prompts are read up to CLIP's 77 tokens."""

    name: ClassVar[str] = "clip"
    kinds: ClassVar[Mapping[str, str]] = {"clip": "CLIPModel"}
    example: ClassVar[str] = "openai/clip-vit-large-patch14"
    usual: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    )

    def __init__(self, folder: Path) -> None:
        """Load network and tokenizer. Raises `BaseModelError`."""
        from transformers import CLIPTokenizer

        super().__init__(folder)
        if not any((folder / name).is_file() for name in VOCABULARIES):  # transformers would go on without words
            raise BaseModelError(f"{folder}: no CLIP tokenizer there", expected=" or ".join(VOCABULARIES), fix="fetch it anew")
        try:
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BaseModelError(
                f"{folder}: its tokenizer cannot be read ({first_line(error)})", fix="fetch it anew"
            ) from error

    def features(self, pixels: Tensor) -> Tensor:
        """The projected embedding of pictures."""
        clip = cast(Any, self.network)
        return clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def agreement(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """CLIPScore: 2.5 times the cosine of each picture with its text; below 0 is 0, above 1 is 1."""
        clip = cast(Any, self.network)
        length = int(clip.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        read = clip.text_model(**tokens.to(next(self.network.parameters()).device)).pooler_output
        said = nf.normalize(clip.text_projection(read), dim=-1).cpu()
        return ((self.look(pictures) * said).sum(-1) * WEIGHT).clamp(0.0, 1.0)
