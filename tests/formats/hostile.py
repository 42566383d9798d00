"""Files by strangers: one good file of every layout that is read here, and what is done to each of them. All made, none kept.

`good()` are whole files that fit the tiny Stable Diffusion 1.x of the tests; `spoiled()` is each of them with one thing wrong.
What is wrong with the header alone, and files of other kinds, stand in `hostile_headers`; hostile texts in `hostile_texts`.
"""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.formats.ground import shake
from vgm_peft.delta import Delta, Word
from vgm_peft.deltas import method_named
from vgm_peft.formats import format_named
from vgm_peft.formats.canonical import NAMES, bytes_of
from vgm_peft.site import Site

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
FLAT = f"lora_unet_{ATTENTION.replace('.', '_')}"
K, V = (Site("unet", f"{ATTENTION}.to_{letter}", "linear", (16, 32)) for letter in "kv")
NORM = Site("unet", "mid_block.attentions.0.norm", "norm", (16,))


@dataclass(frozen=True)
class Stranger:
    """A file's tensors and metadata, and the texts that stand beside it."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    beside: Mapping[str, str] = field(default_factory=dict[str, str])

    def raw(self) -> bytes:
        """Return the file's bytes; no check stands in the way of anything."""
        table: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        data = bytearray()
        for name, tensor in self.tensors.items():
            start = len(data)
            data += bytes_of(tensor)
            table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
        text = json.dumps(table).encode()
        return struct.pack("<Q", len(text)) + text + data

    def put(self, folder: Path, raw: bytes | None = None) -> Path:
        """Write it to a folder, with other bytes in place of its own where they are given, and return the path."""
        for name, text in self.beside.items():
            (folder / name).write_text(text, encoding="utf-8")
        path = folder / "x.safetensors"
        path.write_bytes(self.raw() if raw is None else raw)
        return path


def _of(format: str, kind: str, sites: tuple[Site, ...] = (K, V), **options: Any) -> Stranger:
    """A delta of a kind, as a tool's format has it."""
    method = method_named(kind)
    delta = shake(Delta.fit("sd15", method, list(sites), method.Options(**options)))
    if format == "native":
        delta.words["<a>"] = Word("<a>", {"text_encoder": torch.ones(2, 32)})
    parcel = next(iter(format_named(format).spell(delta, None, None).values()))
    return Stranger({name: t.detach().contiguous() for name, t in parcel.tensors.items()}, parcel.metadata, parcel.beside)


def _numbered() -> Stranger:
    """All cross-attention layers would be many: the text encoder's attention of the tiny base, two layers of four."""
    halves = {"up": torch.full((32, 2), 0.5), "down": torch.full((2, 32), 0.5)}
    tensors = {f"text_encoder:{n}:{half}": tensor for n in range(8) for half, tensor in halves.items()}
    return Stranger(tensors, {"text_encoder": '["CLIPAttention"]'})


@cache
def good() -> Mapping[str, Stranger]:
    """Return a small whole file of every layout, by its name; all fit the tiny base."""
    pair = {f"unet.{ATTENTION}.to_k.lora_{half}.weight": t for half, t in (("A", torch.ones(2, 32)), ("B", torch.ones(16, 2)))}
    rows, kohya = torch.full((2, 32), 0.25), _of("kohya", "lora", rank=2, alpha=1.0)
    oft = {f"base_model.model.{K.module}.oft_R.weight": torch.full((8, 6), 0.1)}
    return {
        "native": _of("native", "lora", rank=2, alpha=1.0),
        "native lokr": _of("native", "lokr", rank=2),
        "kohya": kohya,
        "lycoris": _of("lycoris", "lora", rank=2),
        "dora": _of("kohya", "lora", rank=2).__class__(
            {**_of("kohya", "lora", (K,), rank=2).tensors, f"{FLAT}_to_k.dora_scale": torch.ones(16, 1)}
        ),
        "loha": _of("kohya", "loha", rank=2),
        "lokr": _of("kohya", "lokr", rank=1, factor=4),
        "oft": _of("kohya", "oft", block=4),
        "boft": _of("kohya", "boft", block=4),
        "glora": _of("kohya", "glora", rank=2),
        "ia3": Stranger({f"{FLAT}_to_k.weight": torch.ones(16), f"{FLAT}_to_k.on_input": torch.tensor(False)}),
        "diff": _of("kohya", "diff", (K, NORM)),
        "diffusers": _of("diffusers", "lora", rank=2),
        "diffusers with alphas": Stranger(pair, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3, "unet.r": 2})}),
        "peft": _of("peft", "lora", rank=2),
        "peft oft": Stranger(oft, {}, {"adapter_config.json": json.dumps({"peft_type": "OFT", "oft_block_size": 4})}),
        "numbered": _numbered(),
        "bundled": replace(kohya, tensors={**kohya.tensors, "bundle_emb.toy.emb_params": rows}),
        "embedding": Stranger({"emb_params": rows}, {"modelspec.trigger_phrase": "toy"}),
    }


