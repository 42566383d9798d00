"""peft's settings of an adapter, as far as they say what its tensors mean: in `adapter_config.json`, or in the metadata of
a file of diffusers (`lora_adapter_metadata`, the settings of every part side by side, `unet.lora_alpha` ...).

An alpha may stand for all layers or, by name, for some (`alpha_pattern`). peft takes those names for regular expressions;
a stranger's expression is never run here, and one that is more than a name is refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import cast

import torch

from vgm_peft.errors import DeltaError
from vgm_peft.formats.names import ALPHA, DOWN, LARGEST_ALPHA
from vgm_peft.formats.vocabulary import Suffixes
from vgm_peft.header import shown
from vgm_peft.site import WRAPPER

ADAPTER = "lora_adapter_metadata"
"""The entry of a file's metadata in which diffusers keeps them."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin at which the base's own weights are changed too."""
UNREAD = (
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "coft",
    "fan_in_fan_out",
)
"""Settings that, when they are set, give the tensors a meaning that is not ours."""


@dataclass(frozen=True)
class Settings:
    """The settings of one adapter. `where` names the file in errors."""

    table: Mapping[str, object]
    where: str

    def __post_init__(self) -> None:
        """Refuse what makes the tensors mean something else."""
        init = str(self.table.get("init_lora_weights", ""))
        if init.startswith(CHANGES_BASE):
            raise DeltaError(
                f"{self.where}: made with {shown(init)}, which changes the base's own weights too",
                fix="save its difference to the untouched base instead (peft: path_initial_model_for_weight_conversion)",
            )
        odd = [key for key in UNREAD if self.table.get(key)]
        if odd:
            raise DeltaError(f"{self.where}: made with {', '.join(odd)}", expected="a plain adapter", fix="merge it with peft")

    def number(self, key: str, usual: float) -> float:
        """Return a number. Raises `DeltaError` when it is none."""
        return self._number(key, self.table.get(key, usual))

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_ALPHA:
            raise DeltaError(f"{self.where}: {key} is {shown(str(value))}", expected=f"a number up to {LARGEST_ALPHA:.0e}")
        return float(value)

    def of_module(self, key: str, pattern: str, module: str) -> float | None:
        """Return a number as it is for one module: by its name in `pattern`, else for all under `key`, else None."""
        found = self.table.get(key)
        named = self.table.get(pattern)
        for name, value in cast(dict[str, object], named).items() if isinstance(named, dict) else ():
            plain = name.replace("\\.", ".").removeprefix("^").removesuffix("$")
            if not re.fullmatch(r"[\w.]+", plain):
                raise DeltaError(f"{self.where}: {pattern} has the pattern {shown(name)}", expected="names of layers")
            if f".{module}".endswith(f".{plain.removeprefix(WRAPPER)}") or module == plain:
                found = value
                break
        return None if found is None else self._number(f"{key} of {module}", found)

    def scaled(self, module: str, tensors: Suffixes) -> Suffixes:
        """Return a module's tensors with the scale that the settings say, as the tensors' own alpha or in a factor."""
        key = "lora_alpha" if "lora_alpha" in self.table else ALPHA
        alpha = self.of_module(key, "alpha_pattern", module)
        if alpha is None or not any(name.startswith(("lora_down", "hada_", "lokr_")) for name in tensors):
            return tensors
        if ALPHA in tensors:
            raise DeltaError(f"{self.where}: {module} has two alphas, one of its own and one in the settings", expected="one")
        if "lokr_w1" in tensors and "lokr_w2" in tensors:  # where no tensor tells the rank, tools take no scale from an alpha
            rank = self.of_module("r", "rank_pattern", module)
            return tensors if not rank else {**tensors, "lokr_w1": tensors["lokr_w1"] * (alpha / rank)}
        stable = DOWN in tensors and self.table.get("use_rslora") is True
        return {**tensors, ALPHA: torch.tensor(alpha * (sqrt(len(tensors[DOWN])) if stable else 1.0))}


def parse(text: str, where: str) -> dict[str, object]:
    """Read a table from JSON. Raises `DeltaError` when it is none."""
    try:
        table: object = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise DeltaError(f"{where} cannot be read", expected="a JSON table", fix="save it again")
    return cast(dict[str, object], table)
