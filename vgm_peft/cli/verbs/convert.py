"""`vgm-delta convert`: delta files rewritten in another format, one or many."""

import argparse
from pathlib import Path

from vgm_peft.cli.verbs import Verbs, bytes_in_words
from vgm_peft.cli.verbs.output import dtype_named
from vgm_peft.errors import ConfigError


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = "Rewrite deltas of any tool in another format, exactly; `export` does more for one tool."
    verb = verbs.add_parser("convert", help="rewrite deltas in another format", description=about)
    verb.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a delta of any tool, or the folder of a run")
    verb.add_argument("--to", metavar="FORMAT", default="native", help="native (the default), kohya, diffusers or embedding")
    verb.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the file, or for several the folder")
    verb.add_argument("--dtype", metavar="D", help="round the values: float32, float16 or bfloat16")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert one file after another."""
    from vgm_peft import formats

    target, out, dtype = formats.format_named(args.to), args.output, dtype_named(args.dtype)
    single = len(args.files) == 1 and out.suffix == ".safetensors"
    outputs: dict[Path, Path] = {}
    for file in args.files:
        parts = formats.files_of(file)
        outputs[out if single else out / f"{parts[0].stem if len(parts) == 1 else file.name}.safetensors"] = file
    if len(outputs) < len(args.files) or any(a.resolve() == formats.files_of(b)[0].resolve() for a, b in outputs.items()):
        raise ConfigError(f"--output {out}: two files of one name, or a file that is read", fix="choose another folder")
    for path, file in outputs.items():
        for written in formats.write_all(formats.read(file), path, target.name, dtype=dtype):
            print(f"{written}: {target.name}, {bytes_in_words(written.stat().st_size)}, read back and compared")
    return 0
