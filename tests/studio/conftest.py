"""A Studio on a tiny base with two deltas and a control network, served once for all tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vgm_peft.studio.app import Studio

HOSTILE = "<img src=x onerror=window.__xss=1>"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Any]) -> Path:
    import torch

    import vgm_peft
    from tests.stack_makers import make_delta
    from vgm_peft.sides import side_named

    home = tmp_path_factory.mktemp("studio")
    base = tiny("sd15")
    base.pipe.save_pretrained(home / "base")
    for number, name in enumerate(("robot", "style", HOSTILE)):
        (home / "runs" / name).mkdir(parents=True)
        vgm_peft.write(make_delta(base, "lora", number), home / "runs" / name / "delta.safetensors", "native", base)
    side = side_named("controlnet")
    network = side.create(base, side.Options())
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    side.save(network, home / "runs" / "edges")
    return home


@pytest.fixture(scope="session")
def studio(home: Path) -> "Iterator[Studio]":
    from vgm_peft.studio.app import build
    from vgm_peft.studio.settings import Settings

    recipe = home / "quick.toml"
    recipe.write_text("[task]\nclass_images = 2\nclass_steps = 2\n[preview]\nsteps = 2\ncount = 1\n")
    studio = build(
        Settings(
            base=str(home / "base"),
            runs=home / "runs",
            recipe=recipe,
            pictures=home / "pictures",
            port=0,
            upload_bytes=1_000_000,
        )
    )
    studio.launch(block=False)
    yield studio
    studio.desk.close()
    for state in studio.desk.states():
        if not state.ended:
            studio.desk.stop(state.number)
    studio.page.close()


@pytest.fixture(scope="session")
def address(studio: "Studio") -> str:
    return f"http://127.0.0.1:{studio.page.server_port}"
