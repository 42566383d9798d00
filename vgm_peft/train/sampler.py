"""The sampler with which a run draws (class pictures, previews), put on a pipeline for a while."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from vgm_peft.family import Base
from vgm_peft.stack.sampling import scheduler_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCHEDULER = "dpmpp"


@contextmanager
def sampler(pipe: "DiffusionPipeline", base: Base) -> Generator[Any]:
    """Give a pipeline the sampler and no progress bar of its own; within the context it is the pipeline, loosely typed."""
    loose = cast(Any, pipe)
    before, bar = loose.scheduler, getattr(pipe, "_progress_bar_config", None)
    loose.scheduler = scheduler_for(base, SCHEDULER)
    loose.set_progress_bar_config(disable=True)
    try:
        yield loose
    finally:
        loose.scheduler = before
        loose.set_progress_bar_config(**(bar or {}))
