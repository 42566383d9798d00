"""The table of targets: a target is a tool that deltas are exported for, with what it is known to load rightly.

What stands here was read in the loaders' own code, and where they could be run here it was run. It is data only: which forms
(see `forms`) a tool loads, what it gets wrong in them, where it finds biases, and what its users should be told. The plan for a
delta (`plan`) follows from it. Sources: ComfyUI 0.3.64, A1111 of 2024-02, Forge of 2025-06, InvokeAI of 2026-08, sd-scripts of
2026-02 with LyCORIS 4.1, diffusers 0.42, peft 0.21.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from vgm_peft.errors import ConfigError, nearest
from vgm_peft.formats.forms import Form

Bias = Literal["alone", "beside diff", "nowhere"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tool, by what it loads."""

    name: str
    format: str
    """The spelling that it reads, a line of the formats' table."""
    about: str
    loads: frozenset[str] = frozenset()
    """Names of forms; `*` is every form, for a spelling that is no single tool's."""
    wrong: frozenset[str] = frozenset()
    """What it gets wrong in those: a mark, or a form's name and a mark."""
    bias: Bias = "nowhere"
    """Where it reads the change of a bias: anywhere, beside a `diff` of the same layer, or not at all."""
    text: Literal["linear", "all"] = "linear"
    """What it finds in text encoders: linear layers only, or everything."""
    all_of_attention: bool = False
    """In text encoders it takes q, k, v and out of a layer together or not at all."""
    adapters: bool = False
    """It has a part's changes in a kind of its own, where they all are of that kind (`peft_kinds`)."""
    remarks: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name of a form -> what a user of it should know."""
    probe: tuple[str, ...] = ()
    """It tells the base by one of these layers, and refuses the file when there is none."""

    def takes(self, form: Form) -> bool:
        """Say whether it loads a form, and rightly."""
        if "*" in self.loads:
            return True
        return form.name in self.loads and not ({*form.marks} | {f"{form.name} {mark}" for mark in form.marks}) & self.wrong

    @property
    def is_tool(self) -> bool:
        """Whether it reads the files of others: not our own format, and not trained tokens alone."""
        return bool(self.loads)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split(", "))


UI = "lora, loha, lokr, diff, norm"
AT_ONE = "exact at strength 1 only: at other strengths the tool does something else with a rotation"
LATER = "sd-scripts loads it through LyCORIS (--network_module lycoris.kohya)"
_LINES = (
    Target(name="native", format="native", about="vgm_peft: every kind, bit for bit"),
    Target(
        name="comfyui",
        format="kohya",
        about="ComfyUI",
        loads=_words(f"{UI}, glora, oft, boft"),
        wrong=_words("output, oft rescale"),
        bias="alone",
        remarks={"oft": AT_ONE, "boft": AT_ONE},
    ),
    Target(
        name="a1111",
        format="kohya",
        about="AUTOMATIC1111's web UI",
        loads=_words(f"{UI}, oft, boft, ia3"),
        wrong=_words("output, kernel"),
        bias="beside diff",
        all_of_attention=True,
    ),
    Target(
        name="forge", format="kohya", about="Forge", loads=_words(f"{UI}, glora"), wrong=frozenset({"output"}), bias="alone"
    ),
    Target(
        name="invokeai",
        format="kohya",
        about="InvokeAI",
        loads=_words(f"{UI}, ia3"),
        wrong=_words("output, loha input, lokr input, kernel"),
        bias="beside diff",
        probe=("_attn2_to_k.", "_attn2_to_v.", "_self_attn_", "_transformer_blocks_2_"),
    ),
    Target(
        name="kohya",
        format="kohya",
        about="sd-scripts, SD.Next and all that reads kohya's names",
        loads=frozenset("*"),
        bias="alone",
        text="all",
        remarks=dict.fromkeys(("loha", "lokr", "glora", "ia3", "oft", "boft", "diff"), LATER),
    ),
    Target(name="diffusers", format="diffusers", about="diffusers", loads=frozenset({"lora"}), wrong=frozenset({"input"})),
    Target(name="peft", format="peft", about="peft", loads=frozenset({"lora"}), wrong=frozenset({"input"}), adapters=True),
    Target(
        name="lycoris",
        format="lycoris",
        about="LyCORIS, SimpleTuner",
        loads=_words(f"{UI}, glora, oft, boft"),
        wrong=_words("input, split, coarse, cut"),
        bias="beside diff",
        text="all",
    ),
    Target(name="embedding", format="embedding", about="trained tokens alone, for diffusers and every UI"),
)

TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in _LINES})
"""Every target by its name, the UIs first."""
TOOLS = tuple(name for name, target in TARGETS.items() if target.is_tool)
"""The targets that are other people's programs."""


def target_named(name: str) -> Target:
    """Return a target by its name. Raises `ConfigError` with the nearest known name."""
    found = TARGETS.get(name)
    if found is None:
        raise ConfigError(f'no tool is known here as "{name}"', fix=nearest(name, tuple(TARGETS)))
    return found
