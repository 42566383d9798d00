"""The tasks: what a run can be for. A new one is a file here and a line in the table."""

from collections.abc import Mapping
from typing import Any

from vgm_peft.errors import ConfigError, nearest
from vgm_peft.sides import TABLE as SIDES
from vgm_peft.train.task import Task
from vgm_peft.train.tasks.control import Control
from vgm_peft.train.tasks.dreambooth import DreamBooth
from vgm_peft.train.tasks.finetune import FineTune
from vgm_peft.train.tasks.inversion import TextualInversion

_CONTROLS = [Control.of(side) for side in SIDES.values()]
TABLE: Mapping[str, type[Task[Any]]] = {task.name: task for task in (DreamBooth, FineTune, TextualInversion, *_CONTROLS)}


def task_named(name: str) -> type[Task[Any]]:
    """Return a task of the table. Raises `ConfigError` with the nearest known name."""
    if name not in TABLE:
        raise ConfigError(f'unknown task "{name}"', fix=nearest(name, list(TABLE)))
    return TABLE[name]
