"""New words in training: alone, with the weights, in stages, layer by layer; nothing else moves; mistakes are told first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.train.ground import tiny_base
from vgm_peft.config import Table
from vgm_peft.delta import Delta
from vgm_peft.errors import VgmError
from vgm_peft.formats import read
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig
from vgm_peft.train.config_learning import OptimiserConfig
from vgm_peft.train.optim import keep_lengths, rest, set_rates
from vgm_peft.train.optimisers import build_optimiser
from vgm_peft.train.task import Group, Length
from vgm_peft.words import layers_of, text_embeddings

Make = Callable[..., RunConfig]
PIVOTAL: Table = {"task": {"token": "<me>", "vectors": 2, "word_lr": 1e-2}}

DECAY: Table = {"optimiser": {"weight_decay": 0.5}}
ALONE: Table = {"task": {"prior_weight": 0.0}}
"""No class pictures, which cost half of a step."""


def trained(config: RunConfig, family: str = "sd15") -> Delta:
    base = tiny_base(family)
    before = {part: e.weight.clone() for part, e in text_embeddings(base.pipe).items()}
    result = train(config, base=base)
    assert result.delta is not None
    tables = text_embeddings(base.pipe)
    assert all(torch.equal(before[part], e.weight) and not e._forward_hooks for part, e in tables.items())  # pyright: ignore
    return read(result.delta, base)


def rows(delta: Delta, token: str = "<me>") -> Tensor:
    return torch.cat([r.flatten() for r in delta.words[token].rows.values()])


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sdxl", {"norm": "clamp"}),
        ("sd15", {"layered": True, "norm": "pull"}),
        ("sdxl", {"layered": True, "norm": "clamp"}),
        ("sd15", {"prefix": True, "init": "mean"}),
    ],
)
def test_only_the_rows_of_the_new_word_move(config: Make, family: str, more: Table) -> None:
    task: Table = {"token": "<me>", "init_word": "robot duck", "vectors": 2, **more}
    delta = trained(config("textual-inversion", "run", {"task": task, "optimiser": {"weight_decay": 0.5}}), family)
    word = delta.words["<me>"]
    assert not delta.patches and list(delta.words) == ["<me>"] and word.leads == ("prefix" in more)
    assert word.layers == (layers_of(tiny_base(family).pipe) if "layered" in more else 0)
    for part, embedding in text_embeddings(tiny_base(family).pipe).items():
        assert len(word.rows[part].reshape(-1, embedding.embedding_dim).unique(dim=0)) == 2 * max(1, word.layers)
        if more.get("norm") == "clamp":
            assert float(word.rows[part].norm(dim=-1).max()) <= float(embedding.weight.norm(dim=-1).mean()) * 1.00001


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("textual-inversion", {"task": {"token": "robot"}}, 'the token "robot" is already a word of the base'),
        ("textual-inversion", {"task": {"init_word": "xqzwv"}}, 'does not know the word "xqzwv"'),
        ("textual-inversion", {"task": {"vectors": 75, "templates": ["a photo of {}"]}}, "no room for the 75 vectors"),
        ("textual-inversion", {"task": {"vectors": 76}}, "at most 75"),
        ("textual-inversion", {"task": {"layered": True}, "exports": ["diffusers"]}, "layered"),
        ("dreambooth", {"task": {"token": "robot", "vectors": 1}}, "already a word of the base"),
        ("dreambooth", {"task": {"token": "<me>", "vectors": 1, "init_word": "xqzwv"}}, "does not know"),
        ("dreambooth", {"task": {"token": "<me>", "vectors": 1, "word_first": 0.7, "word_until": 0.5}}, "word_first"),
        ("finetune", {"task": {"token": "<me>", "vectors": 1, "init_word": "robot"}}, 'no caption holds the new word "<me>"'),
    ],
)
def test_mistakes_are_told_before_anything_is_encoded(
    config: Make, task: str, more: Table, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoding(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr(type(tiny_base("sd15").pipe.vae), "encode", encoding)
    with pytest.raises(VgmError, match=message):
        train(config(task, "run", more), base=tiny_base("sd15"))
    embedding = next(iter(text_embeddings(tiny_base("sd15").pipe).values()))
    assert not embedding._forward_hooks  # pyright: ignore[reportPrivateUsage]


def test_a_beginning_of_more_tokens_than_vectors_is_remarked_upon(config: Make) -> None:
    result = train(config("textual-inversion", "run", {"task": {"init_word": "robot duck house"}}), base=tiny_base("sd15"))
    notices = json.loads((result.folder / "manifest.json").read_text())["notices"]
    assert any("is 3 tokens" in notice and 'init = "mean"' in notice for notice in notices)


@pytest.mark.parametrize(("family", "more"), [("sd15", {}), ("sdxl", {"layered": True, "init_word": "<rand> {}"})])
def test_a_word_and_the_weights_are_one_file(config: Make, family: str, more: Table) -> None:
    made = config("dreambooth", "run", PIVOTAL, {"task": more})
    delta = trained(made, family)
    assert delta.patches and delta.words["<me>"].vectors == 2
    manifest = json.loads((Path(made.output) / "manifest.json").read_text())
    assert manifest["delta"]["words"] == {"<me>": 2} and "a <me> robot" in delta.metadata["prompt"]
    count = sum(p.numel() for _, p in delta.parameters() if p.requires_grad) + sum(
        r.numel() for r in delta.words["<me>"].rows.values()
    )
    assert manifest["trained"]["parameters"] == count


def test_a_word_stays_from_where_it_is_told_to(config: Make) -> None:
    """The rest of the run changes not a bit of it: it is that of a run which ends there."""
    short = trained(config("dreambooth", "short", PIVOTAL, ALONE, DECAY, {"steps": 2}))
    whole = trained(config("dreambooth", "whole", PIVOTAL, ALONE, DECAY, {"task": {"word_until": 0.5}}))
    assert torch.equal(rows(short), rows(whole))
    assert not all(torch.equal(p, dict(short.parameters())[name]) for name, p in whole.parameters())


def test_words_first_is_textual_inversion_first(config: Make) -> None:
    """Until their turn the weights are those of a fresh delta: of the first two steps, the words know nothing of them."""
    both = trained(config("dreambooth", "both", PIVOTAL, ALONE, {"task": {"word_first": 0.5}}))
    assert all(bool(p.any()) for name, p in both.parameters() if name.endswith("up")), "and then they learn"
    losses = [json.loads(line)["loss"] for line in (Path(config("dreambooth", "both").output) / "metrics.jsonl").open()]
    later = config("dreambooth", "other", PIVOTAL, ALONE, {"task": {"word_first": 0.5}, "optimiser": {"lr": 1e-1}})
    train(later, base=tiny_base("sd15"))
    again = [json.loads(line)["loss"] for line in (Path(later.output) / "metrics.jsonl").open()]
    assert losses[:3] == again[:3] and losses[3] != again[3], "whatever their rate, they begin with the third step"


def test_captions_may_hold_new_words_and_others_stay_cached(config: Make, pictures: Path) -> None:
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    lines[0]["text"] += " with <me>"
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen: list[int] = []
    encoder: Any = tiny_base("sd15").pipe.text_encoder

    def look(_: nn.Module, args: tuple[Tensor, ...], __: object) -> None:
        if torch.is_grad_enabled():
            seen.append(len(args[0]))

    hook = encoder.register_forward_hook(look)
    try:
        delta = trained(config("finetune", "run", PIVOTAL, {"task": {"init_word": "robot", "layered": True}}))
    finally:
        hook.remove()
    assert delta.patches and delta.words["<me>"].layers and set(seen) == {layers_of(tiny_base("sd15").pipe)}, "only one caption"


def test_the_word_takes_the_place_of_what_it_begins_as_in_captions(
    config: Make, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a caption that names neither gives way to a sentence, which is said."""
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for line, text in zip(lines, ("a Robot on sand, no robots", "a robotic duck", "a <me> here"), strict=True):
        line["text"] = text
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen: list[str] = []
    kind: Any = type(tiny_base("sd15").pipe.tokenizer)
    read_text = kind.__call__

    def watched(self: Any, text: Any, *more: Any, **other: Any) -> Any:
        seen.extend([text] if isinstance(text, str) else text)
        return read_text(self, text, *more, **other)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", watched)
        task: Table = {"token": "<me>", "init_word": "<rand> robot", "vectors": 1, "templates": ["one {}"]}
        made = config("textual-inversion", "run", {"task": task, "steps": 6, "preview": {"count": 0}})
        notices = train(made, base=tiny_base("sd15")).notices
    shown = {text for text in seen if "<me>" in text and text != "<me>"}
    assert shown == {"a <me> on sand, no robots", "one <me>", "a <me> here"}
    told = " ".join(notices)
    assert '"a <me> on sand, no robots" (1 captions)' in told and 'as "a robotic duck" does not' in told


