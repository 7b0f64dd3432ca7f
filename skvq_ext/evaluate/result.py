"""What an evaluation found, and its JSON: the only thing that tables, plots and reports read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import exp
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

VERSION = 1
MEASURES = ("ppl", "needles", "generation", "layers", "memory")
STRETCHES = 32  # equal parts a sequence is cut into, for standard errors and curves

Kind = Literal["full", "packed", "simulated"]
Grid = tuple[tuple[float, ...], ...]
Counts = tuple[tuple[int, ...], ...]


class ResultError(ValueError):
    """A file that is no result, or one of another version."""


class _Part:
    """Reading is strict: unknown fields, NaN and infinity are refused."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Text(_Part):
    """A text that was used. tokens: of the whole text, of a calibration text those that were used;
    sha256: hexadecimal, of its UTF-8 bytes, all of them."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Setting(_Part):
    """What was run on what. calibration: text the methods were fitted to, None = none needed one.

    versions: of the packages and of the instruction set that computed, by name.
    """

    model: str
    dtype: str
    device: str
    seed: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    texts: tuple[Text, ...]
    calibration: Text | None
    versions: dict[str, str]


@dataclass(frozen=True)
class MethodEntry(_Part):
    """A method as every table names it.

    spec: as asked for on the command line. bits: average stored bits per value of K and V behind
    the window, metadata included. kind: "full" precision, "packed" = bytes really allocated,
    "simulated" = dense rows with rounded values. protocol: window, sinks and what else differs, in
    words. chunk: tokens of one forward.
    """

    name: str
    spec: str
    bits: float
    kind: Kind
    protocol: str
    chunk: int


@dataclass(frozen=True)
class TextLoss(_Part):
    """One method on one text; losses in nats per token.

    top1: share of tokens that were the likeliest. above: nats above full precision on the same
    tokens, with its standard error; stretches: the same per STRETCHES-th of the scored tokens.
    """

    text: str
    nll: float
    top1: float
    above: float
    above_stderr: float
    stretches: tuple[float, ...]


@dataclass(frozen=True)
class MethodLoss(_Part):
    """One method on all texts, each of which counts the same; fields as in `TextLoss`."""

    method: str
    nll: float
    above: float
    above_stderr: float
    texts: tuple[TextLoss, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean loss: the geometric mean over the texts."""
        return exp(self.nll)


@dataclass(frozen=True)
class LossResult(_Part):
    """Perplexity. scored: tokens of each text; skip: tokens before them that are context only."""

    protocol: str
    scored: int
    skip: int
    methods: tuple[MethodLoss, ...]


@dataclass(frozen=True)
class MethodNeedles(_Part):
    """One method. digits, numbers: those that came back right, [length][depth]."""

    method: str
    digits: Counts
    numbers: Counts

    @property
    def total(self) -> int:
        """Digits that came back right in all cells."""
        return sum(map(sum, self.digits))


@dataclass(frozen=True)
class NeedlesResult(_Part):
    """Planted numbers. lengths: tokens of a haystack; depths: 0 = its beginning, 1 = its end.

    digits, numbers: that were asked for in each cell, [length][depth].
    """

    protocol: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    digits: Counts
    numbers: Counts
    methods: tuple[MethodNeedles, ...]

    @property
    def total(self) -> int:
        """Digits that were asked for."""
        return sum(map(sum, self.digits))


@dataclass(frozen=True)
class Repetition(_Part):
    """How much a text repeats itself.

    repeated_4grams: share of the 4-grams that occurred before. distinct_1, distinct_2: different
    tokens and pairs, over all. longest_loop: tokens of the longest stretch in which every token
    equals the one a fixed distance before, that first round included; 0 = none repeats once.
    """

    repeated_4grams: float
    distinct_1: float
    distinct_2: float
    longest_loop: int


@dataclass(frozen=True)
class FreeRun(_Part):
    """A method's own greedy text behind one prompt.

    divergence: new tokens before the first that differs from full precision's, None = none does.
    excerpt: where it begins, for people.
    """

    text: str
    divergence: int | None
    repetition: Repetition
    excerpt: str


