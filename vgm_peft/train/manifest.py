"""`manifest.json`: what a run was made from and with, so that its result can be judged and made again.

It holds no path of the machine, no name of it or of its user, and no time of day.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.config import Table, to_table
from vgm_peft.data import Example
from vgm_peft.family import Base
from vgm_peft.train.config import RunConfig, table
from vgm_peft.train.durable import write_text
from vgm_peft.train.folder import MANIFEST
from vgm_peft.train.optimisers import effective

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vgm_peft.train.checkpoint import State

PACKAGES = ("vgm_peft", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow")


def write_manifest(folder: Path, facts: Mapping[str, object]) -> Path:
    """Write the facts as JSON, whole or not at all."""
    return write_text(folder / MANIFEST, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def describe(config: RunConfig, base: Base, state: "State", accelerator: "Accelerator") -> dict[str, object]:
    """What every run says of itself before the first step."""
    trained = sum(p.numel() for p in state.parameters.values())
    whole = sum(p.numel() for part in base.parts.values() for p in part.parameters())
    name = Path(base.source).name if Path(base.source).exists() else base.source
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "task": config.task.name,
        "seed": config.seed,
        "steps": config.steps,
        "pictures_per_step": config.data.batch * config.accumulation * accelerator.num_processes,
        "base": {"name": name, "family": base.family.name, "sha256": base.digest, "parameters": whole},
        "trained": {"parameters": trained, "share": trained / whole if whole else 0.0, "tensors": len(state.parameters)},
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "precision": config.compute.precision,
        "optimiser": effective(state.optimiser),
        "settings": _settings(config, name),
    }


def _settings(config: RunConfig, base: str) -> Table:
    """Every setting with its value, given or not; of paths only the last name."""
    whole = table(config)
    del whole["output"]
    whole["base"] = base
    if isinstance(data := whole["data"], dict):
        data["images"] = Path(config.data.images).name
    if isinstance(scores := whole["scores"], dict) and Path(config.scores.model).is_dir():
        scores["model"] = Path(config.scores.model).name
    whole["concept"] = [{**to_table(concept), "images": Path(concept.images).name} for concept in config.concept]
    return whole


def digest_of_examples(examples: Iterable[Example]) -> str:
    """SHA-256 over the pictures, captions, controls, masks and repeats, in order; names and places play no part."""
    digest = hashlib.sha256()
    for e in examples:
        mask = [e.mask_digest] if e.mask_digest else []
        digest.update(json.dumps([e.digest, e.caption, e.control_digest, e.repeats, *mask]).encode())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    out: dict[str, str] = {}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out
