"""Plans: what a file must hold, what fits together, what the default is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from skvq_ext.geometry import GeometryError
from skvq_ext.hadamard import block_hadamard, hadamard
from skvq_ext.plan import Geometry, LayerPlan, Plan, PlanError, TensorPlan, default_clip
from skvq_ext.plan_file import _ENTRY
from skvq_ext.scheme import Scheme

GEOMETRY = Geometry(
    num_layers=2,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=64,
    hidden_size=384,
    vocab_size=1000,
    rope_theta=10000.0,
    rope_parameters='{"rope_theta": 10000.0}',
    model_type="llama",
    sliding_windows=(0, 32),
)
SCHEME = Scheme.parse("k3:1/2+2-v1.5-g32-centre-balance-hadamard-clip")


def random_plan(geometry: Geometry = GEOMETRY, scheme: Scheme = SCHEME, seed: int = 0) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    heads, dim = geometry.num_kv_heads, geometry.head_dim
    plan = Plan(scheme, geometry, [], origin="made in a test")

    def tensor(name: str, rotation: str) -> TensorPlan:
        one = TensorPlan.neutral(heads, plan.shapes[name], (-3, 1))
        one.permutation = torch.stack(
            [torch.randperm(dim, generator=generator, dtype=torch.int32) for _ in range(heads)]
        )
        one.shift = torch.randn(heads, dim, generator=generator)
        one.scale = torch.rand(heads, dim, generator=generator) + 0.5
        several = (*one.clip.shape, 3) if rotation == "dense" else one.clip.shape
        one.clip = torch.rand(several, generator=generator) / 2 + 0.5
        one.rotation = rotation
        if rotation == "dense":
            one.dense = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator)).Q
        return one

    for rotation in ("hadamard", "dense", "none")[: geometry.num_layers]:
        plan.layers.append(LayerPlan(tensor("k", rotation), tensor("v", "hadamard")))
    return plan


def edited(path: Path, change: dict[str, Tensor | None], header: dict[str, object]) -> Path:
    """A copy of a plan file with tensors replaced (None: removed) and header fields changed."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()[_ENTRY])
    tensors = {k: v for k, v in (load_file(path) | change).items() if v is not None}
    out = path.with_suffix(".edited.safetensors")
    save_file(tensors, out, metadata={_ENTRY: json.dumps(entry | header)})
    return out


@pytest.mark.parametrize("order", range(16, 513, 16))
def test_hadamard_of_every_band_size(order: int) -> None:
    matrix = hadamard(order)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order).double(), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), atol=1e-15)


def test_hadamard_that_does_not_exist_is_refused() -> None:
    for order in (6, 92):  # 92 exists, but not by these constructions
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order}"):
            hadamard(order)
    with pytest.raises(ValueError, match="at least 1"):
        hadamard(0)


def test_block_hadamard_stays_inside_its_bands() -> None:
    matrix = block_hadamard((0, 16, 64))
    assert not matrix[:16, 16:].any() and not matrix[16:, :16].any()
    assert torch.equal(matrix[:16, :16], hadamard(16))


def test_file_round_trips_and_is_deterministic(tmp_path: Path) -> None:
    plan = random_plan()
    plan.save(tmp_path / "a.safetensors")
    random_plan().save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    read = Plan.load(tmp_path / "a.safetensors", GEOMETRY, SCHEME)
    assert (read.scheme, read.geometry, read.origin) == (plan.scheme, plan.geometry, plan.origin)
    for (*where, mine), (*there, theirs) in zip(
        plan.named_tensors(), read.named_tensors(), strict=True
    ):
        assert where == there
        assert (mine.rotation, mine.band_edges) == (theirs.rotation, theirs.band_edges)
        for part, value in mine.tensors().items():
            assert torch.equal(value, theirs.tensors()[part])