# --- the parts


def test_groups_rest_outside_their_span_and_have_the_schedule_within() -> None:
    early, late, whole = (nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [
        Group(1.0, {"a/p": early}, span=(0.0, 0.5)),
        Group(2.0, {"b/p": late}, span=(0.5, 1.0)),
        Group(4.0, {"c/p": whole}),
    ]
    config = OptimiserConfig(schedule="linear", weight_decay=0.1)
    optimiser = build_optimiser(groups, config)
    rates: list[list[float]] = []
    for step in range(8):
        first = set_rates(optimiser, config, step, 8)
        rates.append([group["lr"] for group in optimiser.param_groups])
        assert first == next(rate for rate in rates[-1] if rate)
        before = [p.detach().clone() for p in (early, late, whole)]
        for p in (early, late, whole):
            p.grad = torch.ones(3)
        rest(optimiser, step, 8)
        assert [p.grad is not None for p in (early, late, whole)] == [step < 4, step >= 4, True], "none weighs on the norm"
        optimiser.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, (early, late, whole), strict=True)]
        assert moved == [step < 4, step >= 4, True]
    assert rates[0] == [1.0, 0.0, 4.0] and rates[2] == [0.5, 0.0, 3.0] and rates[4] == [0.0, 2.0, 2.0]


def test_lengths_after_a_step() -> None:
    start = torch.tensor([[3.0, 4.0], [0.3, 0.4]])  # of length 5 and 0.5
    for kind, lengths in (("clamp", [2.0, 0.5]), ("pull", [5 + 0.2 * (2 - 5), 0.5 + 0.2 * (2 - 0.5)])):
        rows = nn.Parameter(start.clone())
        keep_lengths(build_optimiser([Group(2e-3, {"w/rows": rows}, length=Length(kind, 2.0))], OptimiserConfig()))  # pyright: ignore
        assert rows.norm(dim=-1).tolist() == pytest.approx(lengths)
        torch.testing.assert_close(rows / rows.norm(dim=-1, keepdim=True), start / start.norm(dim=-1, keepdim=True))
