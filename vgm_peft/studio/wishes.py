"""What can be trained in the browser: the tasks in plain words, the recipes for a base, and one training as asked for."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vgm_peft.config import Table, Value, read_toml
from vgm_peft.data.faults import KINDS
from vgm_peft.errors import ConfigError, nearest

ALLOWED = {kind: KINDS[kind] for kind in ("tiny", "duplicate", "near-duplicate")}
"""What can be wrong with pictures that were written anew when they were uploaded, and what happens when it is allowed."""
OWN_RECIPE = "studio"
"""The preset that `--recipe` of the Studio names."""


@dataclass(frozen=True)
class Aim:
    """A task as the page calls it."""

    label: str
    text: str
    """What the field for a text means to it."""
    hint: str
    word: str = ""
    """What the field for a word means; empty where there is none."""
    begin: tuple[str, str] = ("", "")
    """What stands in both to begin with."""
    annotated: bool = False
    """Its control pictures are computed."""


CAPTION = "Caption"
_AIMS: Mapping[str, Aim] = {
    "dreambooth": Aim("A subject (DreamBooth)", "What it is", "Its class, as in “a robot”.", "Word for it", ("a toy", "sks")),
    "finetune": Aim(
        "A style or theme (fine-tuning)", CAPTION, "Of pictures without a .txt of their own.", "Word before it", ("a toy", "")
    ),
    "textual-inversion": Aim(
        "A new word alone (Textual Inversion)", "What it is", "What the word begins as.", "The new word", ("a toy", "<me>")
    ),
}
ANNOTATORS = ("canny", "softedge", "scribble", "colour", "grey", "tile", "lineart")
"""Those that need no weights."""


def aim_of(task: str) -> Aim:
    """The words for a task; those of side networks are made from the table. Raises `ConfigError` with the nearest name."""
    if task in _AIMS:
        return _AIMS[task]
    from vgm_peft.train.tasks import TABLE

    if task not in TABLE:
        raise ConfigError(f'the task "{task[:60]}"', fix=nearest(task[:60], list(TABLE)))
    steered = TABLE[task].steered
    label = f"{'Control by a picture' if steered else 'Picture as a prompt'} ({task})"
    return Aim(label, CAPTION, "Of pictures without a .txt of their own; empty: none.", annotated=steered)


def aims() -> dict[str, Aim]:
    """All tasks."""
    from vgm_peft.train.tasks import TABLE

    return {task: aim_of(task) for task in TABLE}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A training as asked for in the browser; contradictions are refused on construction."""

    name: str
    class_prompt: str
    steps: int
    token: str = "sks"
    task: str = "dreambooth"
    preset: str = ""
    """A shipped recipe by its name; empty: the one for task, method and base."""
    method: str = ""
    """A line of the deltas' table; empty: the preset's."""
    annotator: str = "canny"
    seed: int = 0
    allow: tuple[str, ...] = ()
    """Kinds of faults in the pictures to go on in spite of, of `ALLOWED`."""

    def __post_init__(self) -> None:
        check_name(self.name)
        aim = aim_of(self.task)
        for what, text, needed in self._texts():
            if needed and not text.strip() or len(text) > 200 or not text.isprintable():
                expected = f"{1 if needed else 0} .. 200 ordinary characters"
                raise ConfigError(f"“{what}” is {len(text)} characters long", expected=expected)
        if " " in self.token.strip():
            raise ConfigError(f'the word "{self.token}"', expected="one word, such as sks")
        if aim.annotated and self.annotator not in ANNOTATORS:
            raise ConfigError(f'the control pictures "{self.annotator[:60]}"', expected="one of " + ", ".join(ANNOTATORS))
        if strange := set(self.allow) - ALLOWED.keys():
            raise ConfigError(f'allow "{min(strange)}"', expected="some of " + ", ".join(ALLOWED))
        if not 1 <= self.steps <= 100_000:
            raise ConfigError(f"steps = {self.steps}", expected="1 .. 100,000")

    def _texts(self) -> Iterator[tuple[str, str, bool]]:
        """What the fields are called, what stands in them, and whether something must."""
        aim = aim_of(self.task)
        yield aim.text, self.class_prompt, self.task in ("dreambooth", "textual-inversion")
        if aim.word:
            yield aim.word, self.token, self.task != "finetune"

    @property
    def folder_name(self) -> str:
        """The run's folder name."""
        return check_name(self.name)

    @property
    def caption(self) -> str:
        """The text of pictures that come without one; empty where the task makes it from class and word."""
        return "" if aim_of(self.task).text != CAPTION else self.class_prompt.strip()

    def table(self, base: str, images: Path, run: Path) -> Table:
        """The settings of the run, to be laid over its recipe."""
        text, word = self.class_prompt.strip(), self.token.strip()
        task: Table = {"name": self.task}
        data: Table = {"images": str(images)}
        if self.task == "dreambooth":
            task |= {"class_prompt": text, "token": word}
        elif self.task == "textual-inversion":
            task |= {"init_word": re.sub(r"^(an?|the)\s+", "", text, flags=re.IGNORECASE), "token": word}
        elif aim_of(self.task).annotated:
            data |= {"annotator": self.annotator}
        elif word and aim_of(self.task).word:
            data |= {"trigger": word}
        if self.allow:
            data |= {"allow": list[Value](self.allow)}
        whole: Table = {"base": base, "output": str(run), "steps": self.steps, "seed": self.seed, "task": task, "data": data}
        whole["preview"] = {"every": -(-self.steps // 4)}
        if self.method:
            whole["delta"] = {"kind": self.method}
        return whole

    def flags(self, table: Table, recipe: Path | None) -> list[str]:
        """The same as arguments of `vgm-train`: a list that no shell ever reads, in which no text can be taken for a flag."""
        settings = [f"--set={key}={json.dumps(value, ensure_ascii=False)}" for key, value in _leaves(table)]
        return [self.task, *([f"--recipe={recipe}"] if recipe else []), *settings]


def check_name(name: str) -> str:
    """Return the name of a folder for what is to be called so. Raises `ConfigError` for one that is more than plain words."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,39}", name):
        raise ConfigError(f'the name "{name[:60]}"', expected="1 to 40 letters, digits, spaces, _ or -, the first no sign")
    return name.strip().replace(" ", "-")


def _leaves(table: Table, prefix: str = "") -> Iterator[tuple[str, Value]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class Preset:
    """A recipe to choose: its name, its file, and what it says of itself."""

    name: str
    path: Path
    about: str
    kind: str
    """The method it trains; empty where it says none."""
    steps: int | None


def presets(task: str, base: str, own: Path | None = None) -> list[Preset]:
    """The recipes for a task on a base: the Studio's own where it has one, then the shipped ones, the plain method first.

    Recipes for the base itself, where there are any, else those for its family. Raises `VgmError` for a base that is none.
    """
    from vgm_peft.families import outline
    from vgm_peft.train.config import DeltaConfig
    from vgm_peft.train.recipes import shipped_folder

    folder = shipped_folder()
    found: list[Path] = []
    for name in () if folder is None else (base, outline(base).family):
        if folder is not None and "/" not in name and not found:
            names = [p for p in sorted(folder.glob(f"{task}*-{name}.toml")) if _is_of(p, task)]
            found = sorted(names, key=lambda p: (p.stem != f"{task}-{DeltaConfig().kind}-{name}", p.stem))
    all_of = [_preset(path.stem, path) for path in found]
    return [_preset(OWN_RECIPE, own), *all_of] if own is not None and _trains(own, task) else all_of


def _trains(recipe: Path, task: str) -> bool:
    """Whether the Studio's own recipe is for a task; one that names none is for subjects."""
    section = read_toml(recipe).get("task")
    return (section.get("name", "dreambooth") if isinstance(section, dict) else "dreambooth") == task


def _is_of(path: Path, task: str) -> bool:
    """Whether a recipe is for a task, and not for one whose name is longer."""
    return not any(longer != task and longer.startswith(task) and path.stem.startswith(longer) for longer in aims())


def _preset(name: str, path: Path) -> Preset:
    from vgm_peft.train.config import DeltaConfig
    from vgm_peft.train.recipes import read_recipe

    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("#").strip() for line in lines[: next((n for n, t in enumerate(lines) if t[:1] != "#"), 0)]]
    table = read_recipe(path)
    delta, steps = table.get("delta"), table.get("steps")
    kind = str(delta.get("kind", DeltaConfig().kind)) if isinstance(delta, dict) else ""
    return Preset(name, path, " ".join(head)[:400], kind, steps if isinstance(steps, int) else None)


def recipe_of(wish: Wish, base: str, own: Path | None) -> Path | None:
    """The recipe's file that a wish names; `None` where none is named. Raises `ConfigError` for one that is not offered."""
    if not wish.preset:
        return own if own is not None and _trains(own, wish.task) else None
    offered: Sequence[Preset] = presets(wish.task, base, own)
    for preset in offered:
        if preset.name == wish.preset:
            return preset.path
    raise ConfigError(
        f'there is no preset "{wish.preset[:80]}" for {wish.task} on this base',
        fix=nearest(wish.preset[:80], [p.name for p in offered]),
    )
