"""FourierFT: a change whose two-dimensional spectrum has few values, dW = s * Re(ifft2(F)).

Gao et al. 2024 (arXiv 2405.03003, equations 2 to 4). F (O, I) is zero but at n places, chosen at random from a seed and the
same in all layers of a size; a convolution's kernel counts as inputs.

| here | shape | peft |
|---|---|---|
| `spectrum` | (n,), real | `fourierft_spectrum`, same places for the same seed |

peft and the paper begin at a normal spectrum, so with another base than the one at hand; here it begins at zero unless `std` is
given; dW is linear in it, so it learns from there as well. The imaginary half is never computed:
F is made symmetric and transformed as the spectrum of real values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor, nn

from vgm_peft.delta import Patch, seeded
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site


@dataclass(frozen=True, kw_only=True)
class FourierFtOptions:
    """Settings of one FourierFT. The defaults are those of peft, but for `std`, which is 1 there."""

    frequencies: int = 1000
    """n, the number of trained values per layer."""
    scale: float = 150.0
    """s: stands in for a higher learning rate."""
    seed: int = 777
    """What the places are drawn from."""
    std: float = 0.0
    """Standard deviation of the spectrum at first; above 0 the fresh delta changes the base."""

    def __post_init__(self) -> None:
        if self.frequencies < 1:
            raise ConfigError(f"frequencies = {self.frequencies}", expected="1 or more")
        if self.scale == 0.0:
            raise ConfigError("scale = 0.0", expected="another number")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed = {self.seed}", expected="0 .. 2**64 - 1")
        if self.std < 0.0:
            raise ConfigError(f"std = {self.std}", expected="0 or more")


class FourierFt(Patch):
    """dW = s * Re(ifft2(F)) on a linear or conv layer; starts at zero unless told otherwise."""

    kind = "fourierft"
    Options = FourierFtOptions
    ops = frozenset({"linear", "conv"})
    rate = 50.0
    examples = (FourierFtOptions(frequencies=7), FourierFtOptions(frequencies=16, scale=40.0, seed=1))
    acts = "weight"
    options: FourierFtOptions

    def __init__(self, site: Site, options: FourierFtOptions, generator: torch.Generator | None = None) -> None:
        """Draw the spectrum from N(0, std)."""
        super().__init__(site, options, generator)
        self.spectrum = nn.Parameter(torch.zeros(options.frequencies))
        if options.std:
            nn.init.normal_(self.spectrum, std=options.std, generator=seeded(generator))

    @classmethod
    def check(cls, site: Site, options: FourierFtOptions) -> None:
        """Refuse more frequencies than the layer's matrix has values."""
        limit = site.rows * site.columns
        if options.frequencies > limit:
            raise DeltaError(
                f"{site}: frequencies = {options.frequencies}",
                expected=f"1 .. {limit}, the values of its weight",
                fix="lower it or leave the layer out of the targets",
            )

    def change(self, base: Tensor) -> Tensor:
        """Return s * Re(ifft2(F)) in the shape of the weight, computed in float32 or wider."""
        rows, columns, options = self.site.rows, self.site.columns, self.options
        places, owners = half_spectrum(rows, columns, options.frequencies, options.seed, self.spectrum.device)
        values = 0.5 * options.scale * self.spectrum.to(torch.promote_types(self.spectrum.dtype, torch.float32))
        half = values.new_zeros(rows * (columns // 2 + 1)).index_add(0, places, values[owners])
        dense = torch.fft.irfft2(half.view(rows, -1), s=(rows, columns))
        return dense.view(self.site.shape).to(self.spectrum.dtype)

    def adapt(self) -> dict[str, Tensor] | None:
        """Return `fourierft_spectrum` of a linear layer, with the scaling and the seed."""
        if self.site.op != "linear" or self.options.seed >= 2**63:  # which no tensor holds
            return None
        scale, seed = torch.tensor(self.options.scale, dtype=torch.float64), torch.tensor(self.options.seed)
        return {"fourierft_spectrum": self.spectrum.detach(), "fourierft_scaling": scale, "fourierft_seed": seed}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `fourierft_spectrum`, and `fourierft_scaling` and `fourierft_seed` of the adapter's settings (peft)."""
        if set(tensors) != {"fourierft_spectrum", "fourierft_scaling", "fourierft_seed"}:
            return None
        spectrum, seed = tensors["fourierft_spectrum"], int(tensors["fourierft_seed"])
        if site.op not in cls.ops or spectrum.dim() != 1 or not 0 < len(spectrum) <= site.rows * site.columns or seed < 0:
            found = "x".join(map(str, spectrum.shape))
            raise DeltaError(
                f"{site}: fourierft_spectrum {found} from the seed {seed} is no spectrum of its weight",
                fix="use the delta with the base it was trained on",
            )
        patch = cls(site, FourierFtOptions(frequencies=len(spectrum), scale=float(tensors["fourierft_scaling"]), seed=seed))
        with torch.no_grad():
            patch.spectrum.copy_(spectrum)
        return patch


@lru_cache(maxsize=128)
def half_spectrum(rows: int, columns: int, count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where the half of F + its mirror image that a real transform needs is not zero, and whose value stands there.

    The real part of the transform of F is the transform of (F + mirrored F) / 2, whose columns up to the middle say all.
    """
    with torch.inference_mode(False):
        drawn = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed), device="cpu")[:count]
        row, column, owner = drawn // columns, drawn % columns, torch.arange(count, device="cpu")
        row, column = torch.cat([row, -row % rows]), torch.cat([column, -column % columns])
        kept = column <= columns // 2
        places = row * (columns // 2 + 1) + column
        return places[kept].to(device), owner.repeat(2)[kept].to(device)
