"""The `Scorer` noun: what looks at drawn pictures and says what they are worth; and `Scores`, what it says of a run.

A run draws the same prompts from the same noise again and again. Three numbers, each 0 .. 1, tell how it goes: are the
pictures like what is being learned (`subject`), do they show what was asked for (`prompt`), and how far have pictures of
other things come from those that the untouched base draws (`drift`)? A new scorer is one file and one line in the table
`scores/__init__.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

Common = Literal["subject", "style"]
"""What pictures to learn from have in common: they show one thing, or are made in one way."""


@dataclass(frozen=True)
class Scores:
    """What drawn pictures are worth, 0 .. 1 each; `None` where a scorer cannot tell or there is nothing to tell."""

    subject: float
    """How like the pictures to learn from those are that ask for what is learned; the more the better."""
    prompt: float | None = None
    """How much of what their prompts ask for they show; the more the better."""
    drift: float | None = None
    """Root mean square distance, in pixels 0 .. 1, of pictures of other things from the untouched base's; 0 is none."""

    @property
    def total(self) -> float:
        """The harmonic mean of subject and prompt, which is high only where both are; without a prompt's score the subject's.

        Too little training leaves the subject unlike, too much makes every picture one of those learned from, whatever its
        prompt says: neither end can buy its weakness off with its strength, as it could in a sum. The drift is told and not
        counted: pixels may move although the picture is as good.
        """
        if self.prompt is None:
            return self.subject
        both = self.subject + self.prompt
        return 2.0 * self.subject * self.prompt / both if both > 0.0 else 0.0

    def table(self) -> dict[str, float]:
        """By name what could be told, and the `total`."""
        named = {"subject": self.subject, "prompt": self.prompt, "drift": self.drift, "total": self.total}
        return {name: value for name, value in named.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self.table().items())


class Scorer(ABC):
    """Something that reads pictures: oracles of a small world, or a feature network."""

    name: ClassVar[str]
    digest: str
    """SHA-256 over all that it reads with."""

    @classmethod
    @abstractmethod
    def load(cls, model: str) -> Self:
        """Load it; `model` names a folder or hub id where it needs one. Raises `VgmError` for what the user can mend."""

    @abstractmethod
    def likeness(self, pictures: "Sequence[Image.Image]", references: "Sequence[Image.Image]", of: Common) -> "Tensor":
        """How like the references each picture is, (B,) in 0 .. 1."""

    def agreement(self, pictures: "Sequence[Image.Image]", texts: Sequence[str]) -> "Tensor | None":
        """How much of its text each picture shows, (B,) in 0 .. 1; `None` from a scorer that cannot read."""
        return None

    def to(self, device: "torch.device | str") -> None:  # noqa: B027  (what computes on the CPU alone stays there)
        """Move what it computes with."""


def distance(ours: "Tensor", theirs: "Tensor") -> float:
    """Return the mean over pictures (B, P, Q, 3) uint8 of the root mean square difference of pixels, 0 .. 1."""
    apart = (ours.float() - theirs.float()).div(255).square().flatten(1).mean(1).sqrt()
    return float(apart.mean())
