"""The manifest of a folder of files: size and SHA-256 of each, and of its own text, so that no bit can change unseen."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vgm_peft.digests import digest_of_file
from vgm_peft.train.durable import write_text

SEAL = "manifest.json"


def seal(folder: Path, version: int, step: int) -> None:
    """Write the manifest of the files that a folder holds; it comes last, so that what it names is there."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest_of_file(p)} for p in sorted(folder.iterdir())}
    write_text(folder / SEAL, _sealed({"files": files, "step": step, "version": version}))


def check(folder: Path, names: Sequence[str], version: int, step: int) -> None:
    """Raise `ValueError` saying what is wrong unless a folder holds exactly the bytes that were sealed, for that step."""
    path = folder / SEAL
    if not path.is_file():
        raise ValueError(f"it has no {SEAL} (cut short, or of an older version)")
    try:
        text = path.read_text(encoding="utf-8")
        said: dict[str, Any] = json.loads(text)
        own = {key: value for key, value in said.items() if key != "seal"}
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"the bytes of {SEAL} are not those that were written") from None
    if _sealed(own) != text:
        raise ValueError(f"the bytes of {SEAL} are not those that were written")
    if own.get("version") != version:
        raise ValueError(f"it is of version {own.get('version')}, expected {version}: go on with the vgm_peft that wrote it")
    if own.get("step") != step:
        raise ValueError(f"it is that of step {own.get('step')}, under another's name")
    if sorted(own["files"]) != sorted(names):
        raise ValueError(f"it holds {', '.join(own['files'])}, expected {', '.join(names)}")
    for name, entry in own["files"].items():
        _check_file(folder / name, entry)


def write_facts(path: Path, facts: Mapping[str, object]) -> None:
    """Write facts as JSON, sorted, so that equal facts are equal bytes."""
    write_text(path, json.dumps(facts, indent=1, sort_keys=True) + "\n")


def read_facts(path: Path) -> dict[str, Any]:
    """Read what `write_facts` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes of {entry['bytes']}")
    if digest_of_file(path) != entry["sha256"]:
        raise ValueError(f"the bytes of {path.name} are not those that were written")


def _sealed(own: Mapping[str, object]) -> str:
    plain = json.dumps(own, sort_keys=True)
    return json.dumps({**own, "seal": hashlib.sha256(plain.encode()).hexdigest()}, indent=1, sort_keys=True) + "\n"
