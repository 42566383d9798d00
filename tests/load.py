"""Many clients at once, each with its own jobs, on a Studio with a tiny base: everyone gets the own picture, exactly once.

By hand: `python -m tests.load --clients 100 --jobs 5`. The suite does the same with fewer.
"""

import argparse
import os
import re
import resource
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="False")

FULL = re.compile("queue is full", re.IGNORECASE)


@dataclass
class Tally:
    """What came of all jobs."""

    files: Counter[str] = field(default_factory=Counter[str])
    refused: int = 0
    """How often a client was told to come back, since the queue was full."""
    wrong: list[str] = field(default_factory=list[str])
    seconds: float = 0.0


def load(address: str, clients: int, jobs: int, steps: int = 1) -> Tally:
    """Have so many clients draw so many pictures each, all at once; who finds the queue full comes back."""
    from gradio_client import Client

    tally, lock, begun = Tally(), threading.Lock(), time.monotonic()
    patient = {"timeout": 600.0}
    connected = [Client(address, verbose=False, analytics_enabled=False, httpx_kwargs=patient) for _ in range(clients)]

    def one(number: int) -> None:
        for job in range(jobs):
            told = _asked(connected[number], number * 1000 + job, steps, tally, lock)
            with lock:
                tally.wrong += told

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(clients)))
    tally.seconds = time.monotonic() - begun
    return tally


def _asked(client: Any, seed: int, steps: int, tally: Tally, lock: threading.Lock) -> list[str]:
    """Draw one picture of one's own, and say what is wrong with the answer."""
    from gradio_client.exceptions import AppError
    from gradio_client.utils import QueueError

    for again in range(10_000):
        try:
            found = client.predict(f"job {seed}", {}, {"steps": steps, "seed": seed}, api_name="/draw")
            break
        except (AppError, QueueError) as error:
            if not FULL.search(str(error)):
                return [f"{seed}: {error}"]
            with lock:
                tally.refused += 1
            time.sleep(0.05 * min(again + 1, 10))
    (file,), (text,) = found["files"], found["parameters"]
    with lock:
        tally.files[file] += 1
    from vgm_peft.picture import read_stack

    own = read_stack(Path(file))
    mine = (own.seed, own.prompt) == (seed, f"job {seed}") and f"Seed: {seed}," in text
    return [] if mine else [f"{seed}: got seed {own.seed}, {own.prompt!r}"]


def main() -> None:
    """Serve a tiny base, load it, and say how it went."""
    from vgm_peft.families import family_named
    from vgm_peft.studio.app import build
    from vgm_peft.studio.settings import Settings

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        family_named("sd15").tiny().save_pretrained(home / "base")
        studio = build(Settings(base=str(home / "base"), runs=home / "runs", pictures=home / "pictures", port=0))
        studio.launch(block=False)
        studio.engine.base()
        tally = load(f"http://127.0.0.1:{studio.page.server_port}", args.clients, args.jobs)
        kept = len(list((home / "pictures").glob("*.png")))
        studio.page.close()
        total, peak = args.clients * args.jobs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        once = sum(count == 1 for count in tally.files.values())
        print(f"{total} jobs of {args.clients} clients in {tally.seconds:.0f} s: {once} pictures once, {kept} files")
        print(f"{len(tally.wrong)} wrong, {tally.refused} told to come back, peak {peak:.0f} MiB of memory with the clients")
        print("\n".join(tally.wrong[:10]))


if __name__ == "__main__":
    main()
