"""The files of ControlNeXt: a folder with its authors' two files and, of ours, a `config.json` that says what is in them.

The module is `controlnet.safetensors` or `controlnext.safetensors`. The base's trained weights are
`unet_weight_increasements.safetensors` (dW) or `unet.safetensors` (W + dW), but the authors' script for SDXL writes both
kinds under the first name; so what a file holds is checked by its values.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import read_json, replace_folder
from vgm_peft.header import listed, open_header
from vgm_peft.side import class_of, load_file
from vgm_peft.sides.controlnext_module import ControlNeXtNetwork, Form, Place

CLASS = "ControlNeXt"
MODULES = ("controlnet.safetensors", "controlnext.safetensors")
WEIGHTS = {"unet_weight_increasements.safetensors": "increments", "unet.safetensors": "absolute"}
FIRST, LAST = "embedding.0.weight", "mid_convs.1.weight"
ALIKE = 0.5
"""Cosine to the base's weights above which a file holds whole ones: near 1 for any kin of the base, near 0 for increments."""


def is_one(place: Path) -> bool:
    """Say whether a folder's configuration names this kind, or it holds a file of the authors' name with such a module."""
    if class_of(place) == CLASS:
        return True
    return any((place / name).is_file() and LAST in open_header(place / name).tensors for name in MODULES)


def write(network: ControlNeXtNetwork, place: Path) -> None:
    """Write the folder; one that stood there before is replaced only when the new one is whole."""
    from safetensors.torch import save_file

    config = {"_class_name": CLASS, "weights": "increments", **asdict(network.form)}
    with replace_folder(place, owned=is_one) as aside:
        for name, part in ((MODULES[0], network.module), (next(iter(WEIGHTS)), network.increments)):
            save_file({n: t.contiguous() for n, t in part.state_dict().items()}, aside / name, {"format": "pt"})
        (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read(place: Path, base: Base, wanted: Form, layers: Mapping[str, nn.Linear]) -> ControlNeXtNetwork:
    """Read a folder for a base that wants this form and has these layers. Raises `DeltaError` when they do not fit."""
    config = read_json(place / "config.json") if class_of(place) == CLASS else {}
    module = load_file(_module_file(place))
    form = _form(place, config, module, wanted, base)
    weights = _increments(place, config, base, layers)
    named = {name.rpartition(".")[0] for name in weights}
    network = ControlNeXtNetwork(form, {name: layer for name, layer in layers.items() if name in named})
    tensors = {f"module.{n}": t for n, t in module.items()} | {f"increments.{n}": t for n, t in weights.items()}
    expected = {(name, t.shape) for name, t in network.state_dict().items()}
    wrong = sorted({name for name, _ in expected ^ {(name, t.shape) for name, t in tensors.items()}})
    if wrong:
        raise DeltaError(
            f"{place}: {len(wrong)} tensors are missing, left over or of another shape ({listed(wrong)})",
            expected=f"a controlnext made for {base.source} ({base.family.name})",
        )
    network.load_state_dict(tensors)
    return network


def _module_file(place: Path) -> Path:
    found = [place / name for name in MODULES if (place / name).is_file()]
    if len(found) != 1:
        raise DeltaError(f"{place}: {len(found)} files of a module", expected=" or ".join(MODULES))
    return found[0]


def _form(place: Path, config: Mapping[str, Any], module: Mapping[str, Tensor], wanted: Form, base: Base) -> Form:
    """What a folder says of itself, and where it says nothing the base's form in the width of the module."""
    if FIRST not in module or LAST not in module:
        raise DeltaError(f"{place}: cannot be loaded (tensors of the module are missing)", fix="fetch or copy it anew")
    scale = config.get("scale", 1.0)
    if type(scale) not in (int, float):
        raise DeltaError(f"{place}: scale {scale!r} in config.json", expected="a number")
    spot = config.get("place", wanted.place)
    if spot not in get_args(Place):
        raise DeltaError(f"{place}: place {spot!r} in config.json", expected=" or ".join(get_args(Place)))
    held = replace(wanted, width=len(module[FIRST]), channels=len(module[LAST]), scale=float(scale), place=spot)
    for name in ("channels", "factor", "context"):
        wants, has, says = getattr(wanted, name), getattr(held, name), config.get(name)
        if has != wants or says not in (None, wants):
            raise DeltaError(
                f"{place}: a controlnext made for {name} {has if has != wants else says}",
                expected=f"{wants}, as {base.source} ({base.family.name}) has it",
                fix="use it with the family of base models it was made for",
            )
    return held


def _increments(place: Path, config: Mapping[str, Any], base: Base, layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """Read what is to be added to the base's weights, which is what is in the file or its difference from them."""
    path, kind = _weights_file(place, config.get("weights"))
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    own = {f"{n}.{p}": t.detach().float().cpu() for n, layer in layers.items() for p, t in layer.named_parameters()}
    strange = sorted(name for name, tensor in tensors.items() if name not in own or tensor.shape != own[name].shape)
    if strange:
        raise DeltaError(
            f"{path}: {len(strange)} tensors fit no layer that may learn along ({listed(strange)})",
            expected=f"weights made for the attention outputs (to_out) of {base.source} ({base.family.name})",
        )
    alike = _cosine([(tensor, own[name]) for name, tensor in tensors.items()])
    if (alike > ALIKE) != (kind == "absolute"):
        others = {"increments": "whole weights", "absolute": "increments, or the weights of another kind of base"}
        raise DeltaError(
            f"{path}: should hold {kind} and seems to hold {others[kind]} (cosine to the base's weights {alike:.2f})",
            fix=f'give the file its right name ({", ".join(WEIGHTS)}), or say "weights" in config.json: increments or absolute',
        )
    return tensors if kind == "increments" else {name: tensor - own[name] for name, tensor in tensors.items()}


def _weights_file(place: Path, told: object) -> tuple[Path, str]:
    """Return the file of the base's weights and what it holds, by what the configuration says, else by its name."""
    found = [name for name in WEIGHTS if (place / name).is_file()]
    if len(found) != 1 or told not in (None, *WEIGHTS.values()):
        what = f'"weights" is {told!r} in config.json' if len(found) == 1 else f"{len(found)} files of the base's weights"
        names = " or ".join(f"{name} ({kind})" for name, kind in WEIGHTS.items())
        raise DeltaError(f"{place}: {what}", expected="increments or absolute" if len(found) == 1 else names)
    return place / found[0], str(told or WEIGHTS[found[0]])


def _cosine(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Cosine between all first tensors and all second ones; 0 where one side is all zeros."""
    product = sum(float((a * b).sum()) for a, b in pairs)
    sizes = sum(float(a.square().sum()) for a, _ in pairs) * sum(float(b.square().sum()) for _, b in pairs)
    return product / math.sqrt(sizes) if sizes else 0.0