def test_scheme_of_other_window_and_sinks_fits(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    random_plan().save(path)
    Plan.load(path, GEOMETRY, replace(SCHEME, window=0, sinks=64, rollback=0))
    Plan.load(path, GEOMETRY, Scheme.parse("k3:1/2+2-v1.5-g32"))
    Plan.load(path, Geometry(2, 6, 2, 64), SCHEME)  # what is not known is not compared


def test_every_differing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    random_plan().save(path)
    other = replace(GEOMETRY, num_layers=3, vocab_size=7, sliding_windows=(0, 0, 0))
    with pytest.raises(PlanError) as caught:
        Plan.load(path, other, Scheme.parse("k4-v1.5-g32-fp16"))
    text = str(caught.value)
    for line in (
        "num_layers: 3 here, 2 in the plan",
        "vocab_size: 7 here, 1000 in the plan",
        "sliding_windows: (0, 0, 0) here, (0, 32) in the plan",
        "k: '4' here, '3:1/2+2' in the plan",
        "meta: 'fp16' here, 'fp8' in the plan",
    ):
        assert line in text
    assert "head_dim" not in text


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("shift", torch.full((2, 64), float("nan")), "holds NaN or infinity"),
        ("scale", torch.full((2, 64), float("inf")), "holds NaN or infinity"),
        ("scale", torch.zeros(2, 64), "scale is not positive"),
        ("clip", torch.full((2, 2), 1.5), r"clip is outside \(0, 1\]"),
        ("clip", torch.ones(2, 3), r"need torch.float32 \[2, 2\]"),
        ("clip", torch.ones(2, 2, 9), r"need torch.float32 \[2, 2\]"),
        ("clip", torch.ones(2, 3, 2), r"need torch.float32 \[2, 2, 2\]"),
        ("shift", torch.zeros(3, 64), r"is torch.float32 \[3, 64\]; the model and scheme need"),
        ("shift", torch.zeros(2, 64).double(), "is torch.float64"),
        ("permutation", torch.zeros(2, 64, dtype=torch.int32), "permutation is not one"),
        ("exponents", torch.full((2, 2), 1000, dtype=torch.int32), "exponents are outside"),
        ("dense", torch.ones(2, 64, 64), "dense rotation is not orthogonal"),
        ("dense", None, "rotation and 'dense' disagree"),
        ("clip", None, "is damaged: 'layers.001.k.clip'"),
        ("extra", torch.zeros(1), "holds tensors no plan has"),
    ],
)
def test_damaged_tensors_are_refused(
    tmp_path: Path, part: str, value: Tensor | None, message: str
) -> None:
    path = tmp_path / "plan.safetensors"
    random_plan().save(path)
    with pytest.raises(PlanError, match=message):
        Plan.load(edited(path, {f"layers.001.k.{part}": value}, {}))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"schema": 99}, "has plan schema 99; this version reads schema 2"),
        ({"rope_mode": "pre"}, "rope mode 'pre'; this version caches keys after RoPE"),
        ({"layers": [{"rotations": ["none", "none"]}]}, "the plan has 1 layers for a model of 2"),
        ({"layers": [{"rotations": ["none", "spin"]}] * 2}, "rotation 'spin' is not one of"),
        ({"scheme": "k2-reorder"}, "is damaged: 'reorder' is a key of the original"),
        ({"geometry": {"num_layers": 2}}, "is damaged: these fields do not describe a model"),
    ],
)
def test_damaged_headers_are_refused(
    tmp_path: Path, header: dict[str, object], message: str
) -> None:
    path = tmp_path / "plan.safetensors"
    random_plan().save(path)
    dense = {"layers.001.k.dense": None} if "spin" in str(header) else {}
    with pytest.raises(PlanError, match=message):
        Plan.load(edited(path, dense, header))


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make one with 'skvq calibrate'"):
        Plan.load(tmp_path / "none.safetensors")
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(PlanError, match="but not a plan"):
        Plan.load(path)
    torch.save({"a": 1}, path)
    with pytest.raises(PlanError, match="is not a safetensors file"):
        Plan.load(path)
    save_file({"weight": torch.ones(1)}, path, metadata={_ENTRY: "{"})
    with pytest.raises(PlanError, match="header is not JSON"):
        Plan.load(path)


def test_a_broken_plan_is_not_written(tmp_path: Path) -> None:
    plan = random_plan()
    plan.layers[0].v.shift[1, 3] = float("nan")
    with pytest.raises(PlanError, match=r"layers\.000 v\.shift holds NaN"):
        plan.save(tmp_path / "plan.safetensors")
    assert not list(tmp_path.iterdir())


def test_default_plan_rotates_and_clips(tmp_path: Path) -> None:
    plan = Plan.default(GEOMETRY, Scheme.parse("k3:1/2+2-v1.5-g32"))
    assert plan.scheme.transform == {"hadamard"}
    layer = plan.layers[1]
    assert (layer.k.rotation, layer.v.rotation) == ("hadamard", "hadamard")
    assert layer.k.band_edges == (0, 32, 64) and layer.v.band_edges == (0, 64)
    assert layer.k.exponents.tolist() == [[-2, 0]] * 2
    assert layer.v.exponents.tolist() == [[-5, -4]] * 2
    assert layer.k.clip[0].tolist() == pytest.approx([default_clip(8, 32), default_clip(4, 32)])
    plan.save(tmp_path / "plan.safetensors")
    Plan.load(tmp_path / "plan.safetensors", GEOMETRY, plan.scheme)


