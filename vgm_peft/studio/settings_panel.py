"""The panel of what else determines a picture: steps, guidance, seed, number, size, sampler, and how deltas act together."""

import random
from typing import Any

import gradio as gr

from vgm_peft.config import Table
from vgm_peft.stack.recipe import SCHEDULERS, Stack, parse_size
from vgm_peft.studio.stack_panel import Values

TOGETHER = (("all at once", "sum"), ("in turns, step by step", "switch"), ("each for itself, averaged", "composite"))


class SettingsPanel:
    """Builds the panel into the Blocks that are open."""

    def build(self) -> None:
        """Lay it out."""
        samplers = [(label, name) for name, (_, label) in SCHEDULERS.items()]
        # `interactive` is said everywhere: gradio shows as fixed what no event of its own reads.
        with gr.Row():
            self.steps = gr.Slider(
                1, 100, 25, step=1, label="Steps", interactive=True, info="More take longer.", elem_id="steps"
            )
            self.guidance = gr.Slider(
                0, 20, 0, step=0.5, label="Guidance", interactive=True, info="0: as suits the base. More: stricter."
            )
        with gr.Row():
            self.seed = gr.Number(
                -1, label="Seed", precision=0, minimum=-1, interactive=True, elem_id="seed",
                info="Which picture of all that are possible. -1: a new one.",
            )  # fmt: skip
            self.count = gr.Slider(1, 8, 2, step=1, label="Pictures", interactive=True, info="One seed after another.")
        with gr.Row():
            self.size = gr.Textbox(
                "",
                label="Size",
                placeholder="like 768x512",
                max_length=11,
                interactive=True,
                info="In pixels. Empty: the base's own.",
            )
            self.sampler = gr.Dropdown(
                samplers,
                value="dpmpp",
                label="Sampler",
                interactive=True,
                info="How noise becomes a picture; a matter of taste.",
            )
        self.together = gr.Dropdown(
            TOGETHER, value="sum", label="Several deltas act", interactive=True, elem_id="together",
            info="Where deltas spoil one another, turns or averages may help.",
        )  # fmt: skip

        self.fields = (self.steps, self.guidance, self.seed, self.count, self.size, self.sampler, self.together)

    def table(self, values: Values) -> Table:
        """What the panel says, as keys of a stack; a seed of -1 becomes a random one. Raises `ConfigError`."""
        seed, size, guidance = values[self.seed], str(values[self.size] or "").strip(), float(values[self.guidance])
        table: Table = {
            "steps": int(values[self.steps]),
            "seed": random.SystemRandom().randrange(2**32) if seed is None or seed < 0 else int(seed),
            "count": int(values[self.count]),
            "scheduler": values[self.sampler],
            "combine": values[self.together],
        }
        if guidance:
            table["guidance"] = guidance
        if size:
            table["width"], table["height"] = parse_size(size)
        return table

    def shown(self, stack: Stack) -> dict[Any, Any]:
        """The updates that show the settings of a stack."""
        return {
            self.steps: stack.steps,
            self.guidance: stack.guidance or 0,
            self.seed: stack.seed,
            self.count: min(8, stack.count),
            self.size: f"{stack.width}x{stack.height}" if stack.width and stack.height else "",
            self.sampler: stack.scheduler,
            self.together: stack.combine,
        }
