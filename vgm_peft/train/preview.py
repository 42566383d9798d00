"""Pictures made on the way, by the base's own stock pipeline with what is being trained in it."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_peft.train.config import RunConfig
from vgm_peft.train.durable import saving, write_bytes
from vgm_peft.train.sampler import Drawing, draw, sampler
from vgm_peft.train.task import Preview, Setup, Task, own_chance


@contextmanager
def easel(task: Task[Any], setup: Setup) -> Generator[tuple[Preview, Any]]:
    """Have a task's suggestions and its pipeline ready for `draw`. Parameters, modes and chance are afterwards as before."""
    with own_chance(setup.device), torch.no_grad(), setup.awake(), task.preview() as preview:
        with sampler(preview.pipe, setup.base) as pipe, setup.accelerator.autocast():
            yield preview, pipe


class Previews:
    """Draws `preview.count` pictures from always the same noise, so that a row of them shows the training and not chance."""

    def __init__(self, task: Task[Any], setup: Setup, folder: Path) -> None:
        self.task, self.setup, self.folder = task, setup, folder
        self.config: RunConfig = setup.config
        self.drawn: list[Path] = []

    def prompts(self) -> Sequence[str]:
        """What is drawn: the prompts of the configuration, or the task's own."""
        with self.task.preview() as preview:
            return self.config.preview.prompts or tuple(preview.prompts)

    def draw(self, step: int) -> None:
        """Draw into `samples/` (the main process only). Parameters, modes and chance are afterwards as before."""
        plan = self.config.preview
        if not plan.count or not self.setup.accelerator.is_main_process:
            return
        with saving(self.folder):
            self.folder.mkdir(exist_ok=True)
        with easel(self.task, self.setup) as (preview, pipe):
            prompts = plan.prompts or tuple(preview.prompts)
            for i in range(plan.count):
                preview.before(i)
                how = Drawing(seed=self.config.seed + i, steps=plan.steps, guidance=plan.guidance)
                picture = draw(pipe, self.setup.base, [prompts[i % len(prompts)]], how)[0]
                self._save(picture, self.folder / f"step-{step:06d}-{i}.png")

    def _save(self, picture: Tensor, path: Path) -> None:
        from PIL import Image

        encoded = BytesIO()
        Image.fromarray(picture.numpy()).save(encoded, "PNG")
        write_bytes(path, encoded.getvalue())
        self.drawn.append(path)
