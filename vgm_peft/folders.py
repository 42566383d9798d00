"""Folders of models: what of a stranger's folder may be loaded, how one comes from the hub, and how ours are written;
and the user's own, where we may keep what can be made again.

Nothing is loaded that could carry code: weights are safetensors, configurations are JSON that names only classes of
diffusers and transformers. The checks come before the first import of anything a folder names.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from vgm_peft.errors import BaseModelError, SaveError, VgmError
from vgm_peft.site import WRAPPER

if TYPE_CHECKING:
    from torch import nn

PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
CONVERT = (
    "convert it to .safetensors first, on a machine where you trust the file: torch.load, then safetensors.torch.save_file"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LARGEST_JSON = 1 << 24


def cache_folder() -> Path:
    """Return the user's cache folder for this package (`XDG_CACHE_HOME`, else `~/.cache`)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~")) / ".cache") / "vgm_peft"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `BaseModelError` when the file is missing, too large, or holds something else."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise BaseModelError(f"{path}: {path.stat().st_size} bytes", expected="a configuration of less than 16 MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{path}: no such file", expected="a folder in diffusers' layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BaseModelError(f"{path}: holds a {type(value).__name__}", expected="a JSON object")
    return cast(dict[str, Any], value)


def fetch_config(name: str, file: str = "model_index.json") -> Path:
    """Bring one configuration of a hub model into the local cache. Raises `BaseModelError`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError, EntryNotFoundError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise BaseModelError(f"{name}: has no {file}", expected="a model of diffusers or transformers") from error
        raise _unreachable(name, error) from error


def fetch_folder(name: str, patterns: Sequence[str]) -> Path:
    """Bring the files of a hub model that match patterns into the local cache; return their folder. Raises `BaseModelError`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> BaseModelError:
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return BaseModelError(
        f"{name}: neither in the local cache nor reachable{offline}: {first_line(error)}",
        fix="check name and network, log in with `hf auth login` where the model asks for it, or give a folder or file",
    )


def check_component(folder: Path) -> None:
    """Refuse a component's folder that carries code or has weights only as pickle. Raises `BaseModelError`."""
    check_no_code(folder)
    names = [path.name for path in folder.iterdir()]
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise BaseModelError(f"{folder / pickled[0]}: weights as pickle are never read", expected=".safetensors", fix=CONVERT)


def check_no_code(folder: Path) -> None:
    """Refuse a folder with Python files, or with configurations that ask for code (`auto_map`). Raises `BaseModelError`."""
    if not folder.is_dir():
        raise BaseModelError(f"{folder}: no such folder")
    scripts = sorted(folder.rglob("*.py"))
    if scripts:
        raise BaseModelError(f"{scripts[0]}: code in a model's folder is never run", fix="remove it if the model works without")
    for path in sorted(folder.rglob("*.json")):
        if path.name.endswith("config.json") and "auto_map" in read_json(path):
            raise BaseModelError(f'{path}: "auto_map" asks for code of its own', fix="use a model of diffusers' own classes")


def check_whole(network: "nn.Module", where: Path, found: Iterable[str] | None = None) -> None:
    """Refuse a network of which a file held only a part, where libraries would go on with random values or none.

    diffusers leaves what was missing on the meta device; for a text model of transformers, which it fills at random,
    `found` names the tensors that the files hold. Raises `BaseModelError`.
    """
    missing = [name for name, p in network.named_parameters() if p.is_meta]
    if found is not None:
        held = {name.removeprefix(WRAPPER) for name in found}
        missing += [name for name, _ in network.named_parameters() if name.removeprefix(WRAPPER) not in held]
    if missing:
        raise BaseModelError(
            f"{where}: {len(missing)} tensors of {type(network).__name__} are missing (first: {missing[0]})",
            fix="fetch or copy it anew",
        )


@contextmanager
def replace_folder(folder: Path, owned: Callable[[Path], bool]) -> Generator[Path]:
    """Write a folder aside and put it in its place when the block ends well; any failure leaves the old one as it was.

    A folder that stands there already is replaced only when it is empty or `owned` says that it is one of the same
    kind. Raises `SaveError`.
    """
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _says(owned, folder))):
        raise SaveError(f"{folder}: holds something else", expected="a new folder, or one to be replaced", fix="name another")
    with _aside(folder) as aside:
        yield aside
        _settle(aside)
        _exchange(aside, folder)


@contextmanager
def replace_file(path: Path, owned: Callable[[Path], bool]) -> Generator[Path]:
    """Write a file aside and put it in its place when the block ends well; any failure leaves the old one as it was.

    What stands there already is replaced only when `owned` says that it is one of the same kind. Raises `SaveError`.
    """
    if path.exists() and not (path.is_file() and _says(owned, path)):
        raise SaveError(f"{path}: holds something else", expected="a new file, or one to be replaced", fix="name another")
    with _aside(path) as aside:
        yield aside / path.name
        _settle(aside)
        os.replace(aside / path.name, path)


@contextmanager
def _aside(place: Path) -> Generator[Path]:
    """A new folder beside a place, for what is to stand there; gone afterwards, whatever became of it. Raises `SaveError`."""
    aside = place.parent / f".{place.name}.{uuid4().hex}"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        _sync(place.parent)
    except OSError as error:
        raise SaveError(
            f"{place}: not written ({error.strerror or error})", fix="what stood there before is unharmed"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Bring a folder's files to the disk, with the modes that the user's umask asks for (safetensors writes 0600)."""
    probe = folder / f".{uuid4().hex}"
    probe.touch(0o666)
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        _sync(path)
    _sync(folder)


def _exchange(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(new, folder)
        return
    old = folder.parent / f".{folder.name}.{uuid4().hex}"
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def quiet() -> Generator[None]:
    """Silence the progress bars of diffusers and transformers, which report every small component on a line of its own."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in logs:
            log.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the gist of a library's error: its first line, cut at 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _says(owned: Callable[[Path], bool], folder: Path) -> bool:
    try:
        return owned(folder)
    except VgmError:
        return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
