"""What a model reads during calibration: text as it is, and text that it has to recall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SEGMENT = 2048  # tokens a model reads at once: far beyond a window
LESSONS = 6  # segments, where there is as much text; few more make better rotations
_PIECES = (24, 97)  # tokens of a piece that comes back, from and below
PACKAGED = Path(__file__).with_name("text.txt")  # an old novel and technical prose


class CalibrationError(ValueError):
    """A text or a model that cannot be calibrated on."""


def packaged_text() -> str:
    """The small text that is used where none is given."""
    return PACKAGED.read_text(encoding="utf-8")


def read_tokens(path: Path, encode: Callable[[str], Tensor]) -> Tensor:
    """Token ids int64 [n] of a UTF-8 text, or of a safetensors file with one integer tensor [n].

    Raises: CalibrationError for a file that is neither.
    """
    if path.suffix != ".safetensors":
        try:
            return encode(path.read_text(encoding="utf-8"))[0].cpu()
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it, or "
                "give token ids in a .safetensors file."
            ) from None
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CalibrationError(f"{path} is not a safetensors file: {error}.") from None
    if len(tensors) != 1:
        raise CalibrationError(
            f"{path} holds {len(tensors)} tensors; token ids are one integer tensor [n]."
        )
    (ids,) = tensors.values()
    return ids


def check_texts(
    token_ids: Tensor | Sequence[Tensor], least: int, vocab: int | None
) -> list[Tensor]:
    """Texts as a list of int64 [n] on the CPU.

    Args: token_ids, one text [n] or [1, n] or several; least, tokens of all that are needed; vocab,
    tokens the model knows. Raises: CalibrationError.
    """
    given = [token_ids] if isinstance(token_ids, Tensor) else list(token_ids)
    texts = [x[0] if x.dim() == 2 and x.shape[0] == 1 else x for x in given]
    for ids in texts:
        if ids.dim() != 1 or ids.is_floating_point():
            raise CalibrationError(
                f"token_ids is {ids.dtype} {list(ids.shape)}; calibration reads texts "
                "of integer ids [n]."
            )
    total = sum(len(ids) for ids in texts)
    if total < least:
        raise CalibrationError(
            f"the text has {total} tokens, too few to calibrate on: at least {least} are "
            "needed, and a few thousand are better. Give a longer text."
        )
    texts = [ids.long().cpu() for ids in texts]
    low, high = (int(x) for x in torch.cat(texts).aminmax())
    if vocab is not None and (low < 0 or high >= vocab):
        raise CalibrationError(
            f"token ids reach from {low} to {high}, the model's vocabulary "
            f"has {vocab}. Use the tokenizer of this model."
        )
    return texts


@dataclass(frozen=True)
class Segments:
    """Equally long segments.

    judged: int64 [n, tokens], what errors are measured on. lessons: int64 [m, tokens], other text
    that transforms are made from; m = 0 where there is none.
    """

    judged: Tensor
    lessons: Tensor

    def __str__(self) -> str:
        return f"{self.judged.numel()} tokens after lessons from {self.lessons.numel()}"

    @property
    def together(self) -> Tensor:
        """int64 [n + m, tokens]."""
        return torch.cat([self.judged, self.lessons])


def make_segments(texts: Sequence[Tensor], max_tokens: int, seed: int, least: int = 1) -> Segments:
    """Half of the judged segments are text as it is, half pieces of it in two orders.

    A text seldom asks for an exact detail from far back, and keys that serve this are the first to
    suffer at two bits. In the second kind of segment every piece of the first half comes back in
    the second half, so that it can be recalled.
    Args: texts, int64 [n] each; max_tokens of all that is judged; least, tokens a segment needs.
    Returns: segments of no more tokens each than SEGMENT or, if more, twice `least`.
    Raises: CalibrationError where max_tokens is less than one segment needs.
    """
    if max_tokens < least:
        raise CalibrationError(
            f"max_tokens is {max_tokens}, too few to calibrate on: at least {least} are needed "
            "with this window and these sinks, and a few thousand are better."
        )
    ids = torch.cat(list(texts))
    length = min(max(SEGMENT, 2 * least), len(ids), max_tokens)
    count = max_tokens // length
    plain = (count + 1) // 2
    starts = torch.linspace(0, len(ids) - length, count + 2)[1:-1].long().tolist()
    if length == len(ids):
        plain, starts = 1, [0] * min(count, 2)
    dice = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(starts), generator=dice).tolist()
    chosen = [ids[starts[i] : starts[i] + length] for i in order]
    judged = [*chosen[:plain], *(_recalled(part, dice) for part in chosen[plain:])]
    free = _between(starts, length, len(ids))
    picked = torch.linspace(0, len(free) - 1, min(len(free), LESSONS)).long().tolist()
    lessons = [ids[free[i] : free[i] + length] for i in picked]
    return Segments(
        torch.stack(judged), torch.stack(lessons) if lessons else ids.new_empty(0, length)
    )


def _between(taken: Sequence[int], length: int, total: int) -> list[int]:
    """Where segments begin that lie between those that begin at `taken`."""
    found: list[int] = []
    at = 0
    for end in (*sorted(taken), total):
        found += range(at, end - length + 1, length)
        at = max(at, end + length)
    return found


def _recalled(ids: Tensor, dice: torch.Generator) -> Tensor:
    """The first half of a segment, then its pieces in another order."""
    half, pieces, start = len(ids) // 2, [], 0
    while start < half:
        size = int(torch.randint(*_PIECES, (1,), generator=dice))
        pieces.append(ids[start : min(half, start + size)])
        start += size
    order = torch.randperm(len(pieces), generator=dice).tolist()
    again = torch.cat([pieces[i] for i in order])
    return torch.cat([ids[: len(ids) - len(again)], again])
