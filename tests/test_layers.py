"""Words with rows of their own for every cross-attention, words that lead every prompt, and words that go by the same token."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contract.ground import base_of
from tests.stack_makers import make_delta, make_word
from vgm_peft import formats
from vgm_peft.delta import Delta, Word
from vgm_peft.desk import cross_attentions
from vgm_peft.errors import DeltaError
from vgm_peft.families import TABLE
from vgm_peft.family import Base
from vgm_peft.stack import DeltaUse, Stack, attach, generate
from vgm_peft.words import WordAttachment, layers_of, new_word, text_embeddings

PROMPT = "a photo of <toy> on grass"


@pytest.fixture(params=sorted(TABLE))
def base(request: pytest.FixtureRequest) -> Base:
    return base_of(request.param)


def layered(base: Base, token: str = "<toy>", vectors: int = 2, seed: int = 0) -> Word:
    """A word whose rows differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    rows = make_word(base, token, vectors).for_layers(layers_of(base.pipe)).rows
    return Word(token, {part: r * torch.rand(len(r), 1, 1, generator=generator) for part, r in rows.items()})


def of_layer(word: Word, layer: int) -> Word:
    return Word(word.token, {part: rows[layer] for part, rows in word.rows.items()})


def heard(base: Base, call: Any) -> list[Tensor]:
    """What each cross-attention is given while `call` runs, in the order of the forward."""
    out: list[Tensor] = []
    modules = [base.denoiser.get_submodule(name) for name in cross_attentions(base.denoiser)]
    hooks = [
        m.register_forward_pre_hook(lambda _, a, k: out.append(k["encoder_hidden_states"]), with_kwargs=True) for m in modules
    ]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return out


