"""The Toybox text side: a `CLIPTokenizer` built from a word list and a small `CLIPTextModel` that knows the world.

Any text can be tokenized: words of the list are one token each, all else falls into bytes and known beginnings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from vgm_peft.toybox.nets import make_text_model

TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"
RARE_WORDS = ("sks", "ohwx", "zwx", "xjy", "qvb", "wfk", "jtz", "vbn", "kqr", "pzh", "gwx", "nqy")
COMMON_WORDS = tuple(
    """
    a an the and or of in on at with without to from by for near under over behind beside between into onto its this that
    is are one two three it as no not very new old photo picture image drawing painting render rendering view close up
    toy toys object thing subject style small big large tiny little huge tall short round left right centre center middle
    side front back top bottom red orange yellow green blue purple pink white black grey gray brown teal cyan magenta
    violet turquoise gold golden silver beige navy olive maroon lime colour color coloured colored bright dark light pale
    matte glossy shiny striped checkered checked spotted dotted patterned plain smooth dots rings patches halves zigzag
    spiral pattern stripes checks robot duck car house mushroom rocket mug tree snowman fish studio grass sand night sky
    wood wooden floor stars beach lawn field desert table room day toon cartoon sketch pencil blueprint pixel art line
    plastic metal clay standing sitting flying floating placed shown seen scene background corner edge hat roof wheel
    door window cup ball box cat dog bear bird boat train plane flower star moon sun cloud water snow fire hill road
    street city garden forest mountain sea river bridge tower castle person man woman child
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How the text model is built and trained."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    batch: int = 96
    rate: float = 2e-3
    noise: float = 0.3
    """Deviation of the noise on the features that the attribute heads read, so that classes lie well apart."""


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in GPT-2's and CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + place) for place in range(len(moved))]


def split_word(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges to one word: the lowest rank first, as CLIP does."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        rank, place = min((ranks.get(pair, 1 << 30), i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)))
        if rank == 1 << 30:
            break
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


def make_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """Build a tokenizer in which each of `words` is one token and any other text is bytes and known beginnings."""
    ranks: dict[tuple[str, str], int] = {}
    for word in dict.fromkeys(w.lower() for w in words):
        while len(pieces := split_word(word, ranks)) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
    letters = byte_letters()
    entries = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in ranks), START, END]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    build: Any = CLIPTokenizer
    return build(
        vocab=vocabulary,
        merges=list(ranks),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )


def new_text_model(tokenizer: CLIPTokenizer, settings: TextSettings) -> CLIPTextModel:
    """Build the untrained text model of these settings."""
    return make_text_model(tokenizer, settings.width, settings.layers, settings.heads, TOKENS)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token numbers (B, T) of captions, cut or padded to the model's length."""
    return tokenizer(list(captions), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
