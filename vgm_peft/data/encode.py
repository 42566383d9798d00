"""Pictures and captions through the frozen VAE and text encoders, once: later runs find the values in the cache.

What is kept of a picture is the VAE's posterior (mean and standard deviation, float32), not a sample of it, so that every
step may draw its own. One picture goes through at a time: on a batch the same picture can come out different in the last
bit, and then what a run learns would depend on which of its pictures happened to be cached.
"""

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vgm_peft.data.buckets import Crop, Sizes, load_pixels
from vgm_peft.data.cache import Cache, key_of, update_with
from vgm_peft.data.faults import Tell
from vgm_peft.data.report import Example
from vgm_peft.digests import THREADS
from vgm_peft.errors import BaseModelError
from vgm_peft.family import Base, Condition, Posterior

LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "pillow", "numpy")
"""Whose versions decide what a picture or a prompt becomes."""


@dataclass(frozen=True)
class Encoded:
    """One picture as the VAE sees it: posterior `mean` and `std` (C, H, W), float32 on the CPU; `sizes` as in `Crop.sizes`."""

    mean: Tensor
    std: Tensor
    sizes: Sizes

    @staticmethod
    def batch(items: "Sequence[Encoded]") -> tuple[Posterior, Tensor]:
        """Join pictures of one bucket: their posterior (B, C, H, W) and sizes (B, 6) int64."""
        mean, std = torch.stack([item.mean for item in items]), torch.stack([item.std for item in items])
        return Posterior(mean, std), torch.tensor([item.sizes for item in items])


