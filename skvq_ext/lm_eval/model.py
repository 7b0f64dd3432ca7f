"""The model "skvq" of the lm-evaluation-harness: its "hf" model, reading through a packed cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

from skvq_ext import __version__
from skvq_ext.geometry import Geometry
from skvq_ext.hf import SkvqHFCache
from skvq_ext.lm_eval.reader import PREFILLS, Reader, padded
from skvq_ext.perplexity import packed_chunk
from skvq_ext.plan import Plan
from skvq_ext.scheme import Scheme

log = logging.getLogger(__name__)

# ((context, continuation) as text, for the harness's own cache; tokens of both)
Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]


@register_model("skvq")
class SkvqLM(HFLM):  # type: ignore[misc]  # lm-eval carries no types
    """A causal language model whose history is read from packed bytes, in every kind of task."""

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        scheme: str | None = None,
        plan: str | Path | None = None,
        prefill: str = "exact",
        exact: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        **kwargs: Any,
    ) -> None:
        """Args: pretrained, device (None = "cuda" where there is one), batch_size (a number) and
        all other arguments, as of the harness's model "hf"; scheme, None = that of the plan, or the
        default one; plan, file from 'skvq calibrate', None = no calibration; prefill, one of
        PREFILLS, see `Reader`; exact, see `SkvqHFCache`.
        Raises: ValueError for arguments that are wrong or do not fit together."""
        if prefill not in PREFILLS:
            raise ValueError(f"prefill={prefill!r} is not known; use one of {', '.join(PREFILLS)}.")
        parsed = None if scheme is None else Scheme.parse(str(scheme))
        self.prefill, self.plan_file = prefill, None if plan is None else _existing(plan)
        _refuse(batch_size, kwargs)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(pretrained, device=device, batch_size=batch_size, **kwargs)
        if not isinstance(self.model, PreTrainedModel):
            raise ValueError(
                f"the packed cache serves plain transformers models, found {type(self.model)}: "
                "merge an adapter into its model, and load weights as transformers loads them."
            )
        geometry = Geometry.from_config(self.model.config)
        made = None if plan is None else Plan.load(plan, geometry, parsed)
        self.cache = SkvqHFCache(self.model, parsed, made, exact)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the model, and how its cache was read."""
        plan, file = self.cache.plan, self.plan_file
        info: dict[str, Any] = super().get_model_info()
        return info | {
            "skvq_version": __version__,
            "skvq_scheme": str(self.cache.scheme),
            "skvq_bits_per_value": plan.bits_per_value,
            "skvq_plan": plan.origin,
            "skvq_plan_sha256": None if file is None else _sha256(file),
            "skvq_prefill": self.prefill,
        }

    def _reader(self) -> Reader:
        chunk = packed_chunk(self.cache.scheme.rollback)
        return Reader(self.model, self.cache, chunk, self.prefill)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """Log probability of each continuation after its context; equal contexts of a batch are
        read once. Args and returns: as of HFLM."""
        tokens = [self._fitting(context, wanted) for _, context, wanted in requests]
        # Longest first, as the harness does: what does not fit into memory fails at once.
        order = sorted(range(len(tokens)), key=lambda i: (-len(tokens[i][0]), tokens[i][0]))
        size = override_bs or self.batch_size
        answers: dict[int, Answer] = {}
        bar = tqdm(total=len(order), disable=disable_tqdm or self.rank != 0, desc="loglikelihood")
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            for index, answer in zip(batch, self._answers([tokens[i] for i in batch]), strict=True):
                answers[index] = answer
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
            bar.update(len(batch))
        bar.close()
        return [answers[i] for i in range(len(requests))]

    def _fitting(self, context: list[int], wanted: list[int]) -> tuple[list[int], list[int]]:
        """The pair, its context cut from the left where both do not fit into the model."""
        if not context or not wanted or len(wanted) > self.max_length:
            raise ValueError(
                f"a context of {len(context)} and a continuation of {len(wanted)} tokens were "
                f"asked for; both need one, and the continuation may have {self.max_length} "
                "(max_length)."
            )
        room = self.max_length + 1 - len(wanted)  # the last token is predicted, never fed
        if len(context) > room:
            log.warning("a context of %d tokens was cut to its last %d", len(context), room)
        return context[-room:], wanted

    def _answers(self, batch: list[tuple[list[int], list[int]]]) -> list[Answer]:
        """The answers for one batch of (context, continuation)."""
        contexts = list(dict.fromkeys(tuple(context) for context, _ in batch))
        reader = self._reader()
        reader.contexts(*padded([context[:-1] for context in contexts], "left", self.device))
        reader.select([contexts.index(tuple(context)) for context, _ in batch])
        fed = [[context[-1], *wanted[:-1]] for context, wanted in batch]
        targets, _ = padded([wanted for _, wanted in batch], "right", self.device)
        totals, greedy = reader.score(*padded(fed, "right", self.device), targets)
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """Generation after the left-padded contexts. Args and returns: as of HFLM."""
        mask = kwargs["attention_mask"]
        self._reader().contexts(context[:, :-1], mask[:, :-1])
        copies = max(kwargs.get("num_beams", 1), kwargs.get("num_return_sequences", 1))
        if copies > 1:  # generate repeats the prompts, but not what is cached of them
            self.cache.batch_repeat_interleave(copies)
        found: torch.Tensor = super()._model_generate(
            context, max_length, stop, past_key_values=self.cache, **kwargs
        )
        return found


def _existing(plan: str | Path) -> Path:
    path = Path(plan)
    if not path.is_file():
        raise ValueError(f"plan={plan}: there is no such file; 'skvq calibrate' makes one.")
    return path


def _refuse(batch_size: int | str, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for arguments of HFLM that cannot be honoured here."""
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(
            f"batch_size={batch_size!r}: give a number. The harness finds one by trying forwards "
            "without a cache, which says nothing about forwards with one."
        )
    if kwargs.get("mixed_precision_dtype") is not None:
        raise ValueError(
            "mixed_precision_dtype: the cache keeps the dtype of the model; give dtype instead."
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
