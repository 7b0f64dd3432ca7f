"""Long generation: how far a method drifts from full precision over thousands of new tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from skvq_ext.evaluate.method import Method
from skvq_ext.evaluate.repetition import repetition
from skvq_ext.evaluate.result import (
    STRETCHES,
    FreeRun,
    GenerationResult,
    MethodGeneration,
)
from skvq_ext.evaluate.subject import (
    READING,
    Count,
    EvaluationError,
    Passage,
    Reader,
    Subject,
    chunks,
    standard_error,
    stretch_means,
)

TOP_P = 0.95  # of the text that is teacher-forced; greedy text of small models runs in circles
_EXCERPT = 80  # tokens

Choose = Callable[[Tensor], int]  # from logits f32 [vocab_size] on the CPU


def measure_generation(
    subject: Subject, passages: Sequence[Passage], prompt_tokens: int, tokens: int, seed: int
) -> GenerationResult:
    """Drift and repetition of every method behind the beginning of every passage.

    Args: prompt_tokens of each passage that are read; tokens that are written behind them; seed of
    the sampled text. Raises: EvaluationError where a passage or the model is too short.
    """
    check_generation(subject, passages, prompt_tokens, tokens)
    prompts = [Passage(p.name, p.ids[:, :prompt_tokens]) for p in passages]
    exact, length = subject.methods[0], prompt_tokens + tokens
    readings = len(prompts) * (1 + 2 * len(subject.methods))
    count = subject.counter("generation", readings * length)
    sampled = [
        _write(subject, exact, p, tokens, nucleus(seed + i), count) for i, p in enumerate(prompts)
    ]
    greedy: list[list[int]] = []
    methods = []
    for method in subject.methods:
        forced = [
            _compare(subject, method, p, ids, count)
            for p, ids in zip(prompts, sampled, strict=True)
        ]
        free = [_write(subject, method, p, tokens, likeliest, count) for p in prompts]
        greedy = greedy or free
        runs = [
            _free_run(subject, p.name, mine, other)
            for p, mine, other in zip(prompts, free, greedy, strict=True)
        ]
        methods.append(_summary(method.name, forced, runs))
    protocol = (
        f"Prompts are the first {prompt_tokens} tokens of each text. Full precision writes {tokens} "
        f"tokens (top-p {TOP_P}, temperature 1, seed {seed}; special tokens are never chosen); "
        f"every method then reads that text. {READING} KL(full precision || method) is in nats per "
        f"token; standard errors are those of the means of {STRETCHES} consecutive stretches. Apart "
        f"from that, every method writes {tokens} tokens greedily by itself."
    )
    return GenerationResult(
        protocol,
        prompt_tokens,
        tokens,
        written=tuple(repetition(ids) for ids in sampled),
        excerpts=tuple(_excerpt(subject, ids) for ids in sampled),
        methods=tuple(methods),
    )


def check_generation(
    subject: Subject, passages: Sequence[Passage], prompt_tokens: int, tokens: int
) -> None:
    """Raises EvaluationError for what `measure_generation` cannot do."""
    if tokens < 2 * STRETCHES or prompt_tokens < 1:
        raise EvaluationError(
            f"a generation of {tokens} tokens behind {prompt_tokens} is too short to measure drift; "
            f"ask for {2 * STRETCHES} or more, behind at least one."
        )
    for p in passages:
        if p.ids.shape[1] < prompt_tokens:
            raise EvaluationError(
                f"{p.name} has {p.ids.shape[1]} tokens, too few for a prompt of {prompt_tokens}. "
                "Ask for a shorter prompt or give a longer text."
            )
    subject.check_room(prompt_tokens + tokens, "this generation")


def likeliest(logits: Tensor) -> int:
    """Greedy choice; the first of equals."""
    return int(logits.argmax())


def nucleus(seed: int) -> Choose:
    """Samples from the likeliest tokens that together hold TOP_P (Holtzman et al. 2020)."""
    generator = torch.Generator().manual_seed(seed)
    keep = TopPLogitsWarper(TOP_P)

    def choose(logits: Tensor) -> int:
        kept = keep(None, logits[None])[0]
        return int(torch.multinomial(kept.softmax(-1), 1, generator=generator))

    return choose


@torch.inference_mode()
def _write(
    subject: Subject, method: Method, prompt: Passage, tokens: int, choose: Choose, count: Count
) -> list[int]:
    """Continues a prompt token by token through a method's cache."""
    banned = _special(subject)
    reader = Reader(subject.model, method)
    length = prompt.ids.shape[1]
    written: list[int] = []
    with subject.timed("generation", method):
        for part in chunks(length, method.chunk):
            logits = reader.read(prompt.ids[:, part])
            count(part.stop - part.start)
        while True:
            written.append(choose(logits[-1].cpu().index_fill(0, banned, -torch.inf)))
            count(1)
            if len(written) == tokens:
                return written
            logits = reader.read(prompt.ids.new_tensor([[written[-1]]]))


