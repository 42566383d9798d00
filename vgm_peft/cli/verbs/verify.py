"""`vgm-delta verify`: is a delta file sound, and does it fit a base? Status 1 when not."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from vgm_peft.cli.verbs import Verbs, checkpoint


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = "Read delta files whole: every value finite, every tensor used, ranks, hashes. Status 1 when one is not sound."
    verb = verbs.add_parser("verify", help="check delta files", description=about)
    verb.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a delta of any tool, or the folder of a run")
    verb.add_argument("--base", metavar="B", help="a base on this disk that the deltas must fit")
    verb.add_argument("--json", action="store_true", help="print it as JSON")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check every file, whatever is wrong with the one before it."""
    from vgm_peft.tools.verify import verify

    base = checkpoint(args.base)
    verdicts = [verify(file, base) for file in args.files]
    if args.json:
        print(json.dumps([{**asdict(v), "sound": v.sound} for v in verdicts], indent=2))
    else:
        for verdict in verdicts:
            print(f"{verdict.file}: {'sound' if verdict.sound else 'NOT SOUND'}")
            print("\n".join([f"  ! {fault}" for fault in verdict.faults] + [f"  {note}" for note in verdict.notes]))
    return 0 if all(v.sound for v in verdicts) else 1
