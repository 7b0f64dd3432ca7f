"""A search that is interrupted goes on where it stopped, and only where everything agrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrate_models import BUDGET, PAIRS, make_lively, run, short_search
from hf_models import make_model, make_tokens

from skvq_ext.calibrate import run as module
from skvq_ext.calibrate.resume import Progress, fingerprint, forget
from skvq_ext.calibrate.texts import make_segments
from skvq_ext.geometry import Geometry
from skvq_ext.scheme import Scheme

__all__ = ["short_search"]
QUICK = replace(BUDGET, transform=frozenset({"hadamard"}))


class Interrupted(Exception):
    """What a user does with Ctrl-C."""


def stop_at(name: str, done: int) -> Callable[..., None]:
    def step(*call: object) -> None:
        if call[:2] == (name, done):
            raise Interrupted

    return step


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed rather than read: "fisher", and "head" for every head of a layer."""
    calls: list[str] = []

    def counted(short: str, made: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (calls.append(short), made(*args))[1]

    monkeypatch.setattr(module, "fisher", counted("fisher", module.fisher))
    monkeypatch.setattr(module, "search_head", counted("head", module.search_head))
    return calls


def interrupt(model: Any, kept: Path, scheme: Scheme = QUICK, **options: Any) -> None:
    """A search that ends after the first of its two layers."""
    with pytest.raises(Interrupted):
        run(model, scheme, resume=kept, progress=stop_at("searching layers", 1), **options)


@pytest.mark.usefixtures("short_search")
def test_an_interrupted_search_ends_in_the_same_bytes(tmp_path: Path, searched: list[str]) -> None:
    model, kept = make_lively(), tmp_path / "plan.partial"
    paths = [tmp_path / name for name in ("whole.safetensors", "continued.safetensors")]
    run(model).save(paths[0])
    assert searched == ["fisher", *["head"] * 4]
    searched.clear()
    interrupt(model, kept, BUDGET)
    (mark,) = kept.iterdir()
    assert sorted(x.name for x in mark.iterdir()) == ["fisher.safetensors", "layer000.safetensors"]
    assert searched == ["fisher", *["head"] * 2]
    run(model, resume=kept).save(paths[1])
    assert searched == ["fisher", *["head"] * 4], "nothing twice"
    assert paths[0].read_bytes() == paths[1].read_bytes()
    forget(kept)
    assert not kept.exists()
    forget(kept)


def test_weights_of_heads_are_kept_once_they_are_complete(
    tmp_path: Path, searched: list[str]
) -> None:
    model, kept = make_model("llama"), tmp_path / "kept"
    with pytest.raises(Interrupted):
        run(model, QUICK, resume=kept, progress=stop_at("weighing heads", 1))
    run(model, QUICK, resume=kept)
    assert searched == ["fisher", "fisher", *["head"] * 4]


@pytest.mark.parametrize("name", ["fisher", "layer000"])
def test_a_file_that_was_cut_off_is_made_again(
    name: str, tmp_path: Path, searched: list[str]
) -> None:
    model, kept = make_model("llama"), tmp_path / "kept"
    interrupt(model, kept)
    (cut,) = kept.glob(f"*/{name}.safetensors")
    cut.write_bytes(cut.read_bytes()[:-100])
    searched.clear()
    plan = run(model, QUICK, resume=kept)
    again = ["fisher", *["head"] * 2] if name == "fisher" else ["head"] * 4
    assert searched == again
    expected, found = tmp_path / "expected.safetensors", tmp_path / "found.safetensors"
    run(model, QUICK).save(expected)
    plan.save(found)
    assert expected.read_bytes() == found.read_bytes()


def test_another_budget_goes_on_and_another_seed_starts_anew(
    tmp_path: Path, searched: list[str]
) -> None:
    model, kept = make_model("llama"), tmp_path / "kept"
    mine = kept / "of the user"
    mine.mkdir(parents=True)
    (mine / "letter.txt").touch()
    interrupt(model, kept)
    searched.clear()
    interrupt(model, kept, seed=1)
    assert searched == ["fisher", *["head"] * 2]
    assert len(list(kept.glob("search-*"))) == 1
    searched.clear()
    run(model, replace(QUICK, bits=2.2), seed=1, resume=kept)
    assert searched == ["head"] * 2
    forget(kept)
    assert [x.name for x in kept.iterdir()] == ["of the user"] and (mine / "letter.txt").exists()


def test_what_decides_the_layers_decides_the_mark() -> None:
    model, scheme = make_model("llama"), QUICK
    geometry = Geometry.from_config(model.config)
    segments = make_segments([make_tokens(300)[0]], 300, 0).together
    first = fingerprint(model, geometry, scheme, segments, PAIRS, 0)
    same = [
        fingerprint(make_model("llama"), geometry, scheme, segments.clone(), list(PAIRS), 0),
        fingerprint(model, geometry, replace(scheme, bits=4.0), segments, PAIRS, 0),
    ]
    assert set(same) == {first}
    others = [
        fingerprint(make_model("llama", seed=1), geometry, scheme, segments, PAIRS, 0),
        fingerprint(make_model("llama").bfloat16(), geometry, scheme, segments, PAIRS, 0),
        fingerprint(model, replace(geometry, rope_theta=7.0), scheme, segments, PAIRS, 0),
        fingerprint(model, geometry, replace(scheme, window=64), segments, PAIRS, 0),
        fingerprint(model, geometry, Scheme.parse("k2-v1.5"), segments, PAIRS, 0),
        fingerprint(model, geometry, scheme, segments + 1, PAIRS, 0),
        fingerprint(model, geometry, scheme, segments, PAIRS[:1], 0),
        fingerprint(model, geometry, scheme, segments, PAIRS, 1),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_without_a_directory_nothing_is_kept(tmp_path: Path) -> None:
    kept = Progress(None, "")
    matrices = [torch.eye(3), torch.ones(3, 3)]
    assert kept.fisher(lambda: matrices) is matrices
    kept.keep(0, [])
    assert kept.layer(0, {"k": {}, "v": {}}) is None
    run(make_model("llama"), QUICK)
    assert not list(tmp_path.iterdir())
