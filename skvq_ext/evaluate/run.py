"""One evaluation: all measurements that were asked for, into one result."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
import transformers

from skvq_ext.evaluate.layers import check_layers, measure_layers
from skvq_ext.evaluate.long_generation import check_generation, measure_generation
from skvq_ext.evaluate.loss import check_loss, measure_loss
from skvq_ext.evaluate.memory import CONTEXTS, measure_memory
from skvq_ext.evaluate.method import FullPrecision, Method
from skvq_ext.evaluate.needles import DEPTHS, LENGTHS, build_haystacks, measure_needles
from skvq_ext.evaluate.result import MEASURES, Kind, MethodEntry, Result, Setting, Text
from skvq_ext.evaluate.specs import Built
from skvq_ext.evaluate.subject import EvaluationError, Passage, Subject
from skvq_ext.geometry import Geometry
from skvq_ext.models import LanguageModel
from skvq_ext.ops import build_info
from skvq_ext.report import Step, no_steps


@dataclass(frozen=True)
class Options:
    """What is measured, and how much of it; see the measurements for what the numbers mean."""

    measures: tuple[str, ...] = MEASURES
    tokens: int = 2048
    skip: int = 0
    lengths: tuple[int, ...] = LENGTHS
    depths: tuple[float, ...] = DEPTHS
    haystacks: int = 2
    prompt_tokens: int = 256
    new_tokens: int = 2048
    layer_tokens: int = 1024
    contexts: tuple[int, ...] = CONTEXTS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.measures:
            if name not in MEASURES:
                near = get_close_matches(name, MEASURES, 1, 0.0)[0]
                raise EvaluationError(
                    f"unknown measurement {name!r}; nearest: {near!r}. Known: {', '.join(MEASURES)}."
                )
        if not self.measures:
            raise EvaluationError(f"nothing to measure; choose from {', '.join(MEASURES)}.")


@dataclass(frozen=True)
class Source:
    """A text as it is named in the result, and as the model reads it."""

    text: Text
    passage: Passage

    @classmethod
    def read(cls, loaded: LanguageModel, path: Path, tokens: int | None = None) -> Source:
        """Reads a UTF-8 file.

        Args: tokens to use, None = all. Raises: EvaluationError where it is no text.
        """
        raw = path.read_bytes()
        try:
            content = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise EvaluationError(f"{path} is not UTF-8 text: {error}.") from None
        ids = loaded.encode(content)[:, :tokens]
        text = Text(path.name, ids.shape[1], hashlib.sha256(raw).hexdigest())
        return cls(text, Passage(path.name, ids))


def check(
    loaded: LanguageModel, sources: Sequence[Source], calibration: Source | None, options: Options
) -> None:
    """Raises EvaluationError for what cannot be measured, before anything is fitted or run."""
    names = [source.text.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise EvaluationError(f"texts {names}: give one or more, with different file names.")
    if calibration and calibration.text.sha256 in {source.text.sha256 for source in sources}:
        raise EvaluationError(
            f"{calibration.text.name} is both the calibration text and evaluated on: what was fitted "
            "to a text looks better on it than it is. Give another one."
        )
    subject = Subject(loaded, [FullPrecision()])
    passages = [source.passage for source in sources]
    o = options
    if "ppl" in o.measures:
        check_loss(subject, passages, o.tokens, o.skip)
    if "needles" in o.measures:
        build_haystacks(subject, passages[0], o.lengths, o.depths, o.haystacks, o.seed)
    if "generation" in o.measures:
        check_generation(subject, passages, o.prompt_tokens, o.new_tokens)
    if "layers" in o.measures:
        check_layers(subject, passages[0], o.layer_tokens)


def evaluate(
    loaded: LanguageModel,
    built: Sequence[Built],
    sources: Sequence[Source],
    calibration: Source | None = None,
    options: Options | None = None,
    step: Step = no_steps,
) -> Result:
    """Measures methods on a model; needles and layers read the first text only.

    Args: built, see `Builder.build`; calibration, the text they were fitted to; step, see
    `skvq_ext.report`. Raises: EvaluationError.
    """
    o = options or Options()
    check(loaded, sources, calibration, o)
    subject = Subject(loaded, [b.method for b in built], step)
    geometry = Geometry.from_config(loaded.model.config)
    passages = [source.passage for source in sources]
    first, wanted = passages[0], set(o.measures)
    grid = (o.lengths, o.depths, o.haystacks, o.seed)
    return Result(
        setting=_setting(loaded, geometry, sources, calibration, o.seed),
        methods=tuple(_entry(b) for b in built),
        ppl=measure_loss(subject, passages, o.tokens, o.skip) if "ppl" in wanted else None,
        needles=measure_needles(subject, first, *grid) if "needles" in wanted else None,
        generation=(
            measure_generation(subject, passages, o.prompt_tokens, o.new_tokens, o.seed)
            if "generation" in wanted
            else None
        ),
        layers=measure_layers(subject, first, o.layer_tokens) if "layers" in wanted else None,
        memory=(
            measure_memory(geometry, subject.methods, o.contexts) if "memory" in wanted else None
        ),
        times=subject.times,
    )


def _entry(built: Built) -> MethodEntry:
    method = built.method
    return MethodEntry(
        method.name, built.spec, method.bits, _kind(method), method.protocol, method.chunk
    )


def _kind(method: Method) -> Kind:
    if isinstance(method, FullPrecision):
        return "full"
    return "packed" if method.packed else "simulated"


def _setting(
    loaded: LanguageModel,
    geometry: Geometry,
    sources: Sequence[Source],
    calibration: Source | None,
    seed: int,
) -> Setting:
    build = build_info()
    return Setting(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=str(loaded.model.device),
        seed=seed,
        num_layers=geometry.num_layers,
        num_q_heads=geometry.num_q_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        texts=tuple(source.text for source in sources),
        calibration=calibration.text if calibration else None,
        versions={
            "skvq_ext": str(build["version"]),
            "torch": str(torch.__version__),
            "transformers": str(transformers.__version__),
            "cpu": str(build["cpu_isa"]),
        },
    )
