"""The shape of the house, checked: which way imports point, what is not done anywhere, and how long a file may be."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import vgm_peft
from vgm_peft.site import Op

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vgm_peft"
FILES = sorted(PACKAGE.rglob("*.py"))

NOUNS = (
    "site",
    "delta",
    "rows",
    "shares",
    "sums",
    "fusing",
    "socket",
    "attachment",
    "process",
    "family",
    "drawing",
    "side",
    "beside",
    "score",
    "word",
    "words",
    "desk",
    "folders",
    "digests",
    "spelling",
)
ROOMS = ("deltas", "families", "sides", "scores")
LAYERS = (
    ("errors", "config", "header"),
    NOUNS,
    ROOMS,
    ("formats",),
    ("stack", "data", "picture", "annotate"),
    ("tools",),
    ("train",),
    ("studio", "bench"),
    ("cli", "demo"),
)
"""From the ground up; a module imports its own layer or lower ones. The rooms of one layer never import one another."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
APART = {*ROOMS, "stack", "data", "studio", "cli"}
TOYBOX = {"errors", "config", *NOUNS, "families", "deltas", "sides", "stack", "data", "formats", "picture", "toybox"}
"""The world has no place in the order: it is a customer of the toolkit, and only what faces the user knows it."""
MAX_LINES = 300
HOMES: dict[str, str] = vgm_peft._HOMES


def top(module: str) -> str:
    """`vgm_peft.deltas.lora` -> `deltas`."""
    return module.split(".")[1] if module.count(".") else ""


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every `vgm_peft.*` module that a file imports, anywhere in it, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "vgm_peft":  # public names live in the modules that `__getattr__` finds them in
                names = [f"vgm_peft.{HOMES.get(a.name, a.name)}" for a in node.names if a.name != "__version__"]
        else:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("vgm_peft."):
                yield name, node.lineno


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    here = parts[0]
    if here == "__init__":
        return
    wrong: list[str] = []
    for module, line in imported(path):
        there = top(module)
        if here == there:
            continue
        if here == "toybox":
            allowed = there in TOYBOX
        elif there == "toybox":
            allowed = here in ("demo", "cli", "studio", "bench")
        else:
            assert here in RANK, f"{label(path)}: give {here} its place in LAYERS"
            assert there in RANK, f"{label(path)}:{line}: {module} has no place in LAYERS"
            allowed = RANK[there] <= RANK[here] and not (here in APART and there in APART and RANK[here] == RANK[there])
        if not allowed:
            wrong.append(f"{label(path)}:{line} imports {module}")
    assert not wrong


def test_a_scorer_is_at_home_in_its_room_or_in_the_world_that_it_knows() -> None:
    """Scorers are found by name when they are asked for: the one way from the toolkit to the world, and that of its oracles."""
    homes = {name: top(place.partition(":")[0]) for name, place in importlib.import_module("vgm_peft.scores").TABLE.items()}
    assert {home for name, home in homes.items() if name != "oracles"} == {"scores"} and homes["oracles"] == "toybox"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_files_are_short_enough_to_read(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; the budget is {MAX_LINES}: look at it again, and divide it"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_nothing_is_unpickled_asserted_or_swallowed(path: Path) -> None:
    wrong: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = {a.name.split(".")[0] for a in getattr(node, "names", [])} | {str(getattr(node, "module", "")).split(".")[0]}
        if isinstance(node, (ast.Import, ast.ImportFrom)) and names & {"pickle", "dill", "marshal", "shelve", "cloudpickle"}:
            wrong.append(f"{node.lineno}: unpickling runs what strangers wrote; use safetensors")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save", "eval", "exec", "os.system"):
            wrong.append(f"{node.lineno}: {ast.unparse(node.func)}")
        if isinstance(node, ast.Call) and any(k.arg == "shell" for k in node.keywords):
            wrong.append(f"{node.lineno}: shell=")
        if isinstance(node, ast.Assert) and not ast.unparse(node.test).endswith(" is not None"):  # told to the type checker
            wrong.append(f"{node.lineno}: assert is not for what users cause; raise a VgmError")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            wrong.append(f"{node.lineno}: bare except")
    assert not wrong, f"{label(path)}: {wrong}"


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not [label(p) for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.parametrize("module", ["vgm_peft", "vgm_peft.errors", "vgm_peft.config", "vgm_peft.cli"])
def test_what_starts_every_command_does_not_import_torch(module: str) -> None:
    heavy = "torch numpy PIL transformers diffusers gradio peft accelerate tensorboard"
    code = f"import sys, {module}; print(*(set('{heavy}'.split()) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == ""


def compared(node: ast.Compare) -> set[object]:
    """The constants that something is compared with, by `==`, `!=` or `in (...)`; a search within a text is none of ours."""
    sides = [node.left, *node.comparators]
    if any(isinstance(op, (ast.In, ast.NotIn)) for op in node.ops):
        sides = [e for c in node.comparators if isinstance(c, (ast.Tuple, ast.Set, ast.List)) for e in c.elts]
    return {side.value for side in sides if isinstance(side, ast.Constant)}


@pytest.mark.parametrize("room", ROOMS)
def test_the_name_of_a_member_appears_only_in_its_room(room: str) -> None:
    """A method, family or side is known by name to its own room alone (recipes and tests apart): no `if kind == "lora"`."""
    names = set(importlib.import_module(f"vgm_peft.{room}").TABLE) - set(get_args(Op))  # a site may be a norm
    own = PACKAGE / room
    wrong: list[str] = []
    for path in FILES:
        if path.is_relative_to(own) or path.is_relative_to(PACKAGE / "toybox") or path.name == "demo.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and compared(node) & names:
                wrong.append(f"{label(path)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong


def test_no_tracked_file_knows_a_machine() -> None:
    """No path of someone's machine and no host name; only text files are looked at."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    marks = tuple(
        "/" + "/".join(p) + "/" for p in (("work", "main"), ("work", "shared"), ("root",), ("home", "runner"), ("Users",))
    )
    wrong: list[str] = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".png", ".safetensors", ".jpg", ".webp") or not path.is_file() or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        wrong += [f"{name}: {mark}" for mark in marks if mark in text]
    assert not wrong


def test_big_files_stay_out() -> None:
    """16 MiB for one file, 48 MiB for the embedded base: what a clone must not exceed."""
    sizes = {p: p.stat().st_size for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert not [label(p) for p, size in sizes.items() if size > 16 * 2**20]
    base = ROOT / "assets" / "toybox"
    assert sum(size for p, size in sizes.items() if p.is_relative_to(base)) <= 48 * 2**20


def test_a_wheel_has_what_a_checkout_has() -> None:
    """Folders that the build copies into the wheel must exist, or a fresh clone cannot be installed."""
    import tomllib

    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in build["force-include"].items():
        assert any(p.is_file() for p in (ROOT / source).rglob("*")), f"{source}/ is empty: git will not keep it"
        assert target == f"vgm_peft/{source}"
