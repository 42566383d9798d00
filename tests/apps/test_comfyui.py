"""The ComfyUI node, run against the least of ComfyUI's interface that it uses; ComfyUI itself cannot be installed here.

What is taken to be so (read in ComfyUI 0.3.64, comfy/model_patcher.py, comfy/lora.py, comfy/samplers.py, comfy/sd.py):

- a MODEL is a patcher: `model` (a module whose `diffusion_model` is the denoiser under its original names), `clone()`,
  `add_patches({key: (diff,)}, strength)`, where a tuple of one tensor means weight + strength * diff and unknown keys are
  passed over, `backup` (key -> object with the unpatched `weight`), `model_options` (copied deeply by `clone`),
  `get_model_object("model_sampling")` with `percent_to_sigma` and `timestep`, `set_model_unet_function_wrapper`;
- a CLIP has `clone()`, `add_patches` and `patcher`, of which `model` holds `clip_l.transformer.text_model...`;
- a wrapper is called as `wrapper(apply_model, {"input", "timestep" (sigmas), "c", "cond_or_uncond"})`;
- `folder_paths.get_filename_list` and `get_full_path` find files by kind.
"""

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.formats.ground import make_delta
from vgm_peft import formats
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.spelling import unet_spellings

PACK = Path(__file__).parents[2] / "apps" / "comfyui"
SITES = ["unet.mid_block.*to_?", "unet.mid_block.resnets.0.conv1"]


def tree(leaves: dict[str, nn.Module]) -> nn.Module:
    """The same modules under other names."""
    root = nn.Module()
    for path, leaf in leaves.items():
        *way, last = path.split(".")
        here = root
        for step in way:
            if not hasattr(here, step):
                here.add_module(step, nn.Module())
            here = getattr(here, step)
        here.add_module(last, leaf)
    return root


