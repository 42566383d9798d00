"""New words of a run: how they begin, where they are live, at which rate they learn and when.

Trained alone they are Textual Inversion (Gal et al. 2022, arXiv 2208.01618); together with a change of weights, in stages or
jointly, pivotal tuning (Roich et al. 2021, arXiv 2106.05744, for images cloneofsimo's lora_pti), ED-LoRA (layer-wise words,
arXiv 2305.18292) and Custom Diffusion (words with keys and values, arXiv 2212.04488).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from vgm_peft.desk import tokenizer_of
from vgm_peft.errors import ConfigError
from vgm_peft.families.prompts import expand
from vgm_peft.family import Base
from vgm_peft.train.limits import within
from vgm_peft.train.task import Group, Length, Setup
from vgm_peft.word import Word
from vgm_peft.words import WordAttachment, layers_of, new_word, text_embeddings, text_encoders, tokens_in


@dataclass(frozen=True, kw_only=True)
class WordOptions:
    """What a new word is, as keys of `[task]`."""

    token: str = ""
    """The new word; no word that the base knows. Usual is one in brackets: `<robot>`."""
    vectors: int = 0
    """Embedding rows for the word, each of which takes a place in the prompt; 0 trains no word."""
    init_word: str = ""
    """A text of the base's own from whose embedding the word starts: what the thing roughly is. `<rand-0.02>` in it is a row
    drawn at random with this standard deviation, `{}` the noun of the class prompt."""
    init: Literal["rows", "mean"] = "rows"
    """How a text of several tokens becomes rows: one after the other, repeated or cut (as in kohya), or all as their mean."""
    layered: bool = False
    """Rows of its own for every cross-attention of the denoiser (P+ / XTI, ED-LoRA); only native files hold them."""
    prefix: bool = False
    """Put the word before every prompt by itself (a soft prefix); only native files hold that."""
    norm: Literal["free", "clamp", "pull"] = "free"
    """The length of rows after each step: left alone, at most the mean of the vocabulary's (`clamp`), or drawn towards that
    mean by a share of 100 times the rate (`pull`, as cloneofsimo does)."""

    def __post_init__(self) -> None:
        within("vectors", self.vectors, 0, 1000)


@dataclass(frozen=True, kw_only=True)
class PivotalOptions(WordOptions):
    """New words trained along with a change of weights: `vectors` of 1 or more turns it on."""

    word_lr: float = 1e-3
    """Learning rate of the rows, which never decay."""
    word_until: float = 1.0
    """Share of the steps after which the words stay as they are."""
    word_first: float = 0.0
    """Share of the steps in which nothing but the words is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within("word_lr", self.word_lr, 0.0, 100.0)
        within("word_until", self.word_until, 0.0, 1.0)
        within("word_first", self.word_first, 0.0, 1.0)
        if self.vectors and not (self.word_first <= self.word_until > 0.0 and self.word_first < 1.0):
            raise ConfigError(
                f"word_first = {self.word_first} and word_until = {self.word_until}",
                expected="words that are trained at first and for some time, and weights after them",
            )


@dataclass
class Wording:
    """The new words of a run; live on the base from `attach` to its end."""

    words: Mapping[str, Word]
    """Token -> word, as it begins."""
    norm: Literal["free", "clamp", "pull"]
    base: Base
    attachment: WordAttachment | None = None

    @classmethod
    def of(cls, setup: Setup, options: Sequence[WordOptions], texts: Iterable[str] = ()) -> "Wording":
        """Make the words that options ask for, and see that base and `texts` have room for them, before all long work.

        Raises `ConfigError` or `DeltaError` for a token that the base has, an unknown beginning, a text that would be cut
        within the word.
        """
        asked = [o for o in options if o.vectors]
        words = {o.token: _word(o, setup) for o in asked}
        if odd := [name for name in setup.config.exports if name != "native" and not all(w.is_plain() for w in words.values())]:
            raise ConfigError(f'exports = ["{odd[0]}"], but a word is layered or a prefix', expected="native files alone")
        wording = cls(words, asked[0].norm if asked else "free", setup.base)
        with WordAttachment(setup.base.pipe, words.values()):
            wording.check_room(texts)
        return wording

    def check_room(self, texts: Iterable[str]) -> None:
        """Raise `ConfigError` for a text that would be cut within a word; while they are attached."""
        for text in dict.fromkeys(texts):
            for part in text_encoders(self.base.pipe):
                tokenizer: Any = tokenizer_of(self.base.pipe, part)
                room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
                room -= sum(word.vectors for word in self.words.values() if word.leads)
                names = cast("list[str]", tokenizer.tokenize(expand(tokenizer, text)))
                for token, word in self.words.items():
                    last = token if word.vectors == 1 else f"{token}_{word.vectors - 1}"
                    if last in names and names.index(last) >= room or word.leads and room < 1:
                        raise ConfigError(
                            f'"{text[:80]}" has no room for the {word.vectors} vectors of "{token}"',
                            expected=f"the whole word among the first {room} tokens",
                            fix="take fewer vectors or a shorter text",
                        )

    def speaks_in(self, text: str) -> bool:
        """Say whether what a text means depends on the words."""
        return any(token in text or bool(text) and word.leads for token, word in self.words.items())

    def attach(self, setup: Setup) -> None:
        """Put the words on the base until the run is over; what is cached of the untouched base must come before."""
        if self.words:
            self.attachment = WordAttachment(setup.base.pipe, self.words.values(), trainable=True)
            setup.cleanup.callback(self.attachment.remove)

    def groups(self, rate: float, decay: float | None = None, span: tuple[float, float] = (0.0, 1.0)) -> list[Group]:
        """The rows, one group for each text encoder."""
        if self.attachment is None:
            return []
        out: list[Group] = []
        for part, embedding in text_embeddings(self.base.pipe).items():
            rows = {f"{token}:{part}/rows": parts[part] for token, parts in self.attachment.rows.items()}
            mean = float(embedding.weight.detach().float().norm(dim=-1).mean())
            out.append(Group(rate, rows, decay, span, None if self.norm == "free" else Length(self.norm, mean)))
        return out

    def now(self) -> dict[str, Word]:
        """The words as they are, on the CPU."""
        words = {} if self.attachment is None else self.attachment.words()
        return {t: replace(w, rows={part: rows.cpu() for part, rows in w.rows.items()}) for t, w in words.items()}


def _word(options: WordOptions, setup: Setup) -> Word:
    pipe, vectors = setup.base.pipe, options.vectors
    if not options.init_word.strip():
        raise ConfigError(f'the new word "{options.token}" has nothing to begin from', fix="--init-word robot")
    count = tokens_in(pipe, options.init_word)
    if count > vectors and options.init == "rows":
        setup.notice(
            f'"{options.init_word}" is {count} tokens: "{options.token}" begins from the first {vectors}; '
            f'vectors = {count} takes all, init = "mean" their mean'
        )
    word = new_word(pipe, options.token, options.init_word, vectors, mean=options.init == "mean", seed=setup.config.seed)
    word = replace(word, leads=options.prefix)
    if not options.layered:
        return word
    if not (layers := layers_of(pipe)):
        raise ConfigError("layered = true", expected="a base with cross-attentions", fix="leave it out")
    return word.for_layers(layers)
