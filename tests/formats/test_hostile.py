"""Files by strangers are read whole or refused: by one class of error and one line that names the file, and nothing is run."""

import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.formats.hostile import Stranger, good, spoiled
from tests.formats.hostile_headers import FOREIGN, HOSTILE
from tests.formats.hostile_texts import hostile_texts
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError, nearest
from vgm_peft.families import KNOWN
from vgm_peft.family import Base
from vgm_peft.formats.books import books
from vgm_peft.formats.canonical import open_header, read_tensors
from vgm_peft.formats.compare import identical

Make = Callable[[str], Base]
MUTANTS, OF_DATA = 10_000, 300
"""How many there are in all, and how many of them have their values changed and not their header."""

NATIVE_VALUES = ("a value is NaN", "a value is infinite")
RIGHT = {
    **{f"native{kind}: {name}": "kept as it is, to be looked into" for kind in ("", " lokr") for name in NATIVE_VALUES},
    "oft: one axis more": "a BOFT of one factor, which it is",
    "ia3: one axis more": "one value for every output still",
    "diff: a tensor is missing": "a whole delta of the other layer",
    "embedding: a row more": "a token of three vectors",
}
"""Files that are whole for all their strangeness, and as what they are read; 8-bit floats are, in every layout but ours."""


def is_right(name: str) -> bool:
    layout, _, trick = name.partition(": ")
    return name in RIGHT or trick == "8 bits" and not layout.startswith("native") or is_token_name(layout, trick)


def is_token_name(layout: str, trick: str) -> bool:
    """A lone tensor's name is no path and no attribute: the token stands in the metadata, and no file is called by it."""
    return layout == "embedding" and trick.startswith("a name ") and "10 KB" not in trick


OUTSIDE = ("pickle.", "exec", "compile", "marshal.", "subprocess.", "os.", "socket.", "import", "shutil.", "ctypes.", "urllib.")
_heard: list[str] | None = None


def _listen(event: str, _: tuple[object, ...]) -> None:
    if _heard is not None and event.startswith(OUTSIDE):
        _heard.append(event)


sys.addaudithook(_listen)  # there is no way to take one away again: it hears nothing outside `overheard`


@contextmanager
def overheard() -> Generator[list[str], None, None]:
    """What is run, imported or reached for in the meantime."""
    global _heard
    _heard = heard = []
    try:
        yield heard
    finally:
        _heard = None


@pytest.fixture(scope="module")
def base(shared: Make) -> Base:
    return shared("sd15")


@pytest.fixture(scope="module")
def wholes(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Delta]:
    """The good files as they are read; after this all that reading needs is imported."""
    nearest("lore", ("lora",))
    DeltaError("\n")
    list(books(list(KNOWN)))
    return {name: formats.read(file.put(tmp_path_factory.mktemp("good")), base) for name, file in good().items()}


def refusal(path: Path, base: Base | None) -> str | None:
    """The error's text, None where the file is read whole; other errors pass."""
    try:
        formats.read(path, base)
    except DeltaError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 1000, text
        assert str(path.parent) in text, text
        return text
    return None


def hostile_files() -> Iterator[tuple[str, Stranger, bytes]]:
    nothing = Stranger({})
    heads = {**HOSTILE, **{name: content for name, (content, _) in FOREIGN.items()}}
    return chain(spoiled(), hostile_texts(), ((name, nothing, content) for name, content in heads.items()))


