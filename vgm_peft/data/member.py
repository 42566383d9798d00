"""Where the bytes of a file of a data set are: in a file of their own, or in the midst of a shard."""

import errno
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Member:
    """A file in a tar shard; as far as it is read here, like a `Path`. Nothing is ever unpacked."""

    shard: Path
    inside: str
    """Its path in the shard, with forward slashes."""
    offset: int
    """Bytes from the beginning of the shard to the first of its own."""
    size: int

    @property
    def name(self) -> str:
        """Its name without folders."""
        return PurePosixPath(self.inside).name

    @property
    def suffix(self) -> str:
        """The ending of its name."""
        return PurePosixPath(self.inside).suffix

    def read_bytes(self) -> bytes:
        """Return its bytes. Raises `OSError`, also where the shard has become shorter."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            raw = file.read(self.size)
        if len(raw) != self.size:
            raise OSError(errno.EIO, f"{self.shard.name} is cut off")
        return raw


Place = Path | Member


def size_of(place: Place) -> int:
    """Return how many bytes a file has. Raises `OSError`."""
    return place.size if isinstance(place, Member) else place.stat().st_size