def encode_images(
    base: Base,
    examples: Sequence[Example],
    crops: Sequence[Crop],
    cache: Cache,
    *,
    flip: bool = False,
    progress: Tell | None = None,
) -> list[Encoded]:
    """Return the encoded pictures in order, `flip`ped left to right if asked, from the cache or by the base's VAE.

    Raises `DataError` when a file changed since it was scanned, `BaseModelError` when the VAE gives values that are not
    finite.
    """
    vae: nn.Module = base.pipe.vae
    seal = _seal(base, {"vae": vae})
    out: list[Encoded] = []
    with _evaluating([vae]):
        for done, (example, crop) in enumerate(zip(examples, crops, strict=True), 1):
            sizes = crop.sizes(flip)
            key = key_of("posterior", example.digest, *crop.scaled, *sizes, int(flip), *seal)
            side = (crop.target[1] // base.latent_factor, crop.target[0] // base.latent_factor)
            found = cache.get(key, lambda entry, side=side: _is_posterior(entry, side)) if seal else None
            if found is None:
                found = _encode_image(base, example, crop, flip)
                if seal:
                    cache.put(key, found)
            out.append(Encoded(found["mean"], found["std"], sizes))
            if progress:
                progress(done, len(examples))
    return out


def encode_prompts(base: Base, captions: Iterable[str], cache: Cache) -> dict[str, Condition]:
    """Return the condition (one row, on the CPU) of every different caption, from the cache or by the text encoders."""
    components: dict[str, Any] = base.pipe.components
    encoders = {n: m for n, m in components.items() if n.startswith("text_encoder") and isinstance(m, nn.Module)}
    tokenizers = {n: t for n, t in components.items() if n.startswith("tokenizer") and t is not None}
    seal = _seal(base, encoders)
    if seal:
        seal = (*seal, *(f"{name}={_tokenizer_digest(t)}" for name, t in sorted(tokenizers.items())))
    out: dict[str, Condition] = {}
    with _evaluating(encoders.values()):
        for caption in dict.fromkeys(captions):
            key = key_of("prompt", caption, *seal)
            found = cache.get(key, _is_condition) if seal else None
            if found is None:
                found = _encode_prompt(base, caption)
                if seal:
                    cache.put(key, found)
            out[caption] = Condition(found["hidden"], found.get("pooled"))
    return out


def digest_of(module: nn.Module) -> str:
    """Return SHA-256 over a module's weights and buffers, by name, and over its configuration."""
    with ThreadPoolExecutor(THREADS) as pool:  # what is in memory may have been changed there, so no file's digest will do
        own = pool.map(_digest_of_tensor, sorted(module.state_dict().items()))
        return hashlib.sha256("".join((_settings(getattr(module, "config", None)), *own)).encode()).hexdigest()


def _digest_of_tensor(named: tuple[str, Tensor]) -> str:
    digest = hashlib.sha256()
    update_with(digest, *named)
    return digest.hexdigest()


def _seal(base: Base, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return everything about the base that decides what it encodes, or nothing when that cannot be known.

    Hooks are how deltas and trained words are put on a module; what they add is not in its weights, so values made with
    them are neither kept nor looked for.
    """
    if any(map(_hooked, modules.values())):
        return ()
    own = [f"{name}={digest_of(module)}" for name, module in sorted(modules.items())]
    types = [f"{next(m.parameters()).dtype} {next(m.parameters()).device.type}" for m in modules.values()]
    return (base.family.name, _settings(base.pipe.config), code_version(), *own, *types)


@once
def code_version() -> str:
    """Return SHA-256 over the code that makes values of pictures and prompts, and the versions of the libraries it calls.

    So that nothing made by other code is ever taken for this code's, and nobody has to remember to say that it changed.
    """
    package = Path(__file__).parents[1]
    files = [package / "family.py", package / "desk.py", *sorted((package / "families").glob("*.py"))]
    files += [package / "data" / name for name in ("pictures.py", "buckets.py", "encode.py")]
    digest = hashlib.sha256(" ".join(f"{name} {version(name)}" for name in LIBRARIES).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _hooked(root: nn.Module) -> bool:
    hooks = [h for m in root.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]  # pyright: ignore[reportPrivateUsage]
    # transformers leaves idle hooks of its own behind once hidden states have been asked for.
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def _settings(config: object) -> str:
    """Return a configuration as text without what names places and versions."""
    table: Any = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})  # pyright: ignore
    plain = {k: v for k, v in table.items() if not k.startswith("_") and k != "transformers_version"}
    return json.dumps(plain, sort_keys=True, default=str)


def _tokenizer_digest(tokenizer: Any) -> str:
    whole = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = json.loads(whole.to_str()) if whole is not None else tokenizer.get_vocab()
    # How the last call padded and cut is kept in there too, and says nothing of the next.
    text = json.dumps({k: v for k, v in rules.items() if k not in ("padding", "truncation")}, sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__} {tokenizer.model_max_length} {text}".encode()).hexdigest()


@torch.no_grad()
def _encode_image(base: Base, example: Example, crop: Crop, flip: bool) -> dict[str, Tensor]:
    weight = next(base.pipe.vae.parameters())
    pixels = load_pixels(example, crop, flip).to(weight.device, weight.dtype)
    posterior = base.family.encode_image(base, pixels[None])
    found = {"mean": posterior.mean[0].float().cpu(), "std": posterior.std[0].float().cpu()}
    if not _is_posterior(found, tuple(found["mean"].shape[1:])):
        raise BaseModelError(
            f"the VAE of {base.source} gives values that are not finite for {example.path.name} in {weight.dtype}",
            fix="load the base in float32 or bfloat16",
        )
    return found


@torch.no_grad()
def _encode_prompt(base: Base, caption: str) -> dict[str, Tensor]:
    condition = base.family.encode_prompt(base, [caption])
    found = {"hidden": condition.hidden.cpu()}
    if condition.pooled is not None:
        found["pooled"] = condition.pooled.cpu()
    if not _is_condition(found):
        raise BaseModelError(f'the text encoder of {base.source} gives values that are not finite for "{caption}"')
    return found


def _is_posterior(found: Mapping[str, Tensor], side: tuple[int, ...]) -> bool:
    mean, std = found.get("mean"), found.get("std")
    if mean is None or std is None or len(found) != 2 or mean.dim() != 3 or mean.shape != std.shape:
        return False
    return (
        tuple(mean.shape[1:]) == side and mean.dtype == std.dtype == torch.float32 and _finite(found) and bool((std >= 0).all())
    )


def _is_condition(found: Mapping[str, Tensor]) -> bool:
    hidden = found.get("hidden")
    if not set(found) <= {"hidden", "pooled"}:
        return False
    return hidden is not None and hidden.dim() == 3 and len(hidden) == 1 and _finite(found)


def _finite(found: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in found.values())


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Generator[None]:
    """Run with the modules in evaluation mode (no dropout), then put each back as it was."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
