"""Words on live pipelines: stock calls understand them, training moves only them, and nothing stays behind."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from tests.contract.ground import base_of
from vgm_peft.delta import Word
from vgm_peft.errors import DeltaError
from vgm_peft.families import TABLE
from vgm_peft.family import Base
from vgm_peft.words import WordAttachment, new_word, text_embeddings


@pytest.fixture(params=sorted(TABLE))
def base(request: pytest.FixtureRequest) -> Base:
    return base_of(request.param)


def word(base: Base, token: str, vectors: int, seed: int = 0) -> Word:
    generator = torch.Generator().manual_seed(seed)
    widths = {part: e.embedding_dim for part, e in text_embeddings(base.pipe).items()}
    return Word(token, {part: 0.02 * torch.randn(vectors, width, generator=generator) for part, width in widths.items()})


def picture(pipe: Any, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, num_inference_steps=2, height=64, width=64, output_type="pt", generator=generator).images


def state(base: Base) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": v.clone() for part, m in base.parts.items() for k, v in m.state_dict().items()}


def hooks(base: Base) -> int:
    embeddings = text_embeddings(base.pipe).values()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in embeddings)  # pyright: ignore


def tokenizers(base: Base) -> list[Any]:
    return [v for k, v in base.pipe.components.items() if k.startswith("tokenizer")]


@pytest.mark.parametrize("vectors", [1, 3])
def test_stock_pipelines_draw_what_diffusers_own_loading_draws(base: Base, vectors: int) -> None:
    trained = word(base, "<toy>", vectors)
    theirs: Any = base.family.tiny()
    theirs.set_progress_bar_config(disable=True)
    for part, rows in trained.rows.items():
        suffix = part.removeprefix("text_encoder")
        names = [trained.token, *(f"{trained.token}_{i}" for i in range(1, vectors))]
        encoder, tokenizer = getattr(theirs, part), getattr(theirs, f"tokenizer{suffix}")
        # A stack of several rows under one token is what diffusers itself splits into `tok`, `tok_1`, ...
        theirs.load_textual_inversion(
            {names[0]: rows.squeeze(0) if vectors == 1 else rows}, text_encoder=encoder, tokenizer=tokenizer
        )
    prompt = "a photo of <toy> on <toy> grass"
    expected = picture(theirs, prompt)
    before = picture(base.pipe, prompt)
    with WordAttachment(base.pipe, [trained]):
        torch.testing.assert_close(picture(base.pipe, prompt), expected, rtol=0, atol=1e-6)
        ours = base.family.encode_prompt(base, [prompt, "<toy>"])
        stock = base.pipe.encode_prompt(  # pyright: ignore
            prompt=[prompt, "<toy>"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert torch.equal(ours.hidden, stock[0])
    assert (before - expected).abs().max() > 1e-4, "the word means something"
    assert torch.equal(picture(base.pipe, prompt), before)


def test_nothing_stays_behind(base: Base) -> None:
    before, objects, count = state(base), tokenizers(base), hooks(base)
    attachment = WordAttachment(base.pipe, [word(base, "<a>", 2), word(base, "<b>", 1, seed=1)])
    assert hooks(base) == count + 2 * len(text_embeddings(base.pipe))
    assert all(a is not b for a, b in zip(objects, tokenizers(base), strict=True))
    assert "<a>" not in objects[0].get_vocab()
    inside = state(base)
    assert inside.keys() == before.keys() and all(torch.equal(before[k], v) for k, v in inside.items())
    attachment.remove()
    attachment.remove()
    assert hooks(base) == count and all(a is b for a, b in zip(objects, tokenizers(base), strict=True))
    assert all(torch.equal(before[k], v) for k, v in state(base).items())


def test_training_moves_the_rows_and_nothing_else(base: Base) -> None:
    before = state(base)
    with WordAttachment(base.pipe, [new_word(base.pipe, "<toy>", "robot", 2)], trainable=True) as attachment:
        optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
        start = attachment.words()["<toy>"]
        condition = base.family.encode_prompt(base, ["a photo of <toy>", "no word at all"])
        condition.hidden.square().mean().backward()
        assert all(p.grad is not None and (p.grad.abs().sum(1) > 0).all() for p in attachment.parameters())
        optimizer.step()
        after = attachment.words()["<toy>"]
        assert all(not torch.equal(start.rows[part], after.rows[part]) for part in start.rows)
        plain = base.family.encode_prompt(base, ["no word at all"]).hidden
        assert not any(p.grad is not None for part in base.parts.values() for p in part.parameters())
    assert torch.equal(plain, base.family.encode_prompt(base, ["no word at all"]).hidden)
    assert all(torch.equal(before[k], v) for k, v in state(base).items())


def test_a_new_word_begins_as_the_text_it_is_like(base: Base) -> None:
    expected = base.family.encode_prompt(base, ["a photo of robot duck robot"])
    with WordAttachment(base.pipe, [new_word(base.pipe, "<toy>", "robot duck", 3)]):
        ours = base.family.encode_prompt(base, ["a photo of <toy>"])
    assert torch.equal(ours.hidden, expected.hidden)
    with pytest.raises(DeltaError, match="at least one"):
        new_word(base.pipe, "<toy>", "   ")


def test_several_attachments_come_and_go_in_any_order(base: Base) -> None:
    def encode(text: str) -> torch.Tensor:
        return base.family.encode_prompt(base, [text]).hidden

    words = [word(base, token, n, seed=n) for token, n in (("<a>", 1), ("<b>", 2), ("<c>", 1))]
    alone: dict[str, torch.Tensor] = {}
    for w in words:
        with WordAttachment(base.pipe, [w]):
            alone[w.token] = encode(f"a {w.token} on grass")
    objects = tokenizers(base)
    a, b, c = (WordAttachment(base.pipe, [w]) for w in words)
    for leaving, rest in ((a, ("<b>", "<c>")), (c, ("<b>",)), (b, ())):
        leaving.remove()
        for token in rest:
            assert torch.equal(encode(f"a {token} on grass"), alone[token])
    assert all(x is y for x, y in zip(objects, tokenizers(base), strict=True)) and hooks(base) == 0


def test_pipelines_that_share_their_parts_share_the_desk() -> None:
    base = base_of("sd15")
    family = base.family
    other: Any = StableDiffusionImg2ImgPipeline(**base.pipe.components, requires_safety_checker=False)
    twin = Base(other, family, "twin")
    a, b = word(base, "<a>", 1, seed=1), word(base, "<b>", 1, seed=2)
    with WordAttachment(base.pipe, [a]):
        expected = family.encode_prompt(base, ["<a>"]).hidden
    with WordAttachment(base.pipe, [a]), WordAttachment(other, [b]):
        assert torch.equal(family.encode_prompt(base, ["<a>"]).hidden, expected)
        assert torch.equal(family.encode_prompt(twin, ["<a>"]).hidden, expected)
        assert not torch.equal(family.encode_prompt(twin, ["<b>"]).hidden, expected)
    assert other.tokenizer is base.pipe.tokenizer and hooks(base) == 0  # pyright: ignore


def test_a_pipeline_with_words_is_collected(base: Base) -> None:
    import gc
    import weakref

    family = base.family
    pipe = family.tiny()
    WordAttachment(pipe, [word(base, "<a>", 1)])
    encoder = weakref.ref(pipe.components["text_encoder"])
    del pipe
    gc.collect()
    assert encoder() is None


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["robot"], "already a word of the base"),
        (["r"], "already a word of the base"),
        (["<a b>"], "without spaces"),
        ([""], "without spaces"),
        (["<a>", "<a>"], "clash"),
        (["<a>", "<a>_1"], "clash"),
        (["<a>_1", "<a>"], "clash"),
        (["<A>", "<a>"], "does not read"),
    ],
)
def test_tokens_that_cannot_be(base: Base, tokens: list[str], message: str) -> None:
    before, objects = hooks(base), tokenizers(base)
    with pytest.raises(DeltaError, match=message):
        WordAttachment(base.pipe, [word(base, token, 1) for token in tokens])
    assert hooks(base) == before and all(a is b for a, b in zip(objects, tokenizers(base), strict=True))


def test_a_clash_across_attachments_leaves_the_first_alone(base: Base) -> None:
    with WordAttachment(base.pipe, [word(base, "<a>", 1)]):
        objects = tokenizers(base)
        with pytest.raises(DeltaError, match="clash"):
            WordAttachment(base.pipe, [word(base, "<a>", 2)])
        assert all(a is b for a, b in zip(objects, tokenizers(base), strict=True))


def test_words_of_another_family(base: Base) -> None:
    for name in TABLE:
        if name == base.family.name:
            continue
        theirs = word(base_of(name), "<toy>", 1)
        with pytest.raises(DeltaError, match="family"):
            WordAttachment(base.pipe, [theirs])
    good = word(base, "<toy>", 2)
    part = next(iter(good.rows))
    with pytest.raises(DeltaError, match="rows of"):
        WordAttachment(base.pipe, [Word("<toy>", {**good.rows, part: good.rows[part][:, :-1]})])
    if len(good.rows) > 1:
        with pytest.raises(DeltaError, match="same number"):
            WordAttachment(base.pipe, [Word("<toy>", {**good.rows, part: good.rows[part][:1]})])
    assert hooks(base) == 0


def test_no_words_is_no_change(base: Base) -> None:
    objects = tokenizers(base)
    with WordAttachment(base.pipe, []):
        assert hooks(base) == 0 and tokenizers(base)[0] is objects[0]
