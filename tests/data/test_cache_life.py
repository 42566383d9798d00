"""The cache under fire: killed writers, several runs at once, no room, a folder that may only be read, hostile entries."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from tests.data.makers import save as save_picture
from vgm_peft.data import Cache, encode_images, encode_prompts, plan_crops, scan
from vgm_peft.data.cache import key_of
from vgm_peft.data.space import VARIABLE, bound_of
from vgm_peft.errors import ConfigError
from vgm_peft.family import Base

Tiny = Callable[[str], Base]

# One process that imports torch once and then, again and again, forks a run that fills the cache and is killed in it.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from vgm_peft.data import Cache, encode_images, encode_prompts, plan_crops, scan
from vgm_peft.families import family_named
from vgm_peft.family import Base

root, times = Path(sys.argv[1]), int(sys.argv[2])
family = family_named("sd15")
base = Base(family.tiny(), family, "tiny").freeze()
examples = list(scan(root / "in").examples)
crops = plan_crops([(e.width, e.height) for e in examples], 64, 32)

def run(cache):
    images = encode_images(base, examples, crops, cache)
    prompts = encode_prompts(base, [f"picture {i}" for i in range(4)], cache)
    return [i.mean for i in images] + [i.std for i in images] + [c.hidden for c in prompts.values()]

def forked(folder):
    child = os.fork()
    if not child:
        run(Cache(folder))
        os._exit(0)
    return child

start = time.perf_counter()
right = run(Cache(enabled=False))
whole = time.perf_counter() - start
chance, wrong, killed, damaged = random.Random(0), [], 0, []
for number in range(times):
    folder = root / f"cache-{number // 3}"  # some begin with what a killed run left
    children = [forked(folder) for _ in range(1 + number % 2)]  # sometimes two at once, of which one is killed
    time.sleep(chance.uniform(0, whole))
    os.kill(children[0], signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(children[0], 0)[1])
    for child in children[1:]:
        if os.waitpid(child, 0)[1]:
            wrong.append(number)
    cache = Cache(folder)
    if not all(map(torch.equal, run(cache), right)):
        wrong.append(number)
    damaged += cache.notes
    cache.close()
print(json.dumps({"wrong": wrong, "killed": killed, "damaged": damaged}))
"""


