"""The room of methods: what can be trained at a site. A method is one file here and one line in the table.

Nothing else in the package names a method; callers look it up by the name that stands in a recipe or a file.
"""

from collections.abc import Mapping
from types import MappingProxyType

from vgm_peft.delta import Patch
from vgm_peft.deltas.boft import Boft
from vgm_peft.deltas.c3a import C3a
from vgm_peft.deltas.diff import BitFit, Diff, NormTuning
from vgm_peft.deltas.difffit import DiffFit
from vgm_peft.deltas.dora import Dora
from vgm_peft.deltas.dylora import Dylora
from vgm_peft.deltas.fourierft import FourierFt
from vgm_peft.deltas.glora import Glora
from vgm_peft.deltas.hra import Hra
from vgm_peft.deltas.ia3 import Ia3
from vgm_peft.deltas.krona import Krona
from vgm_peft.deltas.loha import Loha
from vgm_peft.deltas.lokr import Lokr
from vgm_peft.deltas.lora import Lora
from vgm_peft.deltas.oft import Oft
from vgm_peft.deltas.pissa import Pissa
from vgm_peft.deltas.svdiff import Svdiff
from vgm_peft.deltas.tlora import Tlora
from vgm_peft.deltas.vera import Vera
from vgm_peft.errors import ConfigError, nearest

TABLE: Mapping[str, type[Patch]] = MappingProxyType(
    {
        "krona": Krona,  # before the LoRAs, whose names the files of DiffuseKronA's own code use
        "lora": Lora,
        "dora": Dora,
        "pissa": Pissa,
        "dylora": Dylora,
        "tlora": Tlora,
        "lokr": Lokr,
        "loha": Loha,
        "oft": Oft,
        "boft": Boft,
        "hra": Hra,
        "glora": Glora,
        "ia3": Ia3,
        "diff": Diff,
        "bitfit": BitFit,
        "norm": NormTuning,
        "difffit": DiffFit,
        "svdiff": Svdiff,
        "vera": Vera,
        "fourierft": FourierFt,
        "c3a": C3a,
    }
)
"""Kind -> method, in the order in which foreign tensors are offered to `unpack`."""


def method_named(name: str) -> type[Patch]:
    """Return the method called `name`. Raises `ConfigError` with the nearest known name."""
    method = TABLE.get(name)
    if method is None:
        raise ConfigError(f'no delta method is called "{name}"', fix=nearest(name, tuple(TABLE)))
    return method
