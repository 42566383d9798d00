"""Draw with trained deltas and train new ones in a browser, on this machine and offline.

  vgm-studio
  vgm-studio --base ./models/sd15 --library ./loras --open

The page answers on 127.0.0.1 only. To reach it from other machines give an address and a password:

  vgm-studio --host 0.0.0.0 --auth me:a-long-password --name studio.example.org
"""

import argparse
from pathlib import Path

from vgm_peft.cli import Parser


def add_flags(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("--base", default="toybox", metavar="B", help="the base model, as in vgm-generate (default: toybox)")
    parser.add_argument(
        "--library",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of deltas and control networks; repeatable",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where trainings write (default: runs)")
    parser.add_argument(
        "--pictures", type=Path, default=Path("pictures"), metavar="DIR", help="where pictures go (default: pictures)"
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="what trainings begin from (default: the base's own recipe)"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="the address to serve on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="the port; 0 takes a free one (default: 7860)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these; needed for any address but this machine's own")
    parser.add_argument(
        "--name", action="append", default=[], metavar="HOST", help="a further host name to answer to; repeatable"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from vgm_peft.errors import ConfigError
    from vgm_peft.studio.settings import Settings, parse_auth

    settings = Settings(
        base=args.base,
        library=tuple(args.library),
        runs=args.runs,
        recipe=args.recipe,
        pictures=args.pictures,
        host=args.host,
        port=args.port,
        auth=parse_auth(args.auth) if args.auth else None,
        names=tuple(args.name),
    )
    for folder in settings.library:
        if not folder.is_dir():
            raise ConfigError(f"--library {folder}: no such folder")
    try:
        from vgm_peft.studio.app import build

        studio = build(settings)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ConfigError("the Studio needs gradio", fix="pip install 'vgm_peft[ui]'") from None
    studio.launch(browser=args.open)
    return 0
