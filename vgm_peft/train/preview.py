"""Pictures made on the way, by the base's own stock pipeline with what is being trained in it."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from vgm_peft.stack.sampling import scheduler_for
from vgm_peft.train.config import RunConfig
from vgm_peft.train.durable import saving
from vgm_peft.train.task import Setup, Task


class Previews:
    """Draws `preview.count` pictures from always the same noise, so that a row of them shows the training and not chance."""

    def __init__(self, task: Task[Any], setup: Setup, folder: Path) -> None:
        self.task, self.setup, self.folder = task, setup, folder
        self.config: RunConfig = setup.config
        self.drawn: list[Path] = []

    def due(self, step: int) -> bool:
        """Whether to draw after `step` steps."""
        every = self.config.preview.every
        return every > 0 and step % every == 0

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
        with torch.random.fork_rng(), torch.no_grad(), self.setup.awake(), self.task.preview() as preview:
            prompts = self.config.preview.prompts or tuple(preview.prompts)
            pipe = cast(Any, preview.pipe)
            with _sampler(pipe, self.setup):
                for i in range(plan.count):
                    extra = {name: values[i % len(values)] for name, values in preview.extra.items()}
                    image = pipe(
                        prompt=prompts[i % len(prompts)],
                        num_inference_steps=plan.steps,
                        guidance_scale=plan.guidance,
                        generator=torch.Generator().manual_seed(self.config.seed + i),
                        **extra,
                    ).images[0]
                    path = self.folder / f"step-{step:06d}-{i}.png"
                    with saving(path):
                        image.save(path)
                    self.drawn.append(path)


@contextmanager
def _sampler(pipe: Any, setup: Setup) -> Generator[None]:
    before = pipe.scheduler
    pipe.scheduler = scheduler_for(setup.base, "dpmpp")
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.scheduler = before