def pictures(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        save_picture(folder / f"{number}.png", 70, 64 + 60 * (number % 2), number)
    return folder


def test_after_fifty_kills_nothing_is_wrong(tmp_path: Path) -> None:
    pictures(tmp_path / "in")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "50"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["wrong"] == [] and told["damaged"] == [] and told["killed"] >= 10


def entry(number: int) -> tuple[str, dict[str, torch.Tensor]]:
    return key_of("n", number), {"x": torch.full((1000,), float(number))}


def size(root: Path) -> int:
    return sum(p.stat().st_size for p in root.glob("??/*"))


def numbers(root: Path, of: int) -> list[int]:
    return [i for i in range(of) if (root / entry(i)[0][:2] / f"{entry(i)[0]}.safetensors").exists()]


def aged(root: Path) -> None:
    """Set the clock back for what is there, one entry a second, in the order of its making."""
    files = sorted(root.glob("??/*"), key=lambda p: p.stat().st_mtime_ns)
    for second, path in enumerate(files):
        os.utime(path, (1_000_000 + second, 1_000_000 + second))


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    first = Cache(tmp_path, gib=1.0)
    for number in range(10):
        first.put(*entry(number))
    first.close()
    aged(tmp_path)
    bound = size(tmp_path)
    second = Cache(tmp_path, gib=bound / 2**30)
    assert second.get(entry(0)[0]) is not None  # the oldest, but used just now
    second.put(*entry(10))
    assert size(tmp_path) <= bound * 0.9
    assert numbers(tmp_path, 11) == [0, *range(3, 11)] and second.notes == []


def test_what_a_run_uses_stays(tmp_path: Path) -> None:
    running, other = Cache(tmp_path, gib=1.0), Cache(tmp_path, gib=20_000 / 2**30)
    for number in range(4):
        running.put(*entry(number))
    for number in range(4, 8):
        other.put(*entry(number))
    assert numbers(tmp_path, 8) == list(range(8))
    assert len(other.notes) == 1 and "larger than its bound" in other.notes[0] and VARIABLE in other.notes[0]
    running.close()
    other.close()
    aged(tmp_path)
    Cache(tmp_path, gib=20_000 / 2**30).put(*entry(8))
    assert size(tmp_path) <= 18_000 and 8 in numbers(tmp_path, 9)


def test_a_dead_run_holds_nothing_and_its_litter_is_swept(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        cache = Cache(tmp_path, gib=1.0)
        for number in range(8):
            cache.put(*entry(number))
        os._exit(0)  # without closing, as if killed
    os.waitpid(child, 0)
    litter = next(tmp_path.glob("??")) / ".half.safetensors.1.abcdef"
    litter.write_bytes(bytes(100))
    assert list((tmp_path / ".leases").iterdir())
    aged(tmp_path)
    cache = Cache(tmp_path, gib=20_000 / 2**30)
    cache.put(*entry(8))
    assert size(tmp_path) <= 20_000 and not litter.exists() and len(list((tmp_path / ".leases").iterdir())) == 1


@pytest.mark.parametrize(("text", "gib"), [("", 50.0), ("0.5", 0.5), ("20", 20.0)])
def test_the_bound_is_set_by_the_environment(text: str, gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert bound_of() == gib * 2**30 and bound_of(1.0) == 2**30


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan", "inf"])
def test_a_bound_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=VARIABLE):
        Cache(tmp_path)


def test_a_cache_that_may_only_be_read_is_read() -> None:
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        cache = Cache(folder)
        cache.put(*entry(0))
        cache.close()
        for path in [Path(name), folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        if root:
            os.seteuid(65534)
        else:
            for path in folder.rglob("*"):
                path.chmod(0o555)
        try:
            other = Cache(folder)
            assert other.get(entry(0)[0]) is not None and other.get(entry(1)[0]) is None and other.notes == []
            other.put(*entry(1))
            other.put(*entry(2))
        finally:
            if root:
                os.seteuid(0)
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o755)
        assert other.notes == [f"cache {folder} cannot be written (Permission denied); going on without it"]
        assert numbers(folder, 3) == [0]


Change = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
HOSTILE: dict[str, Change] = {
    "NaN": lambda e: {**e, "mean": e["mean"] * float("nan")},
    "other shape": lambda e: {**e, "mean": e["mean"][..., :-1], "std": e["std"][..., :-1]},
    "other keys": lambda e: {"mean": e["mean"], "sigma": e["std"]},
    "more keys": lambda e: {**e, "more": e["std"].clone()},
    "other type": lambda e: {name: tensor.double() for name, tensor in e.items()},
    "negative deviation": lambda e: {**e, "std": -e["std"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_entry_with_a_right_checksum_is_made_again(name: str, tiny: Tiny, tmp_path: Path) -> None:
    base, cache = tiny("sd15"), Cache(tmp_path / "cache")
    examples = list(scan(pictures(tmp_path / "in", 1)).examples)
    crops = plan_crops([(e.width, e.height) for e in examples], 64, 32)
    (right,) = encode_images(base, examples, crops, cache)
    (path,) = cache.root.glob("??/*")
    cache.put(path.stem, HOSTILE[name](load(path.read_bytes())))
    again = Cache(tmp_path / "cache")
    (found,) = encode_images(base, examples, crops, again)
    assert torch.equal(found.mean, right.mean) and torch.equal(found.std, right.std)
    assert len(again.notes) == 1 and "is computed again" in again.notes[0]


def test_prompts_with_other_tensors_are_made_again(tiny: Tiny, tmp_path: Path) -> None:
    base, cache = tiny("sdxl"), Cache(tmp_path)
    right = encode_prompts(base, ["a cat"], cache)["a cat"]
    (path,) = tmp_path.glob("??/*")
    whole = load(path.read_bytes())
    for entry in ({"hidden": whole["hidden"][0]}, {**whole, "more": whole["hidden"].clone()}, {"pooled": whole["pooled"]}):
        cache.put(path.stem, entry)
        again = Cache(tmp_path)
        found = encode_prompts(base, ["a cat"], again)["a cat"]
        assert torch.equal(found.hidden, right.hidden) and again.notes
    path.write_bytes(save(whole))  # without our checksum
    again = Cache(tmp_path)
    assert torch.equal(encode_prompts(base, ["a cat"], again)["a cat"].hidden, right.hidden) and again.notes


def test_other_code_makes_other_keys(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_peft.data import encode

    base, made = tiny("sd15"), list[int]()
    for version in ("a", "a", "b"):
        monkeypatch.setattr(encode, "code_version", lambda version=version: version)
        encode_prompts(base, ["a cat"], Cache(tmp_path))
        made.append(len(list(tmp_path.glob("??/*"))))
    assert made == [1, 1, 2]


def test_the_code_version_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import vgm_peft
    from vgm_peft.data import encode

    package = Path(vgm_peft.__file__).parent
    copy = tmp_path / "vgm_peft"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "studio"))
    before = encode.code_version.__wrapped__()
    monkeypatch.setattr(encode, "__file__", str(copy / "data" / "encode.py"))
    assert encode.code_version.__wrapped__() == before
    for name in ("data/pictures.py", "data/buckets.py", "data/encode.py", "family.py", "families/sd15.py"):
        with (copy / name).open("a") as file:
            file.write("\n# changed\n")
        after = encode.code_version.__wrapped__()
        assert after != before, name
        before = after
