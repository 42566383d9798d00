"""What a delta has learned and what it has spoilt, as Toybox's oracles see it, all from the same seeds as the base's own."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from vgm_peft.score import distance
from vgm_peft.toybox.cast import subject_named
from vgm_peft.toybox.evaluate import Sampling, SubjectMeasure, TextToImage, closed, measure_subject, sample
from vgm_peft.toybox.oracle import Oracles
from vgm_peft.toybox.world import heldout_prompts

if TYPE_CHECKING:
    from PIL import Image

    from vgm_peft.family import Base

TOKEN = "sks"
SHOWN_AT = 7
"""Seed of the picture in the grid."""


@dataclass(frozen=True)
class Scores:
    """Numbers of one delta, or of the base without any; all shares are 0 .. 1."""

    identity: float
    """Mean likeness of "a photo of a sks robot ..." to renders of the subject."""
    closed: float
    """The share of the way from the base's identity to that of real renders."""
    prompt: float
    """Prompt agreement: the share of what those prompts ask for, class and background, that is read in their pictures."""
    class_read: float
    background_read: float
    leak: float
    """Identity of "a photo of a robot ...", without the token: the base's own value is best."""
    class_kept: float
    """The share of those in which the class is still read."""
    drift: float
    """Root mean square distance, of pixels 0 .. 1, of pictures of other prompts from those that the base draws."""


class Judge:
    """The oracles, and the base's own pictures of one subject's prompts and of others."""

    def __init__(self, base: "Base", subject: str, count: int, steps: int) -> None:
        """Draw and measure the untouched base."""
        self.pipe, self.subject, self.count = cast(TextToImage, base.pipe), subject_named(subject), count
        base.pipe.set_progress_bar_config(disable=True)
        self.how, self.oracles = Sampling(steps=steps, guidance=base.guidance()), Oracles.load()
        self.others = [prompt.text for prompt in heldout_prompts(count)]
        self.theirs = sample(self.pipe, self.others, self.how)
        self.before = self._measure()

    def base_scores(self) -> Scores:
        """Scores of the base, whose drift is 0 by definition."""
        return self._scores(self.before, 0.0)

    def scores(self) -> Scores:
        """Scores of the base with whatever is attached to it now."""
        return self._scores(self._measure(), distance(sample(self.pipe, self.others, self.how), self.theirs))

    def picture(self, token: str = TOKEN) -> "Image.Image":
        """The subject on grass; without a token what the base understands by its class."""
        from PIL import Image

        prompt = f"a photo of a {token} {self.subject.class_word} on grass".replace("  ", " ")
        how = replace(self.how, seed=SHOWN_AT)
        return Image.fromarray(sample(self.pipe, [prompt], how)[0].numpy())

    def _measure(self) -> SubjectMeasure:
        return measure_subject(
            self.pipe, self.subject, f"{TOKEN} {self.subject.class_word}", self.how, self.oracles, self.count
        )

    def _scores(self, now: SubjectMeasure, drift: float) -> Scores:
        return Scores(
            identity=now.identity,
            closed=closed(self.before, now),
            prompt=round((now.class_read + now.backgrounds_kept) / 2, 4),
            class_read=now.class_read,
            background_read=now.backgrounds_kept,
            leak=now.class_identity,
            class_kept=now.class_accuracy,
            drift=round(drift, 4),
        )
