"""What is read during calibration: whole pieces, pieces that come back, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from skvq_ext.calibrate import CalibrationError
from skvq_ext.calibrate.texts import (
    LESSONS,
    SEGMENT,
    check_texts,
    make_segments,
    packaged_text,
    read_tokens,
)


def letters(text: str) -> Tensor:
    """One token per character, [1, n], as tokenizers give them."""
    return torch.tensor([[ord(letter) for letter in text]])


def kinds(segments: Tensor) -> list[bool]:
    """Of segments of an ascending text: whether each is the text as it is."""
    return [bool((ids.diff() == 1).all()) for ids in segments]


def test_half_of_the_segments_are_text_and_half_recall_it() -> None:
    segments = make_segments([torch.arange(20_000)], 8192, seed=0).judged
    assert segments.shape == (4, SEGMENT) and segments.dtype == torch.int64
    assert kinds(segments) == [True, True, False, False]
    assert len(set(segments[:, 0].tolist())) == 4, "from different places"
    for ids in segments[2:]:
        first, again = ids.split(SEGMENT // 2)
        assert bool((first.diff() == 1).all())
        assert torch.equal(again.sort().values, first), "every token comes back once"
        breaks = (again.diff() != 1).nonzero().flatten() + 1
        pieces = torch.tensor([0, *breaks.tolist(), len(again)]).diff()
        assert 10 < len(pieces) < 44 and pieces.max() <= 2 * 96  # neighbours may meet again


@pytest.mark.parametrize(("tokens", "most"), [(20_000, 4), (60_000, LESSONS), (9_000, 1)])
def test_lessons_are_text_that_nothing_is_judged_on(tokens: int, most: int) -> None:
    segments = make_segments([torch.arange(tokens)], 4096, seed=0)
    lessons = segments.lessons
    assert 1 <= len(lessons) <= LESSONS and len(lessons) >= most
    assert lessons.shape[1] == SEGMENT and all(kinds(lessons))
    assert len(lessons.unique()) == lessons.numel(), "no token twice"
    # The second judged segment says less of its own piece than the first: it recalls one half.
    judged = set(segments.judged.flatten().tolist())
    assert not judged & set(lessons.flatten().tolist())
    assert torch.equal(segments.together, torch.cat([segments.judged, lessons]))


def test_a_short_text_is_read_as_it_is_and_recalled() -> None:
    whole = make_segments([torch.arange(501)], 4096, seed=0)
    segments = whole.judged
    assert whole.lessons.shape == (0, 501), "nothing is left for lessons"
    assert segments.shape == (2, 501) and kinds(segments) == [True, False]
    kept, again = segments[1].split([251, 250])
    assert torch.equal(kept, torch.arange(251))
    assert torch.equal(again.sort().values, torch.arange(250))
    assert make_segments([torch.arange(501)], 501, seed=0).judged.tolist() == [list(range(501))]
    assert make_segments([torch.arange(501)], 400, seed=0).judged.shape == (1, 400)


def test_several_texts_are_one() -> None:
    parts = torch.arange(5000).split([100, 2900, 2000])
    whole, cut = (make_segments(x, 4096, seed=0).together for x in ([torch.arange(5000)], parts))
    assert torch.equal(whole, cut)


def test_the_seed_decides() -> None:
    one, same, other = (make_segments([torch.arange(9000)], 8192, seed=n).judged for n in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_segments_reach_behind_any_window() -> None:
    segments = make_segments([torch.arange(20_000)], 12_000, seed=0, least=3000).judged
    assert segments.shape == (2, 6000)
    with pytest.raises(CalibrationError, match=r"max_tokens is 2999, too few .* least 3000"):
        make_segments([torch.arange(20_000)], 2999, seed=0, least=3000)


def test_the_text_that_comes_with_the_package() -> None:
    text = packaged_text()
    assert len(text) > 50_000 and "\N{REPLACEMENT CHARACTER}" not in text


def test_tokens_are_read_from_text_and_from_safetensors(tmp_path: Path) -> None:
    text, ids = tmp_path / "text.md", tmp_path / "ids.safetensors"
    text.write_text("Grüße", encoding="utf-8")
    assert read_tokens(text, letters).tolist() == [71, 114, 252, 223, 101]
    save_file({"any name": torch.arange(7)}, ids)
    assert torch.equal(read_tokens(ids, letters), torch.arange(7))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin, many, none = (tmp_path / name for name in ("a.txt", "b.safetensors", "c.safetensors"))
    latin.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"a\.txt is not UTF-8 text \(.* at byte 2\)"):
        read_tokens(latin, letters)
    save_file({"a": torch.arange(7), "b": torch.arange(7)}, many)
    with pytest.raises(CalibrationError, match="holds 2 tensors; token ids are one"):
        read_tokens(many, letters)
    none.write_bytes(b"no header")
    with pytest.raises(CalibrationError, match=r"c\.safetensors is not a safetensors file"):
        read_tokens(none, letters)


def test_texts_of_any_integer_type_and_one_row() -> None:
    texts = check_texts([torch.arange(40)[None], torch.arange(60, dtype=torch.int32)], 100, 60)
    assert [x.tolist() for x in texts] == [list(range(40)), list(range(60))]
    assert all(x.dtype == torch.int64 for x in texts)
    (one,) = check_texts(torch.arange(100, dtype=torch.uint8), 100, None)
    assert one.tolist() == list(range(100))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(99, dtype=torch.int64), "the text has 99 tokens, too few .* least 100"),
        ([torch.zeros(40, dtype=torch.int64)] * 2, "the text has 80 tokens"),
        ([], "the text has 0 tokens"),
        (torch.full((100,), 128), r"from 128 to 128, the model's vocabulary has 128"),
        (torch.full((100,), -1), "Use the tokenizer of this model"),
        (torch.zeros(100), r"token_ids is torch.float32 \[100\]"),
        (torch.zeros(2, 100, dtype=torch.int64), r"int64 \[2, 100\]; calibration reads texts"),
    ],
)
def test_unusable_tokens_are_refused(ids: Tensor | list[Tensor], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        check_texts(ids, 100, 128)
