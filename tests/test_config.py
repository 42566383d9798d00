import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgm_peft.config import build, merge, parse_setting, read_toml, to_table, to_toml
from vgm_peft.errors import ConfigError, DataError, VgmError, nearest


@dataclass(frozen=True, kw_only=True)
class Optim:
    rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ConfigError(f"rate {self.rate}", expected="a positive number")


@dataclass(frozen=True, kw_only=True)
class Run:
    images: Path
    steps: int = 100
    flip: bool = False
    note: str | None = None
    limit: int | float | None = None
    targets: tuple[str, ...] = ("attention",)
    options: dict[str, object] = field(default_factory=dict[str, object])
    optim: Optim = Optim()


def test_defaults_then_recipe_then_flags() -> None:
    recipe, flags = {"images": "a", "optim": {"rate": 1, "kind": "sgd"}}, {"optim": {"rate": 0.5}, "targets": ["conv"]}
    run = build(Run, merge(recipe, flags))
    assert run == Run(images=Path("a"), targets=("conv",), optim=Optim(rate=0.5, kind="sgd"))
    assert recipe == {"images": "a", "optim": {"rate": 1, "kind": "sgd"}}


def test_toml_round_trips(tmp_path: Path) -> None:
    run = Run(images=Path("a b"), note='say "hi"\nü', limit=3, options={"rank": 4, "deep": {"x": [1, 2]}}, flip=True)
    path = tmp_path / "run.toml"
    path.write_text(to_toml(run), encoding="utf-8")
    assert build(Run, read_toml(path)) == run
    assert "limit" not in to_table(Run(images=Path("a")))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    texts, st.integers(-(2**63), 2**63 - 1), st.booleans(), st.none() | texts, st.none() | st.integers(0, 9) | st.floats(0, 9),
    st.lists(texts, max_size=3), st.floats(1e-300, 1e300),
)  # fmt: skip
def test_any_run_survives_toml(
    images: str, steps: int, flip: bool, note: str | None, limit: float | None, targets: list[str], rate: float
) -> None:
    import tomllib

    run = Run(
        images=Path(images), steps=steps, flip=flip, note=note, limit=limit, targets=tuple(targets), optim=Optim(rate=rate)
    )
    assert build(Run, tomllib.loads(to_toml(run))) == run


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"images": "a", "step": 5}, 'unknown setting "step"; did you mean "steps"?'),
        ({"images": "a", "optim": {"rte": 5}}, 'unknown setting "optim.rte"; did you mean "rate"?'),
        ({"images": "a", "zzz": 5}, "known: flip, images"),
        ({}, 'setting "images" is missing'),
        ({"images": 3}, "images = 3; expected a path"),
        ({"images": "a", "steps": "ten"}, "steps = 'ten'; expected a whole number"),
        ({"images": "a", "steps": 1.5}, "steps = 1.5; expected a whole number"),
        ({"images": "a", "steps": True}, "steps = True; expected a whole number"),
        ({"images": "a", "flip": 1}, "flip = 1; expected true or false"),
        ({"images": "a", "note": 1}, "note = 1; expected a text"),
        ({"images": "a", "limit": "x"}, "limit = 'x'; expected a whole number or a number"),
        ({"images": "a", "targets": "attention"}, "targets = 'attention'; expected a list, each a text"),
        ({"images": "a", "targets": [1]}, "targets[0] = 1; expected a text"),
        ({"images": "a", "optim": 3}, "optim = 3; expected a section of settings: rate, betas, kind"),
        ({"images": "a", "options": 3}, "options = 3; expected a section of settings"),
        ({"images": "a", "optim": {"betas": 3}}, "optim.betas = 3; expected a list: a number, a number"),
        ({"images": "a", "optim": {"betas": [0.9]}}, "optim.betas = [0.9]; expected 2 values"),
        ({"images": "a", "optim": {"kind": "adam"}}, "optim.kind = 'adam'; expected one of 'adamw', 'sgd'"),
        ({"images": "a", "optim": {"rate": -1}}, "optim: rate -1.0; expected a positive number"),
        ({"images": "a", "optim": {"rate": float("nan")}}, "optim.rate = nan; expected a finite number"),
        ({"images": "a", "optim": {"rate": float("inf")}}, "optim.rate = inf; expected a finite number"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(table: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(Run, table)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_types_bend_only_where_no_meaning_is_lost() -> None:
    run = build(Run, {"images": "a", "optim": {"rate": 1, "betas": [0, 1]}, "limit": 2})
    assert type(run.optim.rate) is float and run.optim.betas == (0.0, 1.0) and type(run.limit) is int
    assert build(Run, {"images": "a", "optim": Optim(rate=3.0)}).optim.rate == 3.0
    assert build(Run, {"images": "a", "note": None}).note is None


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("steps=5", {"steps": 5}),
        ("optim.rate=1e-4", {"optim": {"rate": 1e-4}}),
        ("flip=true", {"flip": True}),
        ("note=hello world", {"note": "hello world"}),
        ('note="true"', {"note": "true"}),
        ("note=", {"note": ""}),
        ("note=a=b", {"note": "a=b"}),
        ('targets=["conv", "-x"]', {"targets": ["conv", "-x"]}),
        ("images=/a/b", {"images": "/a/b"}),
        (" optim . rate = 2 ", {"optim": {"rate": 2}}),
        ("note=1\nsteps=2", {"note": "1\nsteps=2"}),
        ("note=5 # five", {"note": "5 # five"}),
        ("note=5, 6", {"note": "5, 6"}),
        ("note=2024-01-01", {"note": "2024-01-01"}),
        ("optim={rate = 2}", {"optim": {"rate": 2}}),
    ],
)
def test_settings_are_toml_where_they_can_be(text: str, table: dict[str, object]) -> None:
    assert parse_setting(text) == table


@pytest.mark.parametrize("text", ["steps", "=5", ".=5", "optim.=5", ".rate=5", "a..b=1", ""])
def test_a_setting_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_setting(text)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_toml(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("steps = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML .*line 1"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "raw.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(tmp_path / "raw.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)
    (tmp_path / "deep.toml").write_text("x = " + "[" * 5000)
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(tmp_path / "deep.toml")
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbfsteps = 5\r\n")
    assert read_toml(tmp_path / "bom.toml") == {"steps": 5}


def test_merge_lays_sections_over_one_another() -> None:
    low = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    assert merge(low, {"a": {"y": {"w": 4}}}, {"b": {"c": 5}}) == {"a": {"x": 1, "y": {"z": 2, "w": 4}}, "b": {"c": 5}}
    out = merge(low)
    out["a"]["x"] = 9  # type: ignore[index,call-overload]
    assert low == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run(images=Path("a")).steps = 3  # type: ignore[misc]


def test_errors_say_what_expected_and_cure_in_one_line() -> None:
    error = DataError("a.png is empty.", expected="a picture", fix="delete it.")
    assert str(error) == "a.png is empty; expected a picture; delete it"
    assert (error.what, error.expected, error.fix) == ("a.png is empty.", "a picture", "delete it.")
    assert isinstance(error, VgmError) and str(VgmError("only what")) == "only what"


def test_near_names() -> None:
    assert nearest("rnak", ["rank", "alpha"]) == 'did you mean "rank"?'
    assert nearest("zzz", ("b", "a")) == "known: a, b"
