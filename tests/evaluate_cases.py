"""A synthetic but complete evaluation result, for tests of what reads one."""

from __future__ import annotations

import math

from skvq_ext.evaluate.result import (
    STRETCHES,
    FreeRun,
    GenerationResult,
    LayersResult,
    LossResult,
    MemoryResult,
    MethodEntry,
    MethodGeneration,
    MethodLayers,
    MethodLoss,
    MethodMemory,
    MethodNeedles,
    NeedlesResult,
    Repetition,
    Result,
    Setting,
    Text,
    TextLoss,
)

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 4, 6, 2, 64
LENGTHS, DEPTHS = (512, 1024, 2048, 4096), (0.0, 0.25, 0.5, 0.75, 1.0)
CONTEXTS = (4096, 32_768, 131_072, 1_000_000)
# The names test escaping: they come from the command line and from file names.
METHODS = (
    MethodEntry("full precision", "", 32.0, "full", "every token exact", 512),
    MethodEntry("k2-v1.5", "k2-v1.5", 2.05, "packed", "window 128, 5 sinks", 64),
    MethodEntry(
        "k3:1/2+2-v1.5, calibrated",
        "k3:1/2+2-v1.5@<plan>.safetensors",
        2.43,
        "packed",
        "window 128, 5 sinks",
        64,
    ),
    MethodEntry("KIVI k2-v2-g32", "kivi:k2-v2-g32", 3.0, "simulated", "residual 128, no sinks", 1),
)
HARM = (0.0, 0.12, 0.05, 0.3)  # how bad each method is made to look
TEXTS = (Text("novel.txt", 120_000, "ab" * 32), Text("hand & <book>.txt", 90_000, "cd" * 32))


def _wave(i: int) -> float:
    return 1 + 0.3 * math.sin(i)


def _loss() -> LossResult:
    methods = []
    for entry, harm in zip(METHODS, HARM, strict=True):
        texts = []
        for i, text in enumerate(TEXTS):
            above, stretches = harm * (1 + i / 10), [harm * _wave(s) for s in range(STRETCHES)]
            error = harm / 10
            texts.append(
                TextLoss(
                    text.name, 3 + i / 2 + above, 0.4 - harm / 5, above, error, tuple(stretches)
                )
            )
        nll, above = (sum(getattr(t, name) for t in texts) / 2 for name in ("nll", "above"))
        methods.append(MethodLoss(entry.name, nll, above, harm / 14, tuple(texts)))
    protocol = "2048 tokens of each text, each read as in single steps"
    return LossResult(protocol, 2048, 0, tuple(methods))


def _needles() -> NeedlesResult:
    asked = tuple(tuple(10 for _ in DEPTHS) for _ in LENGTHS)
    methods = []
    for entry, harm in zip(METHODS, HARM, strict=True):
        lost = [
            [min(10, round(20 * harm * row / 3 * (1 - depth))) for depth in DEPTHS]
            for row in range(len(LENGTHS))
        ]
        digits = tuple(tuple(10 - n for n in row) for row in lost)
        numbers = tuple(tuple(max(0, 2 - n) for n in row) for row in lost)
        methods.append(MethodNeedles(entry.name, digits, numbers))
    numbers = tuple(tuple(2 for _ in DEPTHS) for _ in LENGTHS)
    protocol = "2 haystacks per length, one number per depth"
    return NeedlesResult(protocol, LENGTHS, DEPTHS, asked, numbers, tuple(methods))


def _generation() -> GenerationResult:
    methods = []
    for entry, harm in zip(METHODS, HARM, strict=True):
        quarters = tuple(harm * (1 + q / 4) for q in range(4))
        stretches = tuple(harm * (1 + s / 40) * _wave(s) for s in range(STRETCHES))
        runs = tuple(
            FreeRun(
                text.name,
                round(20 / harm) if harm else None,
                Repetition(0.1 + harm, 0.3 - harm / 4, 0.7 - harm, round(400 * harm)),
                f"It was <b>{entry.name}</b> & so on.",
            )
            for text in TEXTS
        )
        agreement = tuple(1 - harm * (1 + q / 4) for q in range(4))
        methods.append(
            MethodGeneration(
                method=entry.name,
                kl=sum(quarters) / 4,
                kl_stderr=harm / 20,
                kl_quarters=quarters,
                kl_stretches=stretches,
                agreement=sum(agreement) / 4,
                agreement_quarters=agreement,
                drift=quarters[-1] / quarters[0] if harm else None,
                runs=runs,
            )
        )
    written = (Repetition(0.02, 0.35, 0.85, 0),) * 2
    excerpts = ("Once upon a time", "The <command> line")
    protocol = "prompts of 128 tokens, 2048 new ones, top-p 0.95"
    return GenerationResult(protocol, 128, 2048, written, excerpts, tuple(methods))


def _layers() -> LayersResult:
    def grid(factor: float) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(factor * (1 + layer / 2) * _wave(head) for head in range(Q_HEADS))
            for layer in range(LAYERS)
        )

    methods = tuple(
        MethodLayers(
            entry.name,
            None if entry.kind == "simulated" else grid(harm),
            grid(harm),
            tuple(tuple(1 - x / 2 for x in row) for row in grid(harm)),
        )
        for entry, harm in zip(METHODS, HARM, strict=True)
    )
    return LayersResult("1024 tokens, last query of each forward", 1024, methods)


def _memory() -> MemoryResult:
    methods = []
    for entry in METHODS:
        bits = 16.0 if entry.kind == "full" else entry.bits
        per_token = 2 * LAYERS * KV_HEADS * HEAD_DIM * bits / 8
        fixed = 200_000 if entry.kind == "packed" else 0
        total = tuple(round(per_token * n) + fixed for n in CONTEXTS)
        methods.append(MethodMemory(entry.name, entry.kind != "simulated", total, per_token))
    return MemoryResult("bfloat16 rows where not packed", CONTEXTS, tuple(methods))


def sample_result() -> Result:
    """All measurements, four methods: full precision, two packed ones, one simulated."""
    setting = Setting(
        model="tiny <model>",
        dtype="float32",
        device="cpu",
        seed=0,
        num_layers=LAYERS,
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        texts=TEXTS,
        calibration=Text("calibration.txt", 50_000, "ef" * 32),
        versions={"skvq_ext": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "isa": "avx2"},
    )
    times = {f"ppl: {entry.name}": 12.5 for entry in METHODS}
    return Result(setting, METHODS, _loss(), _needles(), _generation(), _layers(), _memory(), times)
