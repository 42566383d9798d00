"""What of a delta goes into a target's file, and how: as it is, as something else that means the same, nearly, or not at all.

For every patch in turn, the first that is possible:

1. as it is, where the target loads its form rightly (`targets`), or all that is changed in its part is of one of its kinds;
2. as a LoRA, where the change has a rank so low that nothing is lost (`factors`);
3. densely, as `diff`, where the target reads that; it takes the base where the change depends on its weights;
4. as the nearest LoRA of a rank, in place of 3, and only when asked: the error of every layer is kept;
5. otherwise the delta is refused, with what would work.

Then the rules that concern more than one tensor of a layer: where a bias may stand, what must come together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.books import Book, Place, book_of, family_book
from vgm_peft.formats.factors import EXACT, Thin, exact, full, nearest, pair
from vgm_peft.formats.forms import Form, form_of
from vgm_peft.formats.peft_kinds import adapter_of
from vgm_peft.formats.targets import TARGETS, TOOLS, Target
from vgm_peft.formats.vocabulary import change, pack
from vgm_peft.site import Site

Way = Literal["as it is", "as a LoRA", "densely", "nearly"]
LORA, DIFF, ADAPTER = Form("lora"), Form("diff"), Form("adapter")
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Loss:
    """What an approximation loses at one layer, as Frobenius norms."""

    error: float
    size: float
    rank: int

    @property
    def share(self) -> float:
        """The error as a share of the change."""
        return self.error / self.size if self.size else 0.0


@dataclass
class Plan:
    """What is written, what it must be found to mean when read back, and what there is to say of it."""

    target: Target
    delta: Delta
    """The patches that are spelled."""
    meant: Delta
    """The delta itself; where the plan only comes near to it, the approximation."""
    ways: dict[str, Way] = field(default_factory=dict[str, Way])
    losses: dict[str, Loss] = field(default_factory=dict[str, Loss])
    """Site -> what it loses, for the approximated ones."""
    remarks: list[str] = field(default_factory=list[str])

    @property
    def loss(self) -> float:
        """The error of all approximated layers together, as a share of their change."""
        size = sum(loss.size**2 for loss in self.losses.values())
        return (sum(loss.error**2 for loss in self.losses.values()) / size) ** 0.5 if size else 0.0


@torch.no_grad()
def plan(delta: Delta, target: Target, base: Base | None = None, approximate: int | None = None) -> Plan:
    """Plan an export; `approximate` allows LoRAs of that rank. Raises `DeltaError` with what would work where this does not."""
    if not target.is_tool:
        return Plan(target, delta, delta)
    planner = _Planner(delta, target, base, approximate)
    for patch in delta:
        planner.place(patch)
    planner.place_biases()
    if target.all_of_attention:
        planner.complete_attention()
    planner.refuse()
    return planner.finish()


class _Planner:
    """A plan in the making."""

    def __init__(self, delta: Delta, target: Target, base: Base | None, approximate: int | None) -> None:
        self.source, self.target, self.base, self.approximate = delta, target, base, approximate
        self.book: Book = book_of(base) if base is not None else family_book(delta.family)
        self.plan = Plan(
            target, Delta(delta.family, {}, delta.words, delta.metadata), Delta(delta.family, {}, delta.words, delta.metadata)
        )
        self.forms: dict[str, Form] = {}
        self.refused: dict[str, list[Patch]] = {}
        self.adapters = {part for part in delta.parts if target.adapters and self._is_adapter(part)}

    def _is_adapter(self, part: str) -> bool:
        """Say whether all changes of a part are of one kind that the target has as such."""
        return adapter_of({p.site.module: p for p in self.source if p.site.part == part}, self.book) is not None

    def place(self, patch: Patch) -> None:
        """Find a patch its way into the file."""
        if not self._is_found(patch.site):
            self._refuse(patch, f"{self.target.name} does not look there in text encoders")
        elif patch.site.part in self.adapters:
            self._keep(patch, ADAPTER)
        elif patch.site.op in ("norm", "bias"):
            self._keep(patch, self._form(patch))
        elif patch.timed:
            self._place_timed(patch)
        elif self.base is None and not (patch.base_free or patch.packs_alone):
            self._refuse(patch, "the base's weights are needed (--base)")
        else:
            self._place_weight(patch)

    def _is_found(self, site: Site) -> bool:
        """Say whether the target looks for a change at this layer."""
        if site.op == "embedding" or self.target.text == "linear" and site.part != self.book.family.denoiser:
            weight = self.book.sites.get((site.part, site.module), {}).get("weight", site)
            return weight.op == "linear" or "*" in self.target.loads
        return True

    def _form(self, patch: Patch) -> Form:
        """Return the form of a norm's weight or of any bias, which need no look at the tensors."""
        return Form("norm") if self.book.is_norm((patch.site.part, patch.site.module)) else Form("bias")

    def _place_weight(self, patch: Patch) -> None:
        form = form_of(patch.site, pack(patch, self.base))
        # A method with fewer values than the layer that is spelled densely may have a smaller spelling.
        loose = form == DIFF and sum(p.numel() for p in patch.parameters()) < patch.site.rows * patch.site.columns
        if self.target.takes(form) and not loose:
            return self._keep(patch, form)
        if self.base is None and not patch.base_free:
            return self._refuse(patch, f"{self.target.name} has no place for it as it is, and otherwise --base is needed")
        dense = change(patch, self.base)
        if self.target.takes(LORA) and self.approximate is not None:
            self._approximate(patch, dense, self.approximate)
        elif self.target.takes(LORA) and (thin := exact(dense)) is not None:
            self._put_thin(patch, thin, "as a LoRA")
        elif self.target.takes(DIFF):
            self._put_dense(patch, dense)
        else:
            self._refuse(patch, f"{self.target.name} has no place for it")

    def _place_timed(self, patch: Patch) -> None:
        """What follows the timestep is refused, or written as it is at timestep 0, where all of it acts."""
        if self.approximate is None or not self.target.takes(LORA):
            return self._refuse(patch, "it changes with the timestep, which no other tool's file can say")
        patch.at(torch.zeros(1))
        self._approximate(patch, change(patch, self.base), self.approximate)
        self._remark("it changes with the timestep; what is written is the change at timestep 0, for all of them")

    def _approximate(self, patch: Patch, dense: Tensor, rank: int) -> None:
        found = nearest(dense, rank)
        if found.error <= EXACT and not patch.timed:
            return self._put_thin(patch, found.thin, "as a LoRA")
        size = float(dense.norm())
        self.plan.losses[patch.site.name] = Loss(found.error * size, size, found.thin.rank)
        self._put_thin(patch, found.thin, "nearly")

    def _keep(self, patch: Patch, form: Form) -> None:
        self._put(patch, patch, "as it is", form)

    def _put_thin(self, patch: Patch, thin: Thin, way: Way) -> None:
        self._put(patch, pair(patch.site, thin, torch.float32), way, LORA)

    def _put_dense(self, patch: Patch, dense: Tensor) -> None:
        self._put(patch, full(patch.site, dense, torch.float32), "densely", DIFF)

    def _put(self, patch: Patch, written: Patch, way: Way, form: Form) -> None:
        name = patch.site.name
        self.plan.delta.patches[name] = written
        self.plan.meant.patches[name] = written if way == "nearly" else patch
        self.plan.ways[name], self.forms[name] = way, form
        if remark := self.target.remarks.get(form.name):
            self._remark(remark)

    def _remark(self, text: str) -> None:
        if text not in self.plan.remarks:
            self.plan.remarks.append(text)

    def place_biases(self) -> None:
        """Put biases where the target reads them: those of norms with the norm, others alone, beside a `diff`, or nowhere."""
        for name, form in list(self.forms.items()):
            patch = self.source.patches[name]
            if form.name == "norm" and not self.target.takes(form):
                self._refuse(patch, f"{self.target.name} has no place for normalisations")
            elif form.name == "bias" and self.target.bias == "nowhere":
                self._refuse(patch, f"{self.target.name} has no place for biases")
            elif form.name == "bias" and self.target.bias == "beside diff":
                self._make_dense((patch.site.part, patch.site.module), patch)

    def _make_dense(self, place: Place, bias: Patch) -> None:
        """See that a layer whose bias is changed has a dense change of its weight, be it of nothing."""
        weight = self.book.sites[place]["weight"]
        if self.forms.get(weight.name) == DIFF:
            return
        patch = self.source.patches.get(weight.name)
        if patch is None and bias.site.shape != weight.shape[:1]:
            self._refuse(
                bias, f"{self.target.name} reads it only beside a change of the weight, whose shape the base tells (--base)"
            )
        elif patch is None:
            written = full(weight, torch.zeros(weight.shape), torch.float32)
            self.plan.delta.patches[weight.name], self.forms[weight.name] = written, DIFF
        elif self.base is None and not patch.base_free:
            self._refuse(bias, f"{self.target.name} reads it only beside a dense change of the weight, so --base is needed")
        elif not patch.timed:
            self.plan.losses.pop(weight.name, None)
            self._put_dense(patch, change(patch, self.base))

    def complete_attention(self) -> None:
        """Add changes of nothing, of rank 1, to attention layers of text encoders of which only some are changed."""
        for place in {(s.part, s.module.rpartition(".")[0]) for s in (p.site for p in self.plan.delta)}:
            layers = [self.book.sites.get((place[0], f"{place[1]}.{name}"), {}).get("weight") for name in ATTENTION]
            sites = [site for site in layers if site is not None]
            changed = [site for site in sites if site.name in self.plan.delta.patches]
            if len(sites) < len(ATTENTION) or not changed:
                continue
            shape = self.plan.delta.patches[changed[0].name].site.shape  # a base at hand or not: the four are alike
            for site in (replace(site, shape=shape) for site in sites if site not in changed):
                nothing = Thin(torch.zeros(site.rows, 1), torch.zeros(1, site.columns))
                self.plan.delta.patches[site.name] = pair(site, nothing, torch.float32)

    def _refuse(self, patch: Patch, reason: str) -> None:
        self.refused.setdefault(reason, []).append(patch)

    def refuse(self) -> None:
        """Raise `DeltaError` for what found no place, with what would work."""
        if not self.refused:
            return
        reason, patches = max(self.refused.items(), key=lambda item: len(item[1]))
        kinds = ", ".join(sorted({patch.kind for patch in patches}))
        raise DeltaError(
            f"{self.target.name} cannot have this delta: {kinds} on {len(patches)} of {len(self.source.patches)} layers, "
            f"for example {patches[0].site.name}: {reason}",
            fix=self._advice(patches),
        )

    def _advice(self, patches: Sequence[Patch]) -> str:
        ways: list[str] = []
        if self.base is None and any(not patch.base_free for patch in patches):
            ways.append("name the base with --base")
        weights = all(patch.site.op in ("linear", "conv") for group in self.refused.values() for patch in group)
        if weights and self.approximate is None and self.target.takes(LORA):
            ways.append("allow a loss with --approximate")
        others = [name for name in TOOLS if name != self.target.name and all(self._takes(TARGETS[name], p) for p in patches)]
        ways += [f"export it with --for {' or '.join(others[:3])}"] if others else []
        return "; or ".join([*ways, "keep the native file, which vgm_peft.attach puts on any diffusers pipeline"])

    def _takes(self, target: Target, patch: Patch) -> bool:
        """Say whether another target would take a patch without loss, as it is or densely."""
        if patch.timed or patch.site.op == "embedding":
            return False
        if patch.site.op in ("norm", "bias"):
            form = self._form(patch)
            return target.takes(form) or form.name == "bias" and target.bias == "alone"
        if self.base is None and not (patch.base_free or patch.packs_alone):
            return False
        dense = target.takes(DIFF) and (self.base is not None or patch.base_free)
        return dense or target.takes(form_of(patch.site, pack(patch, self.base)))

    def finish(self) -> Plan:
        """Look at what the tool needs to be shown, and return the plan."""
        probe = self.target.probe
        if probe and self.plan.delta.patches and not self._is_recognised(probe):
            self._remark(
                "the base of a file is told by its cross-attention or text layers, and this delta changes none of them"
            )
        return self.plan

    def _is_recognised(self, probe: Sequence[str]) -> bool:
        names: Mapping[Place, str] = self.book.written
        spelled = [f"{names[place]}." for p in self.plan.delta if (place := (p.site.part, p.site.module)) in names]
        return any(mark in name for name in spelled for mark in probe)
