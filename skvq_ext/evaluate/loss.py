"""Perplexity: nats per token above full precision, on several texts."""

from __future__ import annotations

from collections.abc import Sequence

from skvq_ext.evaluate.method import Method
from skvq_ext.evaluate.result import STRETCHES, LossResult, MethodLoss, TextLoss
from skvq_ext.evaluate.subject import (
    READING,
    Count,
    EvaluationError,
    Passage,
    Subject,
    opened,
    standard_error,
    stretch_means,
)
from skvq_ext.perplexity import Score, score


def measure_loss(
    subject: Subject, passages: Sequence[Passage], scored: int, skip: int
) -> LossResult:
    """Loss of every method on the same tokens.

    Args: scored, tokens of each text; skip, tokens before them that are context only (the very
    first token of a text is never scored). Raises: EvaluationError where a text is too short, or a
    loss is not finite.
    """
    check_loss(subject, passages, scored, skip)
    first = max(1, skip)
    cut = [Passage(p.name, p.ids[:, : first + scored]) for p in passages]
    count = subject.counter("ppl", len(subject.methods) * sum(p.ids.shape[1] - 1 for p in cut))
    exact: list[Score] = []
    methods = []
    for method in subject.methods:
        scores = [score_method(subject, "ppl", method, p, skip, count) for p in cut]
        exact = exact or scores
        pairs = zip(cut, scores, exact, strict=True)
        methods.append(_summary(method.name, [_text_loss(p.name, s, e) for p, s, e in pairs]))
    protocol = (
        f"{scored} tokens of each text are scored after {first} of context. {READING} 'Above' is "
        "nats per token above full precision on the same tokens; standard errors are those of "
        f"the means of {STRETCHES} consecutive stretches; texts count equally."
    )
    return LossResult(protocol, scored, first, tuple(methods))


def check_loss(subject: Subject, passages: Sequence[Passage], scored: int, skip: int) -> None:
    """Raises EvaluationError for what `measure_loss` cannot do, before anything is computed."""
    if scored < 2 * STRETCHES:
        raise EvaluationError(
            f"{scored} tokens are too few to give a standard error; score {2 * STRETCHES} or more."
        )
    needed = max(1, skip) + scored
    for p in passages:
        if p.ids.shape[1] < needed:
            raise EvaluationError(
                f"{p.name} has {p.ids.shape[1]} tokens; {scored} that are scored behind "
                f"{max(1, skip)} of context need {needed}. Ask for fewer or give a longer text."
            )
    subject.check_room(needed, "this perplexity")


def score_method(
    subject: Subject, measure: str, method: Method, passage: Passage, skip: int, count: Count
) -> Score:
    """The score of one method on one text. Raises: EvaluationError on a loss that is not finite."""
    with subject.timed(measure, method), opened(subject.model, method) as cache:
        found = score(subject.model, passage.ids, cache, skip, method.chunk, count)
    if not found.losses.isfinite().all():
        raise EvaluationError(
            f"{method.name} on {passage.name}: the loss is NaN or infinite. Run the model in float32 or "
            "bfloat16; if full precision is fine with the same text, this method overflows."
        )
    return found


def _text_loss(name: str, found: Score, exact: Score) -> TextLoss:
    above = found.losses - exact.losses
    stretches = stretch_means(above)
    return TextLoss(
        text=name,
        nll=found.nll,
        top1=float(found.hits.double().mean()),
        above=float(above.mean()),
        above_stderr=standard_error(stretches),
        stretches=tuple(stretches.tolist()),
    )


def _summary(method: str, texts: list[TextLoss]) -> MethodLoss:
    count = len(texts)
    return MethodLoss(
        method,
        nll=sum(t.nll for t in texts) / count,
        above=sum(t.above for t in texts) / count,
        above_stderr=sum(t.above_stderr**2 for t in texts) ** 0.5 / count,
        texts=tuple(texts),
    )
