"""The delta of a run: fitted to the chosen sites, attached to the base, grouped by learning rate, saved."""

import json
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vgm_peft.attachment import Attachment
from vgm_peft.config import build
from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import ConfigError
from vgm_peft.family import Base
from vgm_peft.formats import write
from vgm_peft.formats.export import export, file_name, foresee
from vgm_peft.site import Site, choose
from vgm_peft.train.config import DeltaConfig, RunConfig
from vgm_peft.train.task import Group, Setup
from vgm_peft.train.wording import PivotalOptions, Wording

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RESULT = "delta.safetensors"


@dataclass
class Learner:
    """A fresh delta, live on the base for the length of the run once it is attached."""

    delta: Delta
    config: RunConfig
    base: Base
    rates: Mapping[str, float]
    """Site name -> learning rate as a multiple of the run's."""
    wording: Wording
    """New words that are trained with it, if any."""
    pivotal: PivotalOptions
    attachment: Attachment | None = None

    @classmethod
    def fit(cls, setup: Setup, words: Sequence[PivotalOptions] = (), texts: Iterable[str] = ()) -> "Learner":
        """Choose the sites and make the delta, and the new words, which must fit into `texts`.

        Raises `ConfigError` or `DeltaError`, so this comes before all long work.
        """
        config, base = setup.config, setup.base
        delta, rates = fit(config, base.family.name, base.sites, base.family.presets)
        delta.to(setup.device)
        wording = Wording.of(setup, words, texts)
        delta.words |= wording.words
        learner = cls(delta.start(base.parts), config, base, rates, wording, words[0] if words else PivotalOptions())
        for name in config.exports:
            foresee(delta, name, base)
        return learner

    def attach(self, setup: Setup) -> None:
        """Put the delta on the base until the run is over; what is cached of the untouched base must come before."""
        self.attachment = Attachment(self.base.parts, self.delta)
        setup.cleanup.callback(self.attachment.remove)
        self.wording.attach(setup)

    @contextmanager
    def untouched(self) -> Generator[None]:
        """Let the base answer as it did before the run, without gradients."""
        attachment = self.attachment
        if attachment is None:
            yield
            return
        before, attachment.strength = attachment.strength, 0.0
        try:
            with torch.no_grad():
                yield
        finally:
            attachment.strength = before

    @property
    def trains_text(self) -> bool:
        """Whether any patch sits on a text encoder."""
        return any(patch.site.part != self.base.family.denoiser for patch in self.delta)

    def groups(self) -> list[Group]:
        """The delta's parameters by learning rate: that of the part, times that of the method, times that of the parameter."""
        optimiser = self.config.optimiser
        text_rate = optimiser.lr if optimiser.text_lr is None else optimiser.text_lr
        rates: dict[float, dict[str, nn.Parameter]] = {}
        for site, patch in self.delta.patches.items():
            rate = optimiser.lr if patch.site.part == self.base.family.denoiser else text_rate
            for name, parameter in ((n, p) for n, p in patch.named_parameters() if p.requires_grad):
                rates.setdefault(rate * (self.rates[site] * factor(patch, name)), {})[f"{site}/{name}"] = parameter
        pivotal = self.pivotal if self.wording.words else PivotalOptions()
        weights = [Group(rate, parameters, span=(pivotal.word_first, 1.0)) for rate, parameters in rates.items()]
        return weights + self.wording.groups(pivotal.word_lr, 0.0, (0.0, pivotal.word_until))

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """Switch dropout off for a while."""
        for patch in self.delta:
            patch.eval()
        try:
            yield
        finally:
            for patch in self.delta:
                patch.train()

    def save(self, folder: Path, metadata: Mapping[str, str]) -> Path:
        """Write the delta and the exports asked for, each read back and compared; return the native file's path."""
        self.delta.words.update(self.wording.now())
        self.delta.metadata.update(provenance(self.config, self.base), **metadata)
        return save_delta(self.delta, folder, self.config, self.base)

    def facts(self) -> Mapping[str, object]:
        """For the manifest."""
        scales = sorted({float(getattr(p.options, "scale", 1.0)) for p in self.delta})
        words = {"words": {token: word.vectors for token, word in self.delta.words.items()}} if self.delta.words else {}
        return {"kind": list(self.delta.kinds), "sites": len(self.delta.patches), "effective_scale": scales, **words}


def fit(
    config: RunConfig, family: str, sites: Sequence[Site], presets: Mapping[str, Sequence[str]]
) -> tuple[Delta, dict[str, float]]:
    """Make the delta that `[delta]` asks for on chosen ones of some sites, in training mode, and say its rate at each by name.

    Raises `ConfigError` or `DeltaError`.
    """
    delta, rates = Delta(family), dict[str, float]()
    for number, piece in enumerate((config.delta or DeltaConfig()).pieces()):
        method = piece.method()
        options = cast("DataclassInstance", build(method.Options, piece.options, "delta."))
        chosen = choose(sites, piece.sites, presets, method.ops)
        _apart(chosen, delta, piece)
        rates |= dict.fromkeys((site.name for site in chosen), method.rate if piece.rate is None else piece.rate)
        delta.patches |= Delta.fit(family, method, chosen, options, seed=config.seed + number).patches
    return delta, rates


def save_delta(delta: Delta, folder: Path, config: RunConfig, base: Base) -> Path:
    """Write `delta.safetensors` and, into `exports/`, what the configuration names for other tools."""
    path = write(delta, folder / RESULT, base=base)
    for name in config.exports:
        if name != "native":
            export(delta, folder / "exports" / file_name(name), name, base)
    return path


def provenance(config: RunConfig, base: Base) -> dict[str, str]:
    """What a trained file says of its making: no paths, no times, so that the same run makes the same bytes."""
    name = Path(base.source).name if Path(base.source).exists() else base.source
    return {
        "task": config.task.name,
        "base": name,
        "base_digest": base.digest,
        "steps": str(config.steps),
        "seed": str(config.seed),
        "resolution": str(config.data.resolution or base.resolution),
    }


def tag_frequency(captions: Iterable[str]) -> dict[str, str]:
    """How often each tag (what stands between commas) is in the captions, as UIs read it from a file; nothing without any."""
    counts = Counter(tag for caption in captions for tag in map(str.strip, caption.split(",")) if tag)
    return {"ss_tag_frequency": json.dumps({"pictures": dict(sorted(counts.items()))})} if counts else {}


def _apart(sites: Sequence[Site], delta: Delta, piece: DeltaConfig) -> None:
    """Refuse a piece of a mix on layers that an earlier one has."""
    twice = [site for site in sites if site.name in delta.patches]
    if twice:
        raise ConfigError(
            f"delta.mix: {piece.kind} is to change {twice[0]}, which {delta.patches[twice[0].name].kind} changes already",
            expected="every layer in one piece only",
            fix='take it away in one of them, for example sites = ["all", "-*attn2*"]',
        )


def factor(patch: Patch, name: str) -> float:
    """By what the rate of a patch is multiplied for one of its parameters."""
    return next((factor for suffix, factor in patch.extra_groups().items() if name.endswith(suffix)), 1.0)