@dataclass(frozen=True)
class MethodGeneration(_Part):
    """One method over all prompts.

    kl: KL(full precision || method) in nats per token of full precision's own text, with its
    standard error; by quarter and by STRETCHES-th of that text. agreement: share of tokens with the
    same likeliest guess. drift: last quarter of kl over the first, None where the first is 0.
    """

    method: str
    kl: float
    kl_stderr: float
    kl_quarters: tuple[float, ...]
    kl_stretches: tuple[float, ...]
    agreement: float
    agreement_quarters: tuple[float, ...]
    drift: float | None
    runs: tuple[FreeRun, ...]


@dataclass(frozen=True)
class GenerationResult(_Part):
    """Long generation. prompt_tokens, tokens: read before and written behind each prompt.

    written: repetition of the text that was teacher-forced, per prompt; excerpts: its beginnings.
    """

    protocol: str
    prompt_tokens: int
    tokens: int
    written: tuple[Repetition, ...]
    excerpts: tuple[str, ...]
    methods: tuple[MethodGeneration, ...]


@dataclass(frozen=True)
class MethodLayers(_Part):
    """One method, [layer][query head].

    logits: mean absolute error of the scaled logits, None where a method's keys cannot be read.
    output: root mean square of |output - exact output| over that of |exact output|. cosine: mean of
    the cosine between both.
    """

    method: str
    logits: Grid | None
    output: Grid
    cosine: Grid

    def worst(self, count: int = 5) -> list[tuple[int, int]]:
        """The (layer, query head) pairs with the largest output errors, worst first."""
        errors = [
            (-error, layer, head)
            for layer, heads in enumerate(self.output)
            for head, error in enumerate(heads)
        ]
        return [(layer, head) for _, layer, head in sorted(errors)[:count]]


@dataclass(frozen=True)
class LayersResult(_Part):
    """Errors of attention per layer and head, on the hidden states of full precision."""

    protocol: str
    tokens: int
    methods: tuple[MethodLayers, ...]


@dataclass(frozen=True)
class MethodMemory(_Part):
    """One method: bytes of one sequence by context, and of each further token at long context.

    allocated: whether the cache's own allocator was asked; False: stated bits times values.
    """

    method: str
    allocated: bool
    total: tuple[int, ...]
    per_token: float


@dataclass(frozen=True)
class MemoryResult(_Part):
    """Bytes of keys and values of one sequence, weights aside. contexts: tokens."""

    protocol: str
    contexts: tuple[int, ...]
    methods: tuple[MethodMemory, ...]


@dataclass(frozen=True)
class Result(_Part):
    """One evaluation; a measurement that was not asked for is None. methods[0] is full precision,
    and every measurement names the same methods in the same order.

    times: seconds by "measurement: method", the only thing that differs between equal runs.
    """

    setting: Setting
    methods: tuple[MethodEntry, ...]
    ppl: LossResult | None = None
    needles: NeedlesResult | None = None
    generation: GenerationResult | None = None
    layers: LayersResult | None = None
    memory: MemoryResult | None = None
    times: dict[str, float] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        """The result as JSON text; equal results give equal texts.

        Raises: ResultError where a number is NaN or infinite.
        """
        try:
            return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"
        except ValueError:
            raise ResultError(
                "the result holds NaN or infinity and was not written: a measurement is broken; "
                "run it alone to see which."
            ) from None

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Reads what `to_json` wrote. Raises: ResultError."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ResultError(
                f"this is no result of 'skvq eval', not even JSON: {error}."
            ) from None
        found = values.get("version") if isinstance(values, dict) else None
        if found != VERSION:
            raise ResultError(
                f"the result has version {found!r}; this skvq_ext reads {VERSION}. Run 'skvq eval' "
                "again, or read it with the release that wrote it."
            )
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ResultError(
                f"the result is damaged at {where or 'the top'}: {first['msg']}. Run 'skvq eval' "
                "again."
            ) from None