class Patcher:
    """A ModelPatcher by its interface."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.patches, self.backup = model, {}, {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> "Patcher":
        new = Patcher(self.model)
        new.patches = {key: list(value) for key, value in self.patches.items()}
        new.model_options, new.backup = deepcopy(self.model_options), self.backup
        return new

    def add_patches(self, patches: dict[str, tuple[Tensor]], strength: float = 1.0) -> list[str]:
        known = [key for key in patches if key in self.model.state_dict()]
        for key in known:
            self.patches.setdefault(key, []).append((strength, patches[key]))
        return known

    def weight(self, key: str) -> Tensor:
        """The patched weight, as `calculate_weight` makes it."""
        total = self.model.state_dict()[key].clone().float()
        for strength, (diff,) in self.patches.get(key, []):
            assert diff.shape == total.shape
            total += strength * diff.float()
        return total

    def set_model_unet_function_wrapper(self, wrapper: Callable[..., Tensor]) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def get_model_object(self, name: str) -> Any:
        assert name == "model_sampling"
        return SimpleNamespace(percent_to_sigma=lambda p: 14.6 * (1 - p) if p < 1 else 0.0, timestep=lambda s: s * 999 / 14.6)


class Clip:
    """A CLIP by its interface."""

    def __init__(self, patcher: Patcher) -> None:
        self.patcher = patcher

    def clone(self) -> "Clip":
        return Clip(self.patcher.clone())

    def add_patches(self, patches: dict[str, tuple[Tensor]], strength: float = 1.0) -> list[str]:
        return self.patcher.add_patches(patches, strength)


def leaves(root: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in root.named_modules() if next(m.parameters(recurse=False), None) is not None}


@pytest.fixture(scope="module")
def base(tiny: Callable[[str], Base]) -> Base:
    return tiny("sd15")


@pytest.fixture
def loaded(base: Base) -> tuple[Patcher, Clip]:
    """The tiny base as ComfyUI would hold it: the very same layers, under the original names."""
    unet = leaves(base.parts["unet"])
    names = unet_spellings(unet)
    model, texts = nn.Module(), nn.Module()
    model.add_module("diffusion_model", tree({names[name]: leaf for name, leaf in unet.items()}))
    encoder = {
        f"transformer.text_model.{n.removeprefix('text_model.')}": m for n, m in leaves(base.parts["text_encoder"]).items()
    }
    texts.add_module("clip_l", tree(encoder))
    return Patcher(model), Clip(Patcher(texts))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The node, its pack loaded as ComfyUI loads a folder of `custom_nodes`."""
    paths = ModuleType("folder_paths")
    paths.get_filename_list = lambda kind: sorted(p.name for p in tmp_path.glob("*.safetensors"))  # type: ignore[attr-defined]
    paths.get_full_path = lambda kind, name: str(tmp_path / name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    spec = importlib.util.spec_from_file_location("custom_vgm", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_vgm", module)
    spec.loader.exec_module(module)
    assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS)
    yield module.NODE_CLASS_MAPPINGS["VgmLoadDelta"]()
    for name in [name for name in sys.modules if name.startswith("custom_vgm.")]:
        del sys.modules[name]


def key_of(base: Base, name: str) -> str:
    part, _, rest = name.partition(".")
    module, _, tensor = rest.rpartition(".")
    if part == "unet":
        return f"diffusion_model.{unet_spellings(leaves(base.parts['unet']))[module]}.{tensor}"
    return f"clip_l.transformer.text_model.{rest}"


@pytest.mark.parametrize("kind", ("lora", "krona", "dora", "svdiff", "hra", "glora", "vera", "fourierft", "difffit"))
def test_every_kind_is_added_to_the_weights(
    kind: str, base: Base, loaded: tuple[Patcher, Clip], node: Any, tmp_path: Path
) -> None:
    sites = ["unet.mid_block.*"] if kind == "difffit" else [*SITES[:1], "text"]
    delta = make_delta(base, kind, sites, **({"frequencies": 9} if kind == "fourierft" else {}))
    formats.write(delta, tmp_path / "d.safetensors")
    assert node.INPUT_TYPES()["required"]["file"] == (["d.safetensors"],)
    model, clip = node.load(*loaded, "d.safetensors", 0.8, -0.5)
    assert not loaded[0].patches and not loaded[1].patcher.patches
    for name, patch in delta.patches.items():
        patcher, strength = (model, 0.8) if name.startswith("unet") else (clip.patcher, -0.5)
        weight = patcher.model.state_dict()[key_of(base, name)]
        expected = weight + strength * patch.change(weight).detach()
        assert torch.allclose(patcher.weight(key_of(base, name)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert len(model.patches) + len(clip.patcher.patches) == len(delta.patches)


def test_a_change_of_the_base_sees_the_unpatched_weight(
    base: Base, loaded: tuple[Patcher, Clip], node: Any, tmp_path: Path
) -> None:
    delta = make_delta(base, "svdiff", SITES[:1])
    formats.write(delta, tmp_path / "d.safetensors")
    name, patch = next(iter(delta.patches.items()))
    original = loaded[0].model.state_dict()[key_of(base, name)] * 2
    loaded[0].backup = {key_of(base, name): SimpleNamespace(weight=original)}
    model, _ = node.load(*loaded, "d.safetensors")
    ((_, (change,)),) = model.patches[key_of(base, name)]
    assert torch.allclose(change, patch.change(original).detach(), atol=1e-6)


def predict(base: Base, t: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy, hidden = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 4, 32, generator=generator)
    unet: Any = base.denoiser
    with torch.no_grad():
        return unet(noisy, torch.tensor([t]), encoder_hidden_states=hidden, return_dict=False)[0]


def sampled(model: Patcher, base: Base, sigma: float) -> Tensor:
    """One call of the model as a sampler makes it."""
    wrapper = model.model_options["model_function_wrapper"]
    given = {"input": torch.zeros(1), "timestep": torch.tensor([sigma]), "c": {}, "cond_or_uncond": [0]}
    return wrapper(lambda x, s, **c: predict(base, float(s) * 999 / 14.6), given)


def live(base: Base, delta: Delta, t: float, strength: float) -> Tensor:
    with Attachment(base.parts, delta, strength):
        return predict(base, t)


@pytest.mark.parametrize("kind", ("lora", "dora", "oft", "tlora"))
def test_a_range_of_the_sampling_acts_live(
    kind: str, base: Base, loaded: tuple[Patcher, Clip], node: Any, tmp_path: Path
) -> None:
    """Inside the range as an attachment does, outside as the base does, and nothing is left on the layers."""
    delta = make_delta(base, kind, SITES, **({"rank": 4} if kind == "tlora" else {})).train(False)
    formats.write(delta, tmp_path / "d.safetensors")
    model, _ = node.load(*loaded, "d.safetensors", 0.7, 1.0, 0.2, 0.6)
    model = model.clone()
    assert not model.patches
    for sigma in (14.0, 9.0, 7.0, 3.0):
        t, inside = sigma * 999 / 14.6, 14.6 * 0.4 <= sigma <= 14.6 * 0.8
        expected = live(base, delta, t, 0.7) if inside else predict(base, t)
        found = sampled(model, base, sigma)
        assert torch.allclose(found, expected, atol=1e-5)
        assert inside != torch.equal(found, predict(base, t))
    twice, _ = node.load(model, loaded[1], "d.safetensors", 0.3, 1.0, 0.2, 0.6)
    assert torch.allclose(sampled(twice, base, 7.0), live(base, delta, 7.0 * 999 / 14.6, 1.0), atol=1e-4)


def test_what_changes_with_the_timestep_is_live_over_the_whole_sampling(
    base: Base, loaded: tuple[Patcher, Clip], node: Any, tmp_path: Path
) -> None:
    delta = make_delta(base, "tlora", SITES, rank=4).train(False)
    formats.write(delta, tmp_path / "d.safetensors")
    model, _ = node.load(*loaded, "d.safetensors")
    for sigma in (14.0, 1.0):
        assert torch.allclose(sampled(model, base, sigma), live(base, delta, sigma * 999 / 14.6, 1.0), atol=1e-5)


def test_a_delta_of_another_base_is_refused(
    loaded: tuple[Patcher, Clip], node: Any, tiny: Callable[[str], Base], tmp_path: Path
) -> None:
    formats.write(make_delta(tiny("sdxl"), "lora", ["attention"], rank=1), tmp_path / "d.safetensors")
    with pytest.raises(DeltaError, match="have no place in this model"):
        node.load(*loaded, "d.safetensors")


def test_the_pack_imports_no_training_and_nothing_of_comfyui_at_import() -> None:
    """Nouns, deltas, families and formats; what of ComfyUI is needed is imported inside the node."""
    rooms = ("delta", "attachment", "errors", "families", "formats", "spelling")
    allowed = ("torch", *(f"vgm_peft.{room}" for room in rooms))
    for path in PACK.glob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.ImportFrom) and not statement.level:
                module = statement.module or ""
                assert module.startswith(allowed) or module in sys.stdlib_module_names or module == "collections.abc", module
            if isinstance(statement, ast.Import):
                assert all(a.name in (*sys.stdlib_module_names, "torch") for a in statement.names)
