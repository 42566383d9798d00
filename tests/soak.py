"""What is too long for the suite: `python -m tests.soak kill --times 1000` kills real runs at random moments of their loops
and compares each, when it has ended, with the uninterrupted one, byte for byte.
"""

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.train.forge import Forge
from tests.train.ground import OWN, SMALL, paired_pictures
from tests.train.killed import SETTINGS
from tests.train.test_kill import killed_again_and_again
from vgm_peft.config import Table, merge
from vgm_peft.train.config import RunConfig, bind

ROUND = 10
"""Kills for one uninterrupted run to compare with."""


def kill(times: int, seed: int, names: Sequence[str]) -> None:
    """Kill `times` times, in rounds over the settings of these names."""
    done = 0
    with tempfile.TemporaryDirectory() as folder, Forge(Path(folder, "log.txt")) as forge:
        pictures = paired_pictures(Path(folder, "me"))
        for number in itertools.count():
            name, place = names[number % len(names)], Path(folder, str(number))

            def make(output: str, settings: Table = SETTINGS[name], place: Path = place) -> RunConfig:
                places: Table = {"data": {"images": str(pictures)}, "output": str(place / output), "task": {"name": "finetune"}}
                return bind(merge(SMALL, places, OWN["finetune"], settings))

            place.mkdir()
            kills = min(ROUND, times - done)
            ended = killed_again_and_again(forge, make, place, kills, seed + number)
            done += kills
            print(f"{done} kills: {ended} runs of {name} ended in the same bytes (seed {seed + number})", flush=True)
            if done >= times:
                return


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["kill"])
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=SETTINGS, help="one of the settings instead of all in turn; scored: a best step too")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    kill(args.times, args.seed, [args.only] if args.only else list(SETTINGS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
