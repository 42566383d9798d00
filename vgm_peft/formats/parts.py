"""A folder with a folder for every part of a pipeline, as `peft_folder` writes them and peft by its users' hands: one delta.

`unet/adapter_model.safetensors` with its `adapter_config.json`, `text_encoder/` the same, and the files of trained tokens
beside. Whatever else is there is named in an error, but for the `README.md` that peft writes and for hidden files.
"""

from dataclasses import dataclass
from pathlib import Path

from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.families import KNOWN, naming_of
from vgm_peft.family import Base
from vgm_peft.formats import adapter, embedding, foreign
from vgm_peft.formats.peft_folder import CONFIG, MODEL
from vgm_peft.header import listed, open_header

ABOUT = "README.md"


@dataclass(frozen=True)
class PartsFolder:
    """What such a folder holds."""

    path: Path
    adapters: dict[str, Path]
    """Part -> file."""
    tokens: list[Path]

    @property
    def files(self) -> list[Path]:
        """All files of tensors, those of weights first."""
        return [*self.adapters.values(), *self.tokens]

    def read(self, base: Base | None) -> Delta:
        """Read all of it as one delta. Raises `DeltaError` when anything in it is not understood, or not of one family."""
        delta = adapter.read_parts({part: open_header(file) for part, file in self.adapters.items()}, base, str(self.path))
        for file in self.tokens:
            found = embedding.read(open_header(file), base)
            if found.family != delta.family:
                raise DeltaError(f"{file}: a token of {found.family}, and the adapters beside it are of {delta.family}")
            twice = found.words.keys() & delta.words.keys()
            if twice:
                raise DeltaError(f"{file}: a second file for the token {listed(sorted(twice))}", expected="one for every token")
            delta.words.update(found.words)
        return delta


def parts_folder(path: Path) -> PartsFolder | None:
    """Look into a folder; None where no part's adapter is in it. Raises `DeltaError` naming what does not belong there."""
    known = {part for family in KNOWN for part in naming_of(family).parts}
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.name != ABOUT)
    adapters = {entry.name: entry / MODEL for entry in inside if entry.name in known and (entry / MODEL).is_file()}
    if not adapters:
        return None
    tokens = [entry for entry in inside if entry.suffix == ".safetensors" and entry.is_file() and _is_token(entry)]
    strange = [entry.name for entry in inside if entry.name not in adapters and entry not in tokens]
    for part in adapters:
        names = sorted(entry.name for entry in (path / part).iterdir() if not entry.name.startswith("."))
        strange += [f"{part}/{name}" for name in names if name not in (MODEL, CONFIG, ABOUT)]
    if strange:
        raise DeltaError(
            f"{path}: {len(strange)} entries are neither a part's adapter nor a trained token ({listed(strange)})",
            expected=f"PART/{MODEL} with {CONFIG}, and files of tokens",
            fix=f"take them out, or name one of the parts in it, such as {path / next(iter(adapters))}",
        )
    return PartsFolder(path, adapters, tokens)


def _is_token(file: Path) -> bool:
    header = open_header(file)
    return embedding.recognises(header) and not foreign.is_flat(header) and not foreign.is_dotted(header)
