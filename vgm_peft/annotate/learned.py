"""The detectors of `controlnet_aux` 0.0.10, each behind a name of its own.

The package imports all of its detectors, and all that any of them needs, at once; here only the one that is asked for is
imported. Its weights are looked for in a folder or fetched from the hub (never where the hub is said to be offline) before
the package is let near them, so that their bytes are known.

Three of its detectors are left out: DWPose fetches from addresses of its own, LeReS reads the command line, and the content
shuffle makes another picture every time.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from vgm_peft.digests import digest_of_file, digest_of_files
from vgm_peft.errors import ConfigError, DataError
from vgm_peft.folders import HUB_ID, first_line

PACKAGE = "controlnet_aux"
INSTALL = "pip install 'vgm_peft[controlnet]'"
AUTHORS = "lllyasviel/Annotators"
_STEP, _SIDE = 64, 512
"""Detectors look at pictures whose sides are multiples of this, and at none smaller than that."""
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Detector:
    """Where a detector is, the files of its weights (within a repository), and how it is called."""

    module: str
    kind: str
    files: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    weights: str = AUTHORS
    sizes: tuple[str, ...] = ("detect_resolution", "image_resolution")


_HED, _PIDI = ("ControlNetHED.pth",), ("table5_pidinet.pth",)
_LINES, _POSE = ("sk_model.pth", "sk_model2.pth"), ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth")
_FINE = ("detect_resolution",)
TABLE: Mapping[str, Detector] = {
    "depth": Detector("midas", "MidasDetector", ("dpt_hybrid-midas-501f0c75.pt",)),
    "depth-zoe": Detector("zoe", "ZoeDetector", ("ZoeD_M12_N.pt",)),
    "normals": Detector("normalbae", "NormalBaeDetector", ("scannet.pt",)),
    "lineart": Detector("lineart", "LineartDetector", _LINES),
    "lineart-coarse": Detector("lineart", "LineartDetector", _LINES, {"coarse": True}),
    "lineart-anime": Detector("lineart_anime", "LineartAnimeDetector", ("netG.pth",)),
    "softedge-hed": Detector("hed", "HEDdetector", _HED),
    "softedge-pidinet": Detector("pidi", "PidiNetDetector", _PIDI),
    "scribble-hed": Detector("hed", "HEDdetector", _HED, {"scribble": True}),
    "scribble-pidinet": Detector("pidi", "PidiNetDetector", _PIDI, {"scribble": True}),
    "teed": Detector("teed", "TEEDdetector", ("5_model.pth",), {}, "fal-ai/teed", ("detect_resolution",)),
    "anyline": Detector(
        "anyline", "AnylineDetector", ("Anyline/MTEED.pth",), {}, "TheMistoAI/MistoLine", ("detect_resolution",)
    ),
    "mlsd": Detector("mlsd", "MLSDdetector", ("mlsd_large_512_fp32.pth",)),
    "openpose": Detector("open_pose", "OpenposeDetector", _POSE),
    "openpose-face": Detector("open_pose", "OpenposeDetector", _POSE, {"include_face": True}),
    "openpose-hand": Detector("open_pose", "OpenposeDetector", _POSE, {"include_hand": True}),
    "openpose-full": Detector("open_pose", "OpenposeDetector", _POSE, {"include_hand": True, "include_face": True}),
    "segments": Detector(
        "segment_anything", "SamDetector", ("checkpoints/sam_vit_h_4b8939.pth",), {}, "ybelkada/segment-anything"
    ),
    "face": Detector("mediapipe_face", "MediapipeFaceDetector"),
}


def open_detector(name: str, weights: str, device: str) -> tuple[str, Callable[[Pixels], Pixels]]:
    """Return what decides what a detector draws, and the detector as a function of a picture; see `open_annotator`."""
    detector = TABLE[name]
    if weights and not detector.files:
        raise ConfigError(f'weights "{weights}" of {name}', expected="none: it brings its own")
    kind = _imported(name, detector)
    paths = _weights(name, detector, weights or detector.weights)
    try:
        made = kind.from_pretrained(str(paths[0].parent)) if paths else kind()
        made = made.to(device) if hasattr(made, "to") else made
    except Exception as error:  # whatever the package makes of a file that is cut, another's, or more than tensors
        raise DataError(f"the weights of {name} cannot be loaded ({first_line(error)})", fix="fetch them anew") from error
    code, settings = digest_of_file(Path(__file__))[:16], dict(detector.options)
    return f"{code}, {PACKAGE} {_version()}, {settings}, weights {digest_of_files(paths)}", _drawer(made, detector)


def _drawer(made: Any, detector: Detector) -> Callable[[Pixels], Pixels]:
    def draw(picture: Pixels) -> Pixels:
        from PIL import Image

        side = max(_SIDE, -(-min(picture.shape[:2]) // _STEP) * _STEP)
        told = {**detector.options, **dict.fromkeys(detector.sizes, side)}
        drawn: Image.Image = made(Image.fromarray(picture), output_type="pil", **told)
        size = (picture.shape[1], picture.shape[0])
        drawn = drawn.convert("RGB")
        return np.array(drawn if drawn.size == size else drawn.resize(size, Image.Resampling.LANCZOS))

    return draw


def _imported(name: str, detector: Detector) -> Any:
    """Import the module of one detector. Raises `ConfigError` when the package, or what the detector needs, is missing."""
    if (spec := importlib.util.find_spec(PACKAGE)) is None:
        raise ConfigError(f"annotator {name} is one of {PACKAGE}, which is not installed", fix=INSTALL)
    try:
        with _hollow(list(spec.submodule_search_locations or ())):
            module = importlib.import_module(f"{PACKAGE}.{detector.module}")
    except ImportError as error:
        raise ConfigError(f"annotator {name} cannot be imported ({first_line(error)})", fix=INSTALL) from error
    return getattr(module, detector.kind)


@contextmanager
def _hollow(folders: list[str]) -> Generator[None]:
    """Have the package be nothing but its folders for a while, unless it has been imported whole already."""
    if PACKAGE in sys.modules:
        yield
        return
    package = ModuleType(PACKAGE)
    package.__path__ = folders
    sys.modules[PACKAGE] = package
    try:
        yield
    finally:
        del sys.modules[PACKAGE]


def _weights(name: str, detector: Detector, place: str) -> list[Path]:
    """The files of a detector's weights, in a folder or from the hub. Raises `DataError` for one that is not there."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        found = [next((p for p in (folder / file, folder / Path(file).name) if p.is_file()), None) for file in detector.files]
        missing = [file for file, path in zip(detector.files, found, strict=True) if path is None]
        if missing:
            raise DataError(f"{place}: no {missing[0]} there", expected=f"the weights of {name}: {', '.join(detector.files)}")
        return [path for path in found if path is not None]
    if detector.files and not HUB_ID.fullmatch(place):
        raise DataError(f'weights "{place}" of {name}: no such folder', expected=f"a folder, or a hub id ({AUTHORS})")
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(place, file)) for file in detector.files]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{place}: the weights of {name} cannot be fetched ({first_line(error)})",
            fix="go online, or name a folder that holds them: --set data.annotator_weights=DIR",
        ) from error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"
