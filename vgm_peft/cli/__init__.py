"""The commands `vgm-train`, `vgm-generate`, `vgm-delta`, `vgm-studio` and `vgm-bench`: parse, call, print.

A command is a module `vgm_peft/cli/<name>.py` whose docstring is its `--help` and which offers two functions:

    def add_flags(parser: Parser) -> None: ...     # at most a dozen, what people change between two runs
    def run(args: argparse.Namespace) -> int: ...  # the exit status, 0 when all is well

Both the module and `add_flags` must be cheap: torch, diffusers and gradio are imported inside `run`, so that `--help`
answers in well under half a second. What the user can mend is raised as a `VgmError`; `main` prints it as one line and
leaves with status 2. Anything else that escapes is a fault of ours and shows its traceback.

In one process (tests, notebooks) call `main("train", ["dreambooth", "--images", "me"])` rather than `cli.train()`: once
the module `vgm_peft.cli.train` is imported, Python hides the function of the same name behind it.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, cast

from vgm_peft.errors import ConfigError, VgmError, nearest


class Command(Protocol):
    """What a module under `cli/` offers."""

    def add_flags(self, parser: "Parser") -> None:
        """Declare the flags."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit status."""
        ...


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `ConfigError` instead of exiting, and names the nearest flag to an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what `argparse.ArgumentParser` takes; abbreviations are off, since `--step` for `--steps` is a guess."""
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] (the stub's is overloaded by namespace type)
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse, and refuse what is left over while this (sub)command's own flags are still known."""
        found, extras = super().parse_known_args(args, namespace)
        if not extras:
            return found, extras
        first = extras[0]
        if not first.startswith("-"):
            raise ConfigError(f'unexpected argument "{first}"', fix=f"see {self.prog} --help")
        flag = first.partition("=")[0]
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        raise ConfigError(f'unknown flag "{flag}"', fix=f"{nearest(flag, flags)} See {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Name the nearest choice to one that is none; argparse calls this for choices and verbs."""
        choices = [str(choice) for choice in action.choices or ()]
        if choices and str(value) not in choices:
            name = action.metavar if isinstance(action.metavar, str) else "/".join(action.option_strings) or action.dest
            raise ConfigError(f'{name} "{value}"', expected="one of " + ", ".join(choices), fix=nearest(str(value), choices))

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` with argparse's sentence."""
        raise ConfigError(message, fix=f"see {self.prog} --help")


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 for what the user can mend, 130 when interrupted.

    `argv` are the arguments after the command's name, by default those of this process.
    """
    # Before torch: threads that wait by spinning cost a factor of a hundred as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        command = cast(Command, importlib.import_module(f"vgm_peft.cli.{name}"))
        parser = Parser(prog=f"vgm-{name}", description=(command.__doc__ or "").strip())
        command.add_flags(parser)
        return command.run(parser.parse_args(argv))
    except VgmError as error:
        print(f"vgm-{name}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vgm-{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone (`vgm-delta inspect FILE | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _one_line(error: VgmError) -> str:
    """Keep the promise of one line whatever a file name or a library's message held."""
    return " ".join(str(error).split())


def train() -> int:
    """`vgm-train`: teach a base model something from pictures."""
    return main("train")


def generate() -> int:
    """`vgm-generate`: draw pictures with a base model, deltas and side networks."""
    return main("generate")


def delta() -> int:
    """`vgm-delta`: look into delta files and write them for other tools."""
    return main("delta")


def studio() -> int:
    """`vgm-studio`: the same in a browser."""
    return main("studio")


def bench() -> int:
    """`vgm-bench`: compare methods by what they learn."""
    return main("bench")
