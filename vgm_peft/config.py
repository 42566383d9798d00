"""Configuration: frozen dataclass <-> TOML <-> `--set section.key=value`, one source of truth for every option.

A run is one complete, printable configuration. Precedence is defaults < recipe < flags; each layer is a plain nested
table until `build` binds the sum to the dataclass, so that an unknown key or a wrong type fails before anything is
loaded, naming the key, the place and the nearest known name.
"""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

from vgm_peft.errors import ConfigError, nearest

T = TypeVar("T")
Value = str | int | float | bool | list["Value"] | dict[str, "Value"]
Table = dict[str, Value]


def read_toml(path: Path) -> Table:
    """Read a TOML file into a nested table. Raises `ConfigError` naming the line when it is not TOML."""
    try:
        return cast(Table, tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file", fix="name an existing .toml recipe; those shipped are in training/"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", expected="a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None


def to_toml(config: object) -> str:
    """Write a dataclass (or table) as TOML; `None` values are left out, since TOML has no null."""
    import tomli_w

    return tomli_w.dumps(to_table(config))


def to_table(config: object) -> Table:
    """Turn a dataclass into a nested table of TOML values; the inverse of `build`."""
    plain = _plain(config)
    if not isinstance(plain, dict):
        raise TypeError(f"{type(config).__name__} is neither a dataclass nor a table")
    return plain


def _plain(value: object) -> Value | None:
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        pairs = ((str(k), _plain(v)) for k, v in cast(Mapping[object, object], value).items())
        return {k: v for k, v in pairs if v is not None}
    if isinstance(value, (list, tuple)):
        return [v for v in map(_plain, cast("list[object]", value)) if v is not None]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def merge(*layers: Table) -> Table:
    """Lay tables over one another, later over earlier, section by section; the inputs are unchanged."""
    out: Table = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict):
                below = out.get(key)
                value = merge(below, value) if isinstance(below, dict) else merge(value)
            out[key] = value
    return out


def parse_setting(text: str) -> Table:
    """Parse one `section.key=value`; the value is TOML where it parses as TOML, else a plain string."""
    key, equals, raw = text.partition("=")
    *sections, last = [name.strip() for name in key.split(".")]
    if not equals or not all((*sections, last)):
        raise ConfigError(f'--set "{text}"', expected="section.key=value", fix="for example --set delta.rank=16")
    table: Table = {}
    inner = table
    for section in sections:
        inner[section] = inner = cast(Table, {})
    inner[last] = _parse_value(raw)
    return table


def _parse_value(raw: str) -> Value:
    try:
        # Within brackets, so that nothing may follow the value: neither a comment nor a second line.
        values = cast("list[object]", tomllib.loads(f"v = [{raw}]")["v"])
    except (tomllib.TOMLDecodeError, RecursionError):
        return raw
    if len(values) == 1 and isinstance(values[0], (str, int, float, bool, list, dict)):  # a date is plain text to us
        return cast(Value, values[0])
    return raw


def build(cls: type[T], table: Mapping[str, object], where: str = "") -> T:
    """Bind a table to a dataclass, checking every key and type.

    `where` prefixes the keys in errors (`"recipe x.toml: delta."`). Raises `ConfigError` for an unknown key (with the
    nearest known name), a missing one, a wrong type, or whatever the dataclass' own `__post_init__` refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cast(typing.Any, cls)) if f.init}
    for key in table:
        if key not in fields:
            raise ConfigError(f'unknown setting "{where}{key}"', fix=nearest(key, list(fields)))
    values = {key: _bind(hints[key], value, f"{where}{key}") for key, value in table.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f'setting "{where}{missing[0]}" is missing', fix="give it in the recipe, by its flag or by --set")
    try:
        return cls(**values)
    except ConfigError as error:  # from `__post_init__`, which does not know in which section it stands
        if not where:
            raise
        what = f"{where.removesuffix('.')}: {error.what}"
        raise ConfigError(what, expected=error.expected, fix=error.fix) from None


def _bind(hint: object, value: object, where: str) -> object:
    """Check `value` against a type hint and convert where no meaning is lost (int to float, list to tuple, str to Path)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _bind_union(args, value, where)
    if origin is typing.Literal:
        if value in args and type(value) is not bool or value is True and True in args:
            return value
        raise ConfigError(f"{where} = {value!r}", expected="one of " + ", ".join(map(repr, args)))
    if origin is tuple and isinstance(value, (list, tuple)):
        items = cast("list[object]", value)
        inner = [args[0]] * len(items) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(items):
            raise ConfigError(f"{where} = {value!r}", expected=f"{len(inner)} values")
        return tuple(_bind(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, items, strict=True)))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {str(k): _bind(args[1], v, f"{where}.{k}") for k, v in cast(Mapping[object, object], value).items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, cast(Mapping[str, object], value), f"{where}.")
    if hint is float and type(value) in (int, float):
        number = float(cast(float, value))
        if math.isfinite(number):
            return number
        raise ConfigError(f"{where} = {value!r}", expected="a finite number")
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is object or isinstance(hint, type) and origin is None and type(value) is hint:
        return value
    raise ConfigError(f"{where} = {value!r}", expected=_spell(hint))


def _bind_union(args: tuple[object, ...], value: object, where: str) -> object:
    if value is None and type(None) in args:
        return None
    first: ConfigError | None = None
    for option in (a for a in args if a is not type(None)):
        try:
            return _bind(option, value, where)
        except ConfigError as error:
            first = first or error
    names = " or ".join(_spell(a) for a in args if a is not type(None))
    raise (first if first and len(args) == 2 else ConfigError(f"{where} = {value!r}", expected=names))


def _spell(hint: object) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    if isinstance(hint, type) and hint in names:
        return names[hint]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "a section of settings: " + ", ".join(f.name for f in dataclasses.fields(hint) if f.init)
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"a list, each {_spell(args[0])}"
    if typing.get_origin(hint) is tuple:
        return "a list: " + ", ".join(map(_spell, args))
    if typing.get_origin(hint) in (dict, Mapping):
        return "a section of settings"
    return str(hint).replace("typing.", "")
