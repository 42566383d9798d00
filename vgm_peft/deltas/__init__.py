"""The room of methods: what can be trained at a site. A method is one file here and one line in the table.

Nothing else in the package names a method; callers look it up by the name that stands in a recipe or a file.
"""

from collections.abc import Mapping
from types import MappingProxyType

from vgm_peft.delta import Patch
from vgm_peft.deltas.krona import Krona
from vgm_peft.deltas.lora import Lora
from vgm_peft.errors import ConfigError, nearest

TABLE: Mapping[str, type[Patch]] = MappingProxyType(
    {
        "lora": Lora,
        "krona": Krona,
    }
)
"""Kind -> method, in the order in which foreign tensors are offered to `unpack`."""


def method_named(name: str) -> type[Patch]:
    """Return the method called `name`. Raises `ConfigError` with the nearest known name."""
    method = TABLE.get(name)
    if method is None:
        raise ConfigError(f'no delta method is called "{name}"', fix=nearest(name, tuple(TABLE)))
    return method
