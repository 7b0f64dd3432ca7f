"""A small random model with a tokenizer of characters, and texts for it."""

from __future__ import annotations

import random

import torch
from hf_models import VOCAB, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from skvq_ext.evaluate.method import FullPrecision, Method, Packed
from skvq_ext.evaluate.subject import Passage, Subject
from skvq_ext.geometry import Geometry
from skvq_ext.models import LanguageModel
from skvq_ext.scheme import Scheme

SMALL = "k2-v1.5-g32-w16-sink3-fp8"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character; a newline takes the place of '~'."""
    letters = {"<pad>": 0, "<s>": 1} | {chr(30 + i): i for i in range(2, VOCAB)}
    letters["\n"] = letters.pop("~")
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


def make_loaded(kind: str = "llama") -> LanguageModel:
    """A model of this kind as the command line would load it."""
    return LanguageModel(f"tiny {kind}", make_model(kind), make_tokenizer())


def make_text(characters: int, seed: int = 0) -> str:
    """Sentences of random words."""
    dice, words = random.Random(seed), list[str]()
    while sum(map(len, words)) < characters:
        word = "".join(dice.choices("abcdefghijklmnop", k=dice.randint(2, 7)))
        words.append(word + dice.choice([" "] * 6 + [". ", ".\n"]))
    return "".join(words)[:characters]


def make_passage(loaded: LanguageModel, characters: int, seed: int = 0) -> Passage:
    """Such a text as the model reads it."""
    return Passage(f"text {seed}", loaded.encode(make_text(characters, seed)))


def make_packed(loaded: LanguageModel, scheme: str = SMALL, exact: bool = True) -> Packed:
    """The packed cache with its default plan, read in float32."""
    geometry = Geometry.from_config(loaded.model.config)
    return Packed(geometry, Scheme.parse(scheme), exact=exact)


def make_subject(loaded: LanguageModel, *methods: Method) -> Subject:
    """Full precision and these methods."""
    return Subject(loaded, [FullPrecision(), *methods])


class BrokenMethod(FullPrecision):
    """Full precision until a cache is made: then the model's embeddings become NaN."""

    def cache(self, model: object) -> object:
        """A cache for a model that is broken from now on."""
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(torch.nan)  # type: ignore[attr-defined]
        return super().cache(model)
