"""Pictures made on the way, by the base's own stock pipeline with what is being trained in it."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vgm_peft.train.config import RunConfig
from vgm_peft.train.durable import saving, write_bytes
from vgm_peft.train.sampler import sampler
from vgm_peft.train.task import Setup, Task, own_chance


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
        plan, base = self.config.preview, self.setup.base
        if not plan.count or not self.setup.accelerator.is_main_process:
            return
        with saving(self.folder):
            self.folder.mkdir(exist_ok=True)
        with own_chance(self.setup.device), torch.no_grad(), self.setup.awake(), self.task.preview() as preview:
            prompts = self.config.preview.prompts or tuple(preview.prompts)
            with sampler(preview.pipe, base) as pipe, self.setup.accelerator.autocast():
                for i in range(plan.count):
                    extra = {name: values[i % len(values)] for name, values in preview.extra.items()}
                    latents = pipe(
                        prompt=prompts[i % len(prompts)],
                        num_inference_steps=plan.steps,
                        guidance_scale=base.guidance(plan.guidance),
                        generator=torch.Generator().manual_seed(self.config.seed + i),
                        output_type="latent",
                        **extra,
                    ).images
                    self._save(latents, self.folder / f"step-{step:06d}-{i}.png")

    def _save(self, latents: Tensor, path: Path) -> None:
        """Decode by the family, since the VAE may be in another precision than what sampled."""
        from PIL import Image

        base = self.setup.base
        pixels = base.family.decode(base, latents)[0].float().permute(1, 2, 0) / 2 + 0.5
        image = Image.fromarray((pixels.clamp(0, 1).nan_to_num() * 255).round().to(torch.uint8).cpu().numpy())
        encoded = BytesIO()
        image.save(encoded, "PNG")
        write_bytes(path, encoded.getvalue())
        self.drawn.append(path)