def _special(subject: Subject) -> Tensor:
    """Tokens that end a text or stand for no text, int64."""
    ends = getattr(subject.model.generation_config, "eos_token_id", None)
    found = {
        *subject.loaded.tokenizer.all_special_ids,
        *(ends if isinstance(ends, list) else [ends]),
    }
    vocabulary = subject.model.config.get_text_config(decoder=True).vocab_size
    return torch.tensor(sorted(i for i in found if i is not None and i < vocabulary)).long()


@torch.inference_mode()
def _compare(
    subject: Subject, method: Method, prompt: Passage, written: list[int], count: Count
) -> tuple[Tensor, Tensor]:
    """KL f64 [tokens] and whether the likeliest token agrees, bool [tokens], over a given text.

    Full precision and the method read side by side: no logits need to be kept.
    """
    ids = torch.cat([prompt.ids, prompt.ids.new_tensor([written])], 1)[:, :-1]
    first = prompt.ids.shape[1] - 1  # the token here predicts the first written one
    exact, other = (Reader(subject.model, m) for m in (subject.methods[0], method))
    divergences, agrees = [], []
    with subject.timed("generation", method):
        for part in chunks(ids.shape[1], method.chunk):
            kept = slice(max(0, first - part.start), None)
            full, mine = (r.read(ids[:, part])[kept].log_softmax(-1) for r in (exact, other))
            # Rounding may leave a sum just below 0, which no divergence is.
            kl = (full.exp() * (full - mine)).sum(-1, dtype=torch.float64)
            divergences.append(kl.clamp(min=0).cpu())
            agrees.append((full.argmax(-1) == mine.argmax(-1)).cpu())
            count(part.stop - part.start)
    return torch.cat(divergences), torch.cat(agrees)


def _free_run(subject: Subject, text: str, mine: list[int], exact: list[int]) -> FreeRun:
    different = (i for i, (a, b) in enumerate(zip(mine, exact, strict=True)) if a != b)
    return FreeRun(text, next(different, None), repetition(mine), _excerpt(subject, mine))


def _excerpt(subject: Subject, ids: list[int]) -> str:
    return subject.loaded.decode(torch.tensor(ids[:_EXCERPT]))


def _summary(
    method: str, forced: list[tuple[Tensor, Tensor]], runs: list[FreeRun]
) -> MethodGeneration:
    """Prompts count equally: curves are means over them, token by token."""
    kl = torch.stack([divergence for divergence, _ in forced]).mean(0)
    agreement = torch.stack([agrees for _, agrees in forced]).double().mean(0)
    stretches = stretch_means(kl)
    quarters = [float(part.mean()) for part in kl.tensor_split(4)]
    return MethodGeneration(
        method=method,
        kl=float(kl.mean()),
        kl_stderr=standard_error(stretches),
        kl_quarters=tuple(quarters),
        kl_stretches=tuple(stretches.tolist()),
        agreement=float(agreement.mean()),
        agreement_quarters=tuple(float(part.mean()) for part in agreement.tensor_split(4)),
        drift=quarters[-1] / quarters[0] if quarters[0] else None,
        runs=tuple(runs),
    )
