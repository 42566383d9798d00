"""The side network of a run and what of it learns: the whole of it, or a delta on its layers.

A network is fresh or a saved one (`task.start`). With `[delta]` its own values stay and a delta of any kind learns at its
layers, named `controlnet.down_blocks...` as those of a base are named `unet.down_blocks...`; what a fresh one has not copied
from the base holds nothing to change yet and learns whole. The delta is merged when the network is saved, so that whoever
reads such networks reads it.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from vgm_peft.attachment import Attachment, Fusion
from vgm_peft.delta import Delta
from vgm_peft.digests import digest_of_files
from vgm_peft.errors import ConfigError
from vgm_peft.side import Side
from vgm_peft.site import find_sites
from vgm_peft.train.config import RunConfig
from vgm_peft.train.learner import factor, fit
from vgm_peft.train.task import Group, Setup

WHOLE = ("*",)


@dataclass
class Pupil:
    """A side network in a run."""

    side: Side
    network: nn.Module
    config: RunConfig
    delta: Delta | None = None
    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    """Site name -> learning rate of the delta there, as a multiple of the run's."""
    attachment: Attachment | None = None

    @staticmethod
    def check(side: Side, config: RunConfig) -> None:
        """Raise `ConfigError` for what is known to be wrong before anything is loaded."""
        start, delta = config.task.start, config.delta
        if start and not side.recognises(Path(start)):
            raise ConfigError(f"task.start = {start!r} is no saved {side.name}", expected="the folder or file of one")
        if delta is None:
            return
        if not start and side.fresh == WHOLE:
            raise ConfigError(
                f"delta is set, but a fresh {side.name} holds nothing yet that a delta could change",
                expected="task.start, a saved one to begin from",
                fix=f"for example --set task.start=runs/mine/{side.name}; or leave delta out",
            )
        if delta.text:
            raise ConfigError(f"delta.text is set, but the text encoders are no part of a {side.name}", fix="leave it out")
        if timed := [piece.kind for piece in delta.pieces() if piece.method().timed]:
            raise ConfigError(
                f"delta.kind = {timed[0]!r} for a {side.name}",
                expected="a kind that does not change with the timestep, which can be merged",
            )

    @classmethod
    def of(cls, side: Side, setup: Setup, options: type) -> "Pupil":
        """Make the network or open the saved one, in float32 on the run's device, with what learns in training mode."""
        config, base, start = setup.config, setup.base, setup.config.task.start
        asked = setup.options(options)
        if start:
            network = side.load(Path(start), base).float().requires_grad_(True).train()
            if (held := side.conditions(network)) != (meant := side.conditions(asked)):
                raise ConfigError(
                    f"{start} reads {held} control pictures together, the settings of [task] say {meant}",
                    expected="the settings it was made with",
                )
            if asked != options():
                setup.notice(f"the network is that of {start}: settings of [task] that shape a fresh one say nothing")
        else:
            network = side.create(base, asked, config.seed)
        if config.compute.gradient_checkpointing and getattr(network, "_supports_gradient_checkpointing", False):
            network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        pupil = cls(side, network, config)
        if config.delta is not None:
            pupil._graft(setup, () if start else side.fresh)
        return pupil

    def _graft(self, setup: Setup, whole: tuple[str, ...]) -> None:
        """Put a fresh delta on the network, of which only what `whole` matches learns besides."""
        family, name = setup.base.family, self.side.name
        for parameter, value in self.network.named_parameters():
            value.requires_grad_(any(fnmatchcase(parameter, glob) for glob in whole))
        frozen = {parameter for parameter, value in self.network.named_parameters() if not value.requires_grad}
        sites = [site for site in find_sites(name, self.network) if f"{site.module}.{site.tensor}" in frozen]
        own, other = f"{name}.", f"{family.denoiser}."
        presets = {preset: [glob.replace(other, own, 1) for glob in globs] for preset, globs in family.presets.items()}
        self.delta, self.rates = fit(setup.config, family.name, sites, presets)
        parts = {name: self.network}
        self.delta.to(setup.device).start(parts)
        self.attachment = Attachment(parts, self.delta)
        setup.cleanup.callback(self.attachment.remove)

    def groups(self) -> list[Group]:
        """What learns, by learning rate; first-level modules of the network, and sites of the delta, are what must move."""
        rated: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                head, _, rest = name.partition(".")
                rated.setdefault(self.side.rate(name), {})[f"{self.side.name}.{head}/{rest}"] = parameter
        for patch in self.delta or ():
            site = patch.site
            for name, parameter in ((n, p) for n, p in patch.named_parameters() if p.requires_grad):
                rate = self.rates[site.name] * self.side.rate(site.module) * factor(patch, name)
                rated.setdefault(rate, {})[f"{site.name}/{name}"] = parameter
        return [Group(self.config.optimiser.lr * share, named) for share, named in rated.items()]

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """Switch dropout off for a while."""
        self._train(False)
        try:
            yield
        finally:
            self._train(True)

    def _train(self, mode: bool) -> None:
        self.network.train(mode)
        if self.delta is not None:
            self.delta.train(mode)

    def save(self, folder: Path) -> Path:
        """Write the network in its own layout, with the delta merged into it."""
        with self._merged():
            return self.side.save(self.network, folder / self.side.name)

    @contextmanager
    def _merged(self) -> Generator[None]:
        """Have the delta in the network's weights instead of beside them, for a while."""
        if self.delta is None or self.attachment is None:
            yield
            return
        self.attachment.strength = 0.0
        try:
            with Fusion({self.side.name: self.network}, [(self.delta, 1.0)]):
                yield
        finally:
            self.attachment.strength = 1.0

    def origin(self) -> dict[str, str]:
        """What it began from, by content; nothing for a fresh one."""
        start = Path(self.config.task.start)
        if not self.config.task.start:
            return {}
        files = [start] if start.is_file() else sorted(path for path in start.rglob("*") if path.is_file())
        return {"start": digest_of_files(files)}

    def facts(self) -> dict[str, object]:
        """For the manifest."""
        if self.delta is None:
            return {"network": self.side.name}
        return {"network": self.side.name, "delta": {"kind": list(self.delta.kinds), "sites": len(self.delta.patches)}}
