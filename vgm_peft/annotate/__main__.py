"""`python -m vgm_peft.annotate canny photo.jpg control.png`: the control picture of one picture, to look at or to draw with."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vgm_peft.errors import VgmError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vgm_peft.annotate", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument(
        "annotator", metavar="NAME", help="canny, softedge, depth ...: all are in docs/data.md; canny,depth: side by side"
    )
    parser.add_argument("picture", type=Path, metavar="PICTURE", help="a PNG, JPEG, WebP or BMP file")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the PNG to write")
    parser.add_argument("--weights", default="", metavar="PLACE", help="folder or hub id (default: the authors')")
    parser.add_argument("--device", default="cpu", help="where a network computes (default: cpu)")
    args = parser.parse_args(arguments)
    try:
        print(_written(args.annotator, args.picture, args.output, args.weights, args.device))
    except VgmError as error:
        print(f"annotate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _written(name: str, picture: Path, output: Path, weights: str, device: str) -> str:
    import numpy as np
    from PIL import Image

    from vgm_peft.annotate import names_in, open_annotator
    from vgm_peft.data.pictures import decode, examine, read_bytes
    from vgm_peft.picture import write_image

    found = examine(picture)  # refuses what is no whole picture, or too large, before it is decoded
    pixels = np.array(decode(read_bytes(picture)))
    drawn = np.hstack([open_annotator(one, weights, device)(pixels) for one in names_in(name)])
    return f"{name} of {found.width} x {found.height} pixels in {write_image(Image.fromarray(drawn), output)}"


if __name__ == "__main__":
    raise SystemExit(main())
