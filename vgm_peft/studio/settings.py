"""What a Studio serves: the base, the folders it may read and write, and who may reach it."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from vgm_peft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The Studio's settings; contradictions are refused on construction."""

    base: str = "toybox"
    library: tuple[Path, ...] = ()
    """Further folders with deltas and control networks; the runs are always in the library."""
    runs: Path = Path("runs")
    """Where trainings write, and their uploaded pictures."""
    recipe: Path | None = None
    """What trainings begin from; the shipped recipe for the base when left out."""
    pictures: Path = Path("pictures")
    """Where drawn pictures are kept."""
    host: str = "127.0.0.1"
    port: int = 7860
    auth: tuple[str, str] | None = None
    """User and password; needed for any address but this machine's own."""
    names: tuple[str, ...] = ()
    """Further `Host` names under which the Studio may be asked for, such as a proxy's."""
    upload_bytes: int = 20_000_000
    """Largest file that is taken."""
    upload_count: int = 200
    """Most pictures of one training."""

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and self.auth is None:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines",
                expected="a user and a password",
                fix="add --auth USER:PASSWORD, or keep the default address 127.0.0.1",
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}", expected="0 .. 65535")

    @property
    def folders(self) -> tuple[Path, ...]:
        """The whole library: runs first, and last the examples that come with the embedded base."""
        return (self.runs, *self.library, *self.examples)

    @property
    def examples(self) -> tuple[Path, ...]:
        """Where deltas for the embedded base are, if it is the base."""
        from vgm_peft.families.bases import TOYBOX, toybox_folder

        folder = toybox_folder().parent / "deltas" if self.base == TOYBOX else None
        return () if folder is None or not folder.is_dir() else (folder,)

    @property
    def queue(self) -> Path:
        """Where trainings that were asked for are kept, with their pictures."""
        return self.runs / ".queue"

    @property
    def inputs(self) -> Path:
        """Where pictures that drawings use are kept: control pictures, masks, pictures to begin from."""
        return self.pictures / ".inputs"

    @property
    def hosts(self) -> frozenset[str]:
        """Every name under which the Studio answers, without port."""
        own = {"localhost", "127.0.0.1", "[::1]"} if is_loopback(self.host) else {"localhost", "127.0.0.1", self.host}
        return frozenset(name.lower() for name in own | set(self.names))


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own and no other machine can reach it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def parse_auth(text: str) -> tuple[str, str]:
    """Split `USER:PASSWORD`. Raises `ConfigError`."""
    user, colon, password = text.partition(":")
    if not colon or not user or len(password) < 8:
        raise ConfigError("--auth", expected="USER:PASSWORD with at least 8 characters in the password")
    return user, password
