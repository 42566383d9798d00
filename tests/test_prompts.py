"""Prompts as people write them: emphasis, further windows, trained words anywhere; plain ones as stock pipelines read them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contract.ground import base_of
from tests.stack_makers import make_word
from vgm_peft.delta import Delta
from vgm_peft.families import TABLE
from vgm_peft.families.prompts import emphasis, read, weighed, windows
from vgm_peft.family import Base
from vgm_peft.stack import DeltaUse, Stack, generate
from vgm_peft.words import WordAttachment

LONG = ", ".join(["a robot", "a duck", "a house"] * 11)


@pytest.fixture(params=sorted(TABLE))
def base(request: pytest.FixtureRequest) -> Base:
    return base_of(request.param)


def hidden(base: Base, *prompts: str, syntax: bool = True) -> Tensor:
    with torch.no_grad():
        return base.family.encode_prompt(base, prompts, syntax).hidden


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a plain prompt: 12, 3.5", [("a plain prompt: 12, 3.5", 1.0)]),
        ("", []),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(once)", [("once", 1.1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("[less] of it", [("less", 1 / 1.1), (" of it", 1.0)]),
        ("(a:1.5)", [("a", 1.5)]),
        ("(a:.5) (b: -2 )", [("a", 0.5), (" ", 1.0), ("b", -2.0)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2.0)]),
        ("(a (house:1.3) [on] a", [("a ", 1.1), ("house", 1.1 * 1.3), (" ", 1.1), ("on", 1.1 / 1.1), (" a", 1.1)]),
        ("[never closed", [("never closed", 1 / 1.1)]),
        (r"\(literal\] \\ \x", [(r"(literal] \ x", 1.0)]),
        ("a) b] c:1.5)", [("a) b] c:1.5)", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]),
    ],
)
def test_emphasis_reads_as_elsewhere(prompt: str, pieces: list[tuple[str, float]]) -> None:
    found = emphasis(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize("negative", ["", "blurry, small"])
def test_a_short_plain_prompt_is_told_as_the_stock_pipeline_tells_it(base: Base, negative: str) -> None:
    pipe: Any = base.pipe
    ours = base.family.prompting(base, "a photo of a robot", negative)
    stock = pipe.encode_prompt(
        prompt="a photo of a robot",
        negative_prompt=negative or None,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, theirs in zip(names, stock, strict=False):
        given = ours.get(name)
        assert torch.equal(theirs, torch.zeros_like(theirs) if given is None else given), name
    assert ours.keys() <= set(names[: len(stock)])


def test_weights_multiply_states_and_the_mean_is_brought_back() -> None:
    states = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = torch.tensor([1.0, 2.0, 1.0, 0.5])
    expected = states * weights[:, None] * (states.mean() / (states * weights[:, None]).mean())
    assert torch.equal(weighed(states, weights), expected)
    assert weighed(states, torch.ones(4)) is states
    centred = states - states.mean(-1, keepdim=True)  # as a bare LayerNorm leaves them: a ratio of two roundings otherwise
    assert torch.equal(weighed(centred, weights), centred * weights[:, None])


def test_emphasis_reaches_the_states_of_its_words_alone(base: Base) -> None:
    plain, strong = hidden(base, "a red robot"), hidden(base, "a (red:1.5) robot")
    assert torch.equal(hidden(base, r"a \(red\) robot"), hidden(base, "a (red) robot", syntax=False))
    ratio = (strong / plain).median(-1).values[0]  # the mean is brought back by one factor for all
    assert ratio[2 : 2 + len(read(base.pipe.tokenizer, "red"))] == pytest.approx(1.5 * float(ratio[0]), rel=1e-4)
    assert float(ratio[-1]) == pytest.approx(float(ratio[0]), rel=1e-4)


def test_long_prompts_go_on_in_further_windows(base: Base) -> None:
    tokenizer: Any = base.pipe.tokenizer
    length = tokenizer.model_max_length
    cut = windows(tokenizer, read(tokenizer, LONG), length - 2)
    assert len(cut) == 2 and sum(map(len, cut)) == len(read(tokenizer, LONG))
    comma = tokenizer(",", add_special_tokens=False).input_ids
    assert [cut[0][-1].id] == comma and len(cut[0]) > length - 2 - 20
    both = base.family.encode_prompt(base, [LONG, "blurry"], syntax=True)
    assert both.hidden.shape[:2] == (2, 2 * length)
    texts = [tokenizer.decode([token.id for token in window]) for window in cut]
    assert torch.equal(both.hidden[:1], torch.cat([hidden(base, text, syntax=False) for text in texts], dim=1))
    assert torch.equal(both.hidden[1:], torch.cat([hidden(base, text, syntax=False) for text in ("blurry", "")], dim=1))
    if both.pooled is not None:
        first = base.family.encode_prompt(base, texts[:1]).pooled
        assert first is not None and torch.equal(both.pooled[:1], first)
    assert base.family.encode_prompt(base, [LONG]).hidden.shape[1] == length, "a caption is cut, as stock pipelines do"


def test_a_trained_word_is_never_cut_in_two(base: Base) -> None:
    tokenizer: Any
    with WordAttachment(base.pipe, [make_word(base, "<toy>", 9)]):
        tokenizer = base.pipe.tokenizer
        room = tokenizer.model_max_length - 2
        fill = len(read(tokenizer, "robot "))
        tokens = read(tokenizer, "robot " * ((room - 4) // fill) + "<toy> robot")
        first, second = windows(tokenizer, tokens, room)
        assert len(first) < room and tokenizer.convert_ids_to_tokens(second[0].id) == "<toy>" and len(second) == 9 + fill


def test_words_in_prompts_batches_and_negative_prompts(base: Base) -> None:
    word = make_word(base, "<toy>", 3)
    bare = base.family.prompting(base, "a robot", "a <toy>")
    with WordAttachment(base.pipe, [word]):
        alone = [hidden(base, text) for text in ("a <toy> on grass", "a robot")]
        assert torch.equal(hidden(base, "a <toy> on grass", "a robot"), torch.cat(alone))
        together = hidden(base, "a <toy> on grass", "a robot", syntax=False)
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
        strong, plain = hidden(base, "a (<toy>:1.4) on grass"), alone[0]
        ratio = (strong / plain).median(-1).values[0]
        assert ratio[2:5] == pytest.approx(1.4 * float(ratio[0]), rel=1e-4), "all its vectors, and nothing else"
        assert float(ratio[5]) == pytest.approx(float(ratio[0]), rel=1e-4)
        told = base.family.prompting(base, "a robot", "a <toy>")
        assert torch.equal(told["prompt_embeds"], bare["prompt_embeds"])
        assert not torch.equal(told["negative_prompt_embeds"], bare["negative_prompt_embeds"])


def test_a_stack_draws_what_its_syntax_says(base: Base) -> None:
    delta = Delta(base.family.name, words={"<toy>": make_word(base, "<toy>", 2)})

    def drawn(prompt: str, negative: str = "") -> np.ndarray:
        stack = Stack(prompt=prompt, negative=negative, steps=2, guidance=3.0, scheduler="ddim", deltas=(DeltaUse(file="a"),))
        return np.asarray(generate(base, stack, given={"a": delta})[0].image)

    plain = drawn("a robot")
    assert not np.array_equal(drawn("a robot", "<toy>"), plain), "a word of what to avoid"
    assert not np.array_equal(drawn("a (robot:1.6)"), plain)
    assert not np.array_equal(drawn(LONG), drawn(LONG[:40])), "what stands behind the first window counts"