def test_every_hostile_file_is_refused_by_one_line_and_nothing_is_run(
    base: Base, wholes: dict[str, Delta], tmp_path: Path
) -> None:
    seen: set[str] = set()
    for name, file, content in hostile_files():
        path = file.put(tmp_path, content)
        with overheard() as heard:
            found = refusal(path, base)
            refusal(path, None)  # without a base fewer shapes are known; whole or refused it is even so
        assert (found is None) == is_right(name), f"{name}: {found}"
        assert not heard, f"{name}: {heard}"
        assert name not in seen, name
        seen.add(name)
        for beside in tmp_path.iterdir():
            beside.unlink()
    assert len(seen) >= 300 and seen >= RIGHT.keys()


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_named_for_what_they_are(name: str, tmp_path: Path) -> None:
    content, word = FOREIGN[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(DeltaError, match=word):
        open_header(path)


def test_a_file_that_is_a_zip_too_is_neither_unpacked_nor_read(tmp_path: Path) -> None:
    """Whole as a safetensors file but for what follows it, and whole as a zip: two programs would see two contents."""
    path = good()["kohya"].put(tmp_path)
    with path.open("ab") as file:
        torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(DeltaError, match="bytes follow the last tensor"):
        formats.read(path)


# Mutants -------------------------------------------------------------------------------------------------------------


def flip(raw: bytearray, dice: random.Random, end: int) -> None:
    for _ in range(dice.randint(1, 3)):
        raw[dice.randrange(end)] ^= 1 << dice.randrange(8)


def cut(raw: bytearray, dice: random.Random, end: int) -> None:
    start = dice.randrange(end)
    del raw[start : start + dice.choice((1, 2, 8, 100, len(raw)))]


def insert(raw: bytearray, dice: random.Random, end: int) -> None:
    start = dice.randrange(end)
    raw[start:start] = dice.choice(
        (b"\0", b"9", b'"', b"{", b"[0]", b"-", b".alpha", b"\xff\xfe", b"1e999", b"NaN", b"\\ud800")
    )


def swap(raw: bytearray, dice: random.Random, end: int) -> None:
    a, b, length = dice.randrange(end), dice.randrange(end), dice.choice((1, 4, 20))
    raw[a : a + length], raw[b : b + length] = raw[b : b + length], raw[a : a + length]


VALUES: tuple[object, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**62, 2**64, 0.5, "", "F16", "C64", "F64", "NaN", [], [0], [16, 32], [1] * 9, {}, "[[",
)  # fmt: skip


def header_swap(raw: bytearray, dice: random.Random, end: int) -> None:
    """Change a value, a name or a pair of entries in the header, and keep it a header: its length is made to fit."""
    table: dict[str, dict[str, object]] = json.loads(bytes(raw[8:end]))
    names = list(table)
    one, other = dice.choice(names), dice.choice(names)
    what = dice.randrange(4)
    if what == 0:
        table[one], table[other] = table[other], table[one]
    elif what == 1:
        table[dice.choice((other + "x", other[:-1], one[: len(one) // 2] + other[len(other) // 2 :]))] = table.pop(one)
    elif table[one]:
        field = dice.choice(list(table[one]))
        table[one][field] = table[other].get(field, "") if what == 2 else dice.choice(VALUES)
    text = json.dumps(table).encode()
    raw[:end] = struct.pack("<Q", len(text)) + text


def metadata_swap(raw: bytearray, dice: random.Random, end: int) -> None:
    """Change some letters of one text of the metadata."""
    table: dict[str, dict[str, str]] = json.loads(bytes(raw[8:end]))
    said = table.setdefault("__metadata__", {"vgm_peft.version": "1"})
    key = dice.choice(list(said))
    text = bytearray(said[key].encode() or b"?")
    dice.choice((flip, cut, insert, swap))(text, dice, len(text))
    said[key] = text.decode("utf-8", "replace")
    new = json.dumps(table).encode()
    raw[:end] = struct.pack("<Q", len(new)) + new


EXTREME = (float("nan"), float("inf"), float("-inf"), 1e38, -1e38, 1e9, 1e-45, -0.0, 65504.0, 0.0)
"""Values that something stumbles over: no numbers, too large to square, just too large for an alpha, too small to divide by."""


def data_swap(raw: bytearray, dice: random.Random, end: int) -> None:
    """Change some values of one tensor, or some bits of them; alphas, scales and values of a base as often as factors."""
    table: dict[str, dict[str, Any]] = json.loads(bytes(raw[8:end]))
    entry = table[dice.choice([name for name in table if name != "__metadata__"])]
    start, stop = (end + offset for offset in entry["data_offsets"])
    format = {"F64": "<d", "F32": "<f", "F16": "<e"}.get(entry["dtype"])
    for _ in range(dice.choice((1, 2, 20))):
        if format is None or dice.random() < 0.4:
            raw[dice.randrange(start, stop)] ^= 1 << dice.randrange(8)
            continue
        size = struct.calcsize(format)
        value = dice.choice([v for v in EXTREME if size > 2 or not 65504.0 < abs(v) < float("inf")])
        at = start + size * dice.randrange((stop - start) // size)
        raw[at : at + size] = struct.pack(format, value)


CHANGES = (flip, cut, insert, swap, header_swap, header_swap, metadata_swap, metadata_swap)


def content(path: Path) -> dict[str, Tensor]:
    """A file's tensors as the stock library has them, which accepts whatever we do."""
    with safe_open(path, "pt") as stock:
        return {name: stock.get_tensor(name) for name in stock.keys()}  # noqa: SIM118


def test_mutants_of_values_are_refused_or_say_what_their_bytes_say(
    base: Base, wholes: dict[str, Delta], tmp_path: Path
) -> None:
    """What is read is finite, and only the layer or token whose tensor was changed differs from what it was."""
    dice, read, changed = random.Random(1), 0, 0
    files = [(name, file, file.raw()) for name, file in good().items() if not name.startswith("native")]
    for number in range(OF_DATA):
        name, file, raw = files[number % len(files)]
        mutant = bytearray(raw)
        data_swap(mutant, dice, 8 + struct.unpack("<Q", raw[:8])[0])
        path = file.put(tmp_path, bytes(mutant))
        found = read_or_refused(path, base, (number, name))
        finite = all(bool(tensor.float().isfinite().all()) for tensor in content(path).values())
        assert finite or found is None, (number, name)
        if found is not None:
            read += 1
            ours, theirs = values(found), values(wholes[name])
            assert all(bool(value.isfinite().all()) for value in ours.values()), (number, name)
            odd = {key.rpartition("/")[0] for key in ours if key not in theirs or not torch.equal(ours[key], theirs[key])}
            assert len({module.rpartition(".")[0] for module in odd}) <= 1 or "vera" in name, (number, name, odd)
            changed += bool(odd)
    assert OF_DATA // 4 < changed <= read < OF_DATA


def read_or_refused(path: Path, base: Base, what: object) -> Delta | None:
    """Read a mutant; None where it is refused, in one line that names it. Nothing else happens on the way."""
    found = None
    with overheard() as heard:
        try:
            found = formats.read(path, base)
        except DeltaError as error:
            assert str(error).isprintable() and str(path.parent) in str(error), (what, str(error))
    assert not heard, (what, heard)
    return found


def values(delta: Delta) -> dict[str, Tensor]:
    """A delta's values by the names of the layer, or the token, and the parameter."""
    rows = {f"word.{token}/{part}": rows for token, word in delta.words.items() for part, rows in word.rows.items()}
    return {**{name: value.detach() for name, value in delta.parameters()}, **rows}


def test_ten_thousand_mutants_are_whole_or_refused(base: Base, wholes: dict[str, Delta], tmp_path: Path) -> None:
    """A mutant that is read has all its tensors in it: as many layers and tokens as before, and the same if none changed."""
    dice, read = random.Random(0), 0
    files = [(name, file, file.raw(), content(file.put(tmp_path))) for name, file in good().items()]
    for number in range(MUTANTS - OF_DATA):
        name, file, raw, tensors = files[number % len(files)]
        mutant = bytearray(raw)
        head = 8 + struct.unpack("<Q", raw[:8])[0]
        dice.choice(CHANGES)(mutant, dice, head)
        path = file.put(tmp_path, bytes(mutant))
        found = read_or_refused(path, base, (number, name))
        if found is None:
            continue
        read += 1
        whole, stock = wholes[name], content(path)
        assert set(stock) == set(read_tensors(open_header(path)))
        assert (len(found.patches), len(found.words)) == (len(whole.patches), len(whole.words)), (number, name)
        unchanged = stock.keys() == tensors.keys() and all(torch.equal(stock[key], tensors[key]) for key in tensors)
        if unchanged and open_header(path).metadata == file.metadata:
            found.words = whole.words if name == "embedding" else found.words
            assert identical(found, whole), (number, name)
    assert 100 < read < (MUTANTS - OF_DATA) // 2


# Memory --------------------------------------------------------------------------------------------------------------

LARGE: dict[str, Callable[[], bytes]] = {
    "200,000 empty tensors": lambda: HOSTILE["200,000 empty tensors"],
    "metadata nested deep": lambda: Stranger({}, {"vgm_peft.version": "1", "vgm_peft.patches": "[" * 10_000_000}).raw(),
    "names of 900 letters": lambda: Stranger({f"{n:0900}": torch.ones(1) for n in range(10_000)}).raw(),
    **{
        name: (lambda found=name: next(raw for name, _, raw in hostile_texts() if name == found))
        for name in ("terabytes: loha", "terabytes: lokr, left", "terabytes: glora", "terabytes: lora in Tucker form")
    },
}
PROGRAM = """
import resource, sys
from vgm_peft import formats
from vgm_peft.errors import DeltaError
from vgm_peft.families import KNOWN
from vgm_peft.formats.books import books
list(books(list(KNOWN)))
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        formats.read(path)
        print("read")
    except DeltaError:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_the_files_own_size(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(LARGE))]
    for path, make in zip(paths, LARGE.values(), strict=True):
        path.write_bytes(make())
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, paths)], capture_output=True, text=True, check=True)
    for name, path, grown in zip(LARGE, paths, done.stdout.split(), strict=True):
        assert int(grown) * 1024 < 64 * 2**20 + 12 * path.stat().st_size, f"{name}: {grown} KiB"