def drawn(pipe: Any, prompt: str = PROMPT, negative: str = "blurry") -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    side = {"width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 3.0}
    return pipe(prompt, negative_prompt=negative, output_type="np", generator=generator, **side).images[0]


def hooks(base: Base) -> int:
    parts = (m for part in base.parts.values() for m in part.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parts)  # pyright: ignore[reportPrivateUsage]


def test_every_cross_attention_hears_its_own_words(base: Base) -> None:
    pipe: Any = base.pipe
    word, count = layered(base), layers_of(base.pipe)
    drawn(pipe)  # transformers hooks an encoder at its first call that asks for hidden states
    before, plain = hooks(base), drawn(pipe)
    expected: list[list[Tensor]] = []
    for layer in (0, count // 2, count - 1):
        with WordAttachment(pipe, [of_layer(word, layer)]):
            expected.append(heard(base, lambda: drawn(pipe)))
    with WordAttachment(pipe, [word]):
        ours = heard(base, lambda: drawn(pipe))
        assert not np.array_equal(drawn(pipe), plain)
    assert len(ours) == count
    for layer, theirs in zip((0, count // 2, count - 1), expected, strict=True):
        torch.testing.assert_close(ours[layer], theirs[layer], rtol=0, atol=1e-5)
    assert (ours[0] - ours[-1]).abs().max() > 1e-3
    assert hooks(base) == before and np.array_equal(drawn(pipe), plain)


def test_layers_alike_are_one_word(base: Base) -> None:
    word = make_word(base, "<toy>", 2)
    with WordAttachment(base.pipe, [word]):
        expected = drawn(base.pipe)
    with WordAttachment(base.pipe, [word.for_layers(layers_of(base.pipe))]):
        np.testing.assert_allclose(drawn(base.pipe), expected, rtol=0, atol=1e-5)
        told = base.family.prompting(base, "a (<toy>:1.0) [x]", "blurry " * 90)
        assert told["prompt_embeds"].shape == told["negative_prompt_embeds"].shape


def test_gradients_reach_the_rows_of_every_layer_and_nothing_else(base: Base) -> None:
    from vgm_peft.family import Query

    tables = {part: e.weight.clone() for part, e in text_embeddings(base.pipe).items()}
    with WordAttachment(base.pipe, [layered(base), make_word(base, "<cup>", 1)], trainable=True) as words:
        optimiser = torch.optim.AdamW(words.parameters(), lr=1e-2, weight_decay=0.5)
        condition = base.family.encode_prompt(base, [PROMPT, "a <cup>"])
        plain = base.family.encode_prompt(base, ["no word"])
        assert (
            condition.hidden.shape[2]
            == plain.hidden.shape[2]
            == layers_of(base.pipe) * sum(t.shape[1] for t in tables.values())
        )
        noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        base.family.predict(base, Query(noisy, torch.tensor([10, 500]), condition)).square().mean().backward()
        for rows in words.parameters():
            assert rows.grad is not None and bool((rows.grad.abs().sum(-1) > 0).all())
        optimiser.step()
    assert all(torch.equal(e.weight, tables[part]) and e.weight.grad is None for part, e in text_embeddings(base.pipe).items())
    assert not any(p.grad is not None for part in base.parts.values() for p in part.parameters())


def test_states_that_were_made_before_are_spread_to_fit(base: Base) -> None:
    with torch.no_grad():
        before = base.family.encode_prompt(base, ["no word at all"])
        with WordAttachment(base.pipe, [layered(base)]) as words:
            assert torch.equal(words.spread(before.hidden), base.family.encode_prompt(base, ["no word at all"]).hidden)
            assert torch.equal(words.spread(words.spread(before.hidden)), words.spread(before.hidden))


def test_a_soft_prefix_leads_every_prompt_but_the_empty_one(base: Base) -> None:
    word = make_word(base, "<p>", 3)
    prompts = ["a photo of a robot", "", "very " * 90]
    with WordAttachment(base.pipe, [word]), torch.no_grad():
        expected = base.family.encode_prompt(base, ["<p> a photo of a robot", "", "<p> " + "very " * 90])
        strong = base.family.encode_prompt(base, ["<p> a (photo:1.3) of a robot"], syntax=True)
        long = base.family.encode_prompt(base, ["very " * 90], syntax=True)
    with WordAttachment(base.pipe, [Word("<p>", word.rows, leads=True)]), torch.no_grad():
        ours = base.family.encode_prompt(base, prompts)
        torch.testing.assert_close(ours.hidden, expected.hidden, rtol=0, atol=1e-5)
        again = base.family.encode_prompt(base, ["a (photo:1.3) of a robot"], syntax=True)
        torch.testing.assert_close(again.hidden, strong.hidden, rtol=0, atol=1e-5)
        further = base.family.encode_prompt(base, ["very " * 90], syntax=True)
        assert further.hidden.shape == long.hidden.shape, "room is kept in every window"
        assert not np.array_equal(drawn(base.pipe, "a robot", ""), drawn(base_of(base.family.name).pipe, "<p> a robot", ""))
    with torch.no_grad():
        assert torch.equal(ours.hidden[1], base.family.encode_prompt(base, [""]).hidden[0])


def test_native_files_keep_what_kind_of_word_it_is(base: Base, tmp_path: Path) -> None:
    words = {"<a>": layered(base, "<a>"), "<p>": Word("<p>", make_word(base).rows, leads=True), "<c>": make_word(base, "<c>")}
    path = formats.write(Delta(base.family.name, words=words), tmp_path / "words.safetensors", "native", base)
    found = formats.read(path, base).words
    assert {t: (w.leads, w.layers, w.vectors) for t, w in found.items()} == {
        t: (w.leads, w.layers, w.vectors) for t, w in words.items()
    }
    assert all(torch.equal(found[t].rows[part], rows) for t, w in words.items() for part, rows in w.rows.items())
    for kind in ("embedding", "kohya"):
        with pytest.raises(DeltaError, match="native"):
            formats.write(Delta(base.family.name, words=words), tmp_path / f"{kind}.safetensors", kind, base)


def test_a_word_of_other_layers_is_refused(base: Base) -> None:
    with pytest.raises(DeltaError, match="3 layers"):
        WordAttachment(base.pipe, [make_word(base).for_layers(3)])


# --- the same token twice


def test_the_later_of_two_words_with_one_token_gets_a_number(base: Base) -> None:
    deltas = {name: Delta(base.family.name, words={"<toy>": Word("<toy>", make_word(base).rows)}) for name in "abc"}
    for i, delta in enumerate(deltas.values()):
        delta.words["<toy>"].rows.update({part: rows * (i + 1) for part, rows in delta.words["<toy>"].rows.items()})

    def picture(prompt: str, *names: str) -> np.ndarray:
        stack = Stack(
            prompt=prompt, steps=2, guidance=3.0, scheduler="ddim", deltas=tuple(DeltaUse(file=name) for name in names)
        )
        said: list[str] = []
        image = generate(base, stack, given=deltas, tell=said.append)[0].image
        assert len(said) == len(names) - 1 and all(name in text for name, text in zip(names[1:], said, strict=True))
        return np.asarray(image)

    assert np.array_equal(picture("a <toy-2>", "a", "b", "c"), picture("a <toy>", "b"))
    assert np.array_equal(picture("a <toy-2>", "b", "a"), picture("a <toy>", "a")), "the stack's order decides"
    assert np.array_equal(picture("a <toy-3>", "a", "b", "c"), picture("a <toy>", "c"))
    with attach(base.pipe, deltas["a"]) as first, pytest.warns(UserWarning, match='is written "<toy-2>" in prompts'):
        with attach(base.pipe, deltas["b"]) as second:
            assert first.tokens == {"<toy>": "<toy>"} and second.tokens == {"<toy>": "<toy-2>"}


def test_deltas_of_patches_and_layered_words_meet_a_control_network(base: Base) -> None:
    """A ControlNet listens to the same prompts through layers of the same names."""
    from diffusers import AutoPipelineForText2Image, ControlNetModel
    from PIL import Image

    delta = make_delta(base)
    delta.words["<toy>"] = layered(base)
    network: Any = ControlNetModel.from_unet(base.pipe.unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).eval()
    pipe: Any = AutoPipelineForText2Image.from_pipe(base.pipe, controlnet=network)
    pipe.set_progress_bar_config(disable=True)
    with WordAttachment(base.pipe, delta.words.values(), beside=[network]):
        side = {"width": 64, "height": 64, "num_inference_steps": 1, "output_type": "np"}
        assert np.isfinite(pipe(PROMPT, image=Image.new("RGB", (64, 64)), **side).images[0]).all()


# --- where a word begins


def test_a_word_begins_as_it_is_asked_to(base: Base) -> None:
    rows = {part: e.weight for part, e in text_embeddings(base.pipe).items()}
    tokenizer: Any = base.pipe.tokenizer
    robot, duck = (tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("robot", "duck"))
    for part, table in rows.items():
        assert torch.equal(new_word(base.pipe, "<a>", "robot duck", 3).rows[part], table[[robot, duck, robot]])
        assert torch.equal(new_word(base.pipe, "<a>", "robot duck", 1).rows[part], table[[robot]])
        mean = table[[robot, duck]].mean(0, keepdim=True).expand(3, -1)
        assert torch.equal(new_word(base.pipe, "<a>", "robot duck", 3, mean=True).rows[part], mean)
        mixed = new_word(base.pipe, "<a>", "<rand-0.02> robot", 2, seed=1).rows[part]
        assert torch.equal(mixed[1], table[robot]) and 0.01 < float(mixed[0].std()) < 0.03
    with pytest.raises(DeltaError, match='does not know the word "xqzwv"'):
        new_word(base.pipe, "<a>", "robot xqzwv")
    with pytest.raises(DeltaError, match="at most 75, which is all a prompt holds"):
        WordAttachment(base.pipe, [new_word(base.pipe, "<a>", "robot", 76)])
