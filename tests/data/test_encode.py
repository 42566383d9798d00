import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.data.makers import save
from vgm_peft.data import Cache, Crop, Encoded, Example, encode_images, encode_prompts, plan_crops, scan
from vgm_peft.errors import BaseModelError, DataError
from vgm_peft.family import Base, Condition

Tiny = Callable[[str], Base]


class Counting(Cache):
    """A cache that counts what was not found in it."""

    made = 0

    def put(self, key: str, tensors: "dict[str, torch.Tensor]") -> None:  # type: ignore[override]
        self.made += 1
        super().put(key, tensors)


def folder(tmp_path: Path, count: int = 3) -> tuple[list[Example], list[Crop]]:
    for index in range(count):
        save(tmp_path / "in" / f"{index}.png", 70, 64 + 60 * (index % 2), index)
    examples = list(scan(tmp_path / "in").examples)
    return examples, plan_crops([(e.width, e.height) for e in examples], 64, 32)


def equal(a: Encoded, b: Encoded) -> bool:
    return torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) and a.sizes == b.sizes


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_hit_is_bit_equal_to_fresh(tiny: Tiny, tmp_path: Path, family: str) -> None:
    base = tiny(family)
    examples, crops = folder(tmp_path)
    cache = Counting(tmp_path / "cache")
    told: list[tuple[int, int]] = []
    fresh = encode_images(base, examples, crops, cache, progress=lambda done, of: told.append((done, of)))
    assert cache.made == 3 and told == [(1, 3), (2, 3), (3, 3)]
    again = encode_images(base, examples, crops, cache)
    bare = encode_images(base, examples, crops, Cache(enabled=False))
    assert cache.made == 3
    assert all(map(equal, fresh, again)) and all(map(equal, fresh, bare))
    factor = base.latent_factor
    assert [tuple(e.mean.shape[1:]) for e in fresh] == [(c.target[1] // factor, c.target[0] // factor) for c in crops]
    assert fresh[0].mean.dtype == fresh[0].std.dtype == torch.float32 and (fresh[0].std > 0).all()


def test_only_the_edited_picture_is_encoded_again(tiny: Tiny, tmp_path: Path) -> None:
    base, cache = tiny("sd15"), Counting(tmp_path / "cache")
    before = encode_images(base, *folder(tmp_path), cache)
    save(tmp_path / "in" / "1.png", 70, 124, 99)
    examples = list(scan(tmp_path / "in").examples)
    crops = plan_crops([(e.width, e.height) for e in examples], 64, 32)
    after = encode_images(base, examples, crops, cache)
    assert cache.made == 4
    assert [equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_everything_that_decides_a_latent_is_in_its_key(tiny: Tiny, tmp_path: Path) -> None:
    base, cache = tiny("sd15"), Counting(tmp_path / "cache")
    (example, *_), (crop, *_) = folder(tmp_path, 1)

    def misses(base: Base, crop: Crop = crop, flip: bool = False) -> bool:
        before = cache.made
        encode_images(base, [example], [crop], cache, flip=flip)
        return cache.made > before

    assert misses(base) and not misses(base)
    assert misses(base, flip=True)
    assert misses(base, dataclasses.replace(crop, left=crop.left + 1))
    assert misses(base, dataclasses.replace(crop, scaled=(crop.scaled[0] + 2, crop.scaled[1])))
    assert misses(base, plan_crops([crop.original], 96, 32)[0])
    other = tiny("sd15")
    assert not misses(other)
    weight = next(other.pipe.vae.parameters())
    weight.data.view(-1)[0] += 1e-3
    assert misses(other)
    rescaled = tiny("sd15")
    rescaled.pipe.vae.register_to_config(scaling_factor=0.5)
    assert misses(rescaled)
    half = tiny("sd15")
    half.pipe.vae.to(torch.bfloat16)
    assert misses(half)


def test_mirrored_pictures_are_encoded_mirrored(tiny: Tiny, tmp_path: Path) -> None:
    base, cache = tiny("sd15"), Cache(tmp_path / "cache")
    image = save(tmp_path / "in" / "a.png", 64, 64)
    example = scan(tmp_path / "in").examples[0]
    crop = plan_crops([(64, 64)], 64, 32)[0]
    flipped = encode_images(base, [example], [crop], cache, flip=True)[0]
    from PIL import Image

    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    mirrored = encode_images(base, [scan(tmp_path / "in").examples[0]], [crop], cache)[0]
    assert torch.equal(flipped.mean, mirrored.mean)


def test_pictures_are_joined_to_a_batch(tiny: Tiny, tmp_path: Path) -> None:
    examples, crops = folder(tmp_path, 3)
    encoded = encode_images(tiny("sdxl"), examples[::2], crops[::2], Cache(tmp_path / "cache"))
    posterior, sizes = Encoded.batch(encoded)
    assert posterior.mean.shape == (2, *encoded[0].mean.shape)
    assert sizes.shape == (2, 6) and tuple(sizes[0].tolist()) == crops[0].sizes()


def test_values_that_are_not_finite_are_named_and_never_kept(tiny: Tiny, tmp_path: Path) -> None:
    base, cache = tiny("sd15"), Counting(tmp_path / "cache")
    base.pipe.vae.quant_conv.bias.data.fill_(float("nan"))
    with pytest.raises(BaseModelError, match=r"not finite for 0\.png in torch\.float32"):
        encode_images(base, *folder(tmp_path), cache)
    assert cache.made == 0


def test_a_file_edited_between_scan_and_encoding_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    examples, crops = folder(tmp_path)
    save(examples[1].path, 70, 124, seed=5)
    with pytest.raises(DataError, match=r"1\.png has changed"):
        encode_images(tiny("sd15"), examples, crops, Cache(tmp_path / "cache"))


def close(a: Condition, b: Condition) -> bool:
    pooled = a.pooled is b.pooled or (a.pooled is not None and b.pooled is not None and torch.equal(a.pooled, b.pooled))
    return torch.equal(a.hidden, b.hidden) and pooled


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_prompts_are_kept_exactly(tiny: Tiny, tmp_path: Path, family: str) -> None:
    base, cache = tiny(family), Counting(tmp_path / "cache")
    texts = ["a cat", "", "a cat ", "a cat", "\u00e9", "e\u0301"]
    fresh = encode_prompts(base, texts, cache)
    assert list(fresh) == ["a cat", "", "a cat ", "\u00e9", "e\u0301"] and cache.made == 5
    again = encode_prompts(base, reversed(texts), cache)
    assert cache.made == 5
    for text, condition in fresh.items():
        assert len(condition) == 1 and close(condition, again[text])
        assert close(condition, base.family.encode_prompt(base, [text]))
        assert not condition.hidden.requires_grad


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_each_text_encoder_is_in_the_key(tiny: Tiny, tmp_path: Path, part: str) -> None:
    base, cache = tiny("sdxl"), Counting(tmp_path / "cache")
    encode_prompts(base, ["a cat"], cache)
    next(getattr(base.pipe, part).parameters()).data.view(-1)[0] += 1
    encode_prompts(base, ["a cat"], cache)
    assert cache.made == 2


def test_the_tokenizer_is_in_the_key(tiny: Tiny, tmp_path: Path) -> None:
    base, cache = tiny("sd15"), Counting(tmp_path / "cache")
    encode_prompts(base, ["a cat"], cache)
    base.pipe.tokenizer.add_tokens(["cat"])
    base.pipe.text_encoder.resize_token_embeddings(len(base.pipe.tokenizer))
    encode_prompts(base, ["a cat"], cache)
    assert cache.made == 2


def test_what_is_hooked_on_is_neither_kept_nor_looked_for(tiny: Tiny, tmp_path: Path) -> None:
    base, cache = tiny("sd15"), Counting(tmp_path / "cache")
    plain = encode_prompts(base, ["a cat"], cache)["a cat"]
    hook = base.pipe.text_encoder.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out + 1)
    changed = encode_prompts(base, ["a cat"], cache)["a cat"]
    assert cache.made == 1 and not torch.equal(plain.hidden, changed.hidden)
    hook.remove()
    assert close(encode_prompts(base, ["a cat"], cache)["a cat"], plain) and cache.made == 1


def test_dropout_is_off_while_encoding_and_back_after(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("sd15")
    base.pipe.text_encoder.train()
    base.pipe.text_encoder.get_input_embeddings().eval()
    for module in base.pipe.text_encoder.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    off = Cache(enabled=False)
    assert close(*(encode_prompts(base, ["a cat"], off)["a cat"] for _ in range(2)))
    assert base.pipe.text_encoder.training and not base.pipe.text_encoder.get_input_embeddings().training