def test_default_plan_follows_the_scheme() -> None:
    identity = Plan.default(GEOMETRY, Scheme.parse("k2-v2-identity")).layers[0]
    assert identity.k.rotation == "none" and bool((identity.k.clip == 1).all())
    clipped = Plan.default(GEOMETRY, Scheme.parse("k2-v2-identity-clip0.92")).layers[0]
    assert clipped.v.rotation == "none" and clipped.v.clip.tolist() == [[pytest.approx(0.92)]] * 2
    with pytest.raises(PlanError, match=r"balance and centre, which only calibration can give"):
        Plan.default(GEOMETRY, SCHEME)


@pytest.mark.parametrize("channels", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("levels", [3, 4, 8, 16, 256])
def test_default_clip_is_near_the_best_ratio_on_normal_data(levels: int, channels: int) -> None:
    x = torch.randn(400_000 // channels, channels, generator=torch.Generator().manual_seed(0))
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)

    def error(clip: float) -> float:
        half = (high - low) / 2 * clip
        zero, step = (low + high) / 2 - half, 2 * half / (levels - 1)
        codes = ((x - zero) / step).round().clamp(0, levels - 1)
        return float((codes * step + zero - x).square().mean())

    best = min(error(ratio / 50) for ratio in range(15, 51))
    assert error(default_clip(levels, channels)) <= 1.05 * best


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(num_key_value_heads=8), (32, 32, 8, 128)),
        (MistralConfig(sliding_window=None), (32, 32, 8, 128)),
        (Qwen2Config(num_attention_heads=28, hidden_size=3584), (32, 28, 32, 128)),
        (Qwen3Config(num_attention_heads=64, num_key_value_heads=8), (32, 64, 8, 128)),
        (Gemma3TextConfig(), (26, 8, 4, 256)),
        (Gemma3Config(), (26, 8, 4, 256)),
        (Phi3Config(), (32, 32, 32, 96)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_geometry_from_config(config: object, expected: tuple[int, ...]) -> None:
    if expected[1] % expected[2]:
        with pytest.raises(GeometryError, match="28 is not a multiple of num_kv_heads 32"):
            Geometry.from_config(config)
        return
    geometry = Geometry.from_config(config)
    found = (geometry.num_layers, geometry.num_q_heads, geometry.num_kv_heads, geometry.head_dim)
    assert found == expected
    assert Geometry.from_config(config.to_dict()) == geometry  # type: ignore[attr-defined]
    assert Geometry.from_dict(json.loads(json.dumps(geometry.as_dict()))) == geometry
    assert geometry.rope_theta is not None and geometry.rope_parameters is not None


def test_geometry_reads_sliding_windows_and_old_rope_fields() -> None:
    gemma = Geometry.from_config(Gemma3TextConfig(sliding_window=512))
    assert gemma.sliding_windows is not None
    assert gemma.sliding_windows[:7] == (512, 512, 512, 512, 512, 0, 512)
    assert gemma.rope_theta == 1_000_000.0
    assert Geometry.from_config(MistralConfig()).sliding_windows == (4096,) * 32
    old = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256}
    plain = Geometry.from_config(old | {"rope_theta": 5e5, "model_type": "llama"})
    assert (plain.num_kv_heads, plain.head_dim, plain.rope_theta) == (4, 64, 5e5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DeepseekV3Config(), "caches a latent"),
        ({"model_type": "gpt"}, "the configuration of 'gpt' has no 'num_attention_heads'"),
        (LlamaConfig(num_hidden_layers=2).to_dict() | {"layer_types": ["mamba"] * 2}, "'mamba'"),
        (LlamaConfig().to_dict() | {"num_kv_shared_layers": 3}, "shares K and V between layers"),
        (LlamaConfig().to_dict() | {"global_head_dim": 512}, "two head sizes"),
    ],
)
def test_foreign_attention_is_refused(config: object, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        Geometry.from_config(config)


def test_geometry_built_by_hand_is_checked() -> None:
    with pytest.raises(GeometryError, match="num_layers must be at least 1"):
        Geometry(0, 1, 1, 64)
    with pytest.raises(GeometryError, match="has 1 entries for 2 layers"):
        Geometry(2, 1, 1, 64, sliding_windows=(0,))