Trick = Callable[[Stranger], Stranger]


def _first(change: Callable[[Tensor], Tensor]) -> Trick:
    """Change the first tensor that has axes."""

    def trick(file: Stranger) -> Stranger:
        name = next(name for name, tensor in file.tensors.items() if tensor.dim())
        return replace(file, tensors={**file.tensors, name: change(file.tensors[name]).contiguous()})

    return trick


def _filled(value: float) -> Trick:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return _first(change)


def _renamed(change: Callable[[str], str]) -> Trick:
    """Rename the first tensor."""

    def trick(file: Stranger) -> Stranger:
        first = next(iter(file.tensors))
        return replace(file, tensors={change(name) if name == first else name: t for name, t in file.tensors.items()})

    return trick


def _without_first(file: Stranger) -> Stranger:
    return replace(file, tensors=dict(list(file.tensors.items())[1:]))


def _with(name: str) -> Trick:
    return lambda file: replace(file, tensors={**file.tensors, name: torch.ones(2, 2)})


TRICKS: Mapping[str, Trick] = {
    "a value is NaN": _filled(float("nan")),
    "a value is infinite": _filled(float("-inf")),
    "a tensor is missing": _without_first,
    "all tensors are missing": lambda file: replace(file, tensors={}),
    "a tensor of a checkpoint": _with("model.diffusion_model.out.0.weight"),
    "a tensor of another family": _with("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
    "a tensor called like a path": _with("../../etc/passwd"),
    "a tensor called like an attribute": _with("__class__.__init__"),
    "a tensor without a name": _with(""),
    "a scalar": _first(lambda t: t.flatten()[0]),
    "no rows": _first(lambda t: t[:0]),
    "no columns": _first(lambda t: t[..., :0]),
    "one axis more": _first(lambda t: t.unsqueeze(0)),
    "all axes in one": _first(lambda t: torch.cat([t.flatten(), t.flatten()])),
    "a row more": _first(lambda t: torch.cat([t, t[:1]])),
    "a column more": _first(lambda t: torch.cat([t, t[..., :1]], -1)),
    "transposed": _first(lambda t: t.mT if t.dim() > 1 and t.shape[-1] != t.shape[-2] else torch.cat([t, t])),
    "complex": _first(lambda t: t.to(torch.complex64)),
    "8 bits": _first(lambda t: t.to(torch.float8_e4m3fn)),
    "a name up the folders": _renamed(lambda name: f"../../{name}"),
    "a name with NUL": _renamed(lambda name: f"{name}\0"),
    "a name with a line feed": _renamed(lambda name: f"{name}\n"),
    "a name from right to left": _renamed(lambda name: f"\u202e{name}"),
    "a name that is HTML": _renamed(lambda name: f"<img src=x onerror=alert(1)>{name}"),
    "a name of 990 letters": _renamed(lambda name: "a" * (990 - len(name)) + name),
    "a name of 10 KB": _renamed(lambda name: "a" * 10_000 + name),
    "half a letter in a name": _renamed(lambda name: f"{name}\ud800"),
    "half a letter in the metadata": lambda file: replace(file, metadata={**file.metadata, "note": "\udfff"}),
}


def _zipped(raw: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("data.pkl", raw)
    return out.getvalue()


BYTES: Mapping[str, Callable[[bytes], bytes]] = {
    "half a download": lambda raw: raw[: len(raw) // 2],
    "the last byte is missing": lambda raw: raw[:-1],
    "the header alone": lambda raw: raw[: 8 + struct.unpack("<Q", raw[:8])[0]],
    "a byte more": lambda raw: raw + b"\0",
    "a zip behind it": lambda raw: raw + _zipped(b"x"),
    "in a zip": _zipped,
    "in a gzip": gzip.compress,
    "in a pickle": lambda raw: b"\x80\x04" + raw,
    "twice": lambda raw: raw * 2,
    "backwards": lambda raw: raw[::-1],
}


def spoiled() -> Iterator[tuple[str, Stranger, bytes]]:
    """Yield every good file with every one thing wrong: what it is called, the file, its bytes."""
    for layout, file in good().items():
        for trick, change in TRICKS.items():
            other = change(file)
            yield f"{layout}: {trick}", other, other.raw()
        for trick, cut in BYTES.items():
            yield f"{layout}: {trick}", file, cut(file.raw())
