"""What the gate compiles: every launcher, on memory that nobody touches, in all that the JIT specialises on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import artefacts
from gapo_kernels import kernels
from gapo_kernels.head import Head
from gapo_kernels.kernels import config, perturbation, tuning
from gapo_kernels.perturbation import Move

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {"float32": F32, "bfloat16": BF16, "float16": F16, "float64": F64}
Launch = Callable[[], object]


def loss_path(
    dtype,
    pairs=2,
    length=3,
    vocabulary=50257,
    offset=0,
    large=False,
    inplace=False,
    packed=False,
    others=False,
    alone=False,
    more=0,
    padding=0,
) -> Launch:
    """`large`: logits in more than 2 GiB of storage. `others`: the other branch of everything that is compiled in. `alone`:
    without an anchor. `more` and `padding`: rows of each sequence, and columns, that a view of it leaves out."""
    sequences, width = 2 * pairs, vocabulary + padding
    rows, size = sequences * length, sequences * (length + more) * width
    storage = torch.empty(2**31 // dtype.itemsize + 1 if large else offset + size, dtype=dtype)
    logits = storage[offset : offset + size].view(sequences, length + more, width)[:, :length, :vocabulary]
    labels = torch.zeros(sequences, length, dtype=torch.int64)
    cu_seqlens = None
    if packed:
        logits, labels = logits.flatten(0, 1), labels.flatten()
        cu_seqlens = torch.arange(0, rows + 1, length, dtype=torch.int32)
    anchor, margin = None if others or alone else logits, torch.zeros(pairs) if others else None
    scalars = (2.0, 0.5, 0.1, "hinge" if others else "sigmoid", not others, 0.2, not others, -100)

    def launch():
        _, row_max, row_sum = kernels.loss_forward(
            logits, labels, anchor, margin, cu_seqlens, *scalars, "none" if others or alone else "mean"
        )
        kernels.logps_forward(logits, labels, cu_seqlens, not others, not others, -100)
        kernels.logps_backward(
            torch.zeros(sequences), logits, labels, cu_seqlens, row_max, row_sum, not others, -100, inplace=inplace
        )

    return launch


def linear_path(dtype, rows=3, vocabulary=50257, first=1) -> Launch:
    """The head on a tile of rows that begins within kept logits, at an odd multiple of an odd vocabulary."""
    head = Head(torch.empty(vocabulary, 1, dtype=dtype), None, None, 1.0, kernels)
    logits = torch.empty(first + rows, vocabulary, dtype=dtype)[first:]
    labels = torch.zeros(rows, dtype=torch.int64)

    def launch():
        statistics = head.statistics(logits, labels)
        head.differentiate_(logits, labels, statistics.shift, statistics.total, torch.ones(rows))

    return launch


def perturbation_path(
    theta_dtype, direction_dtype, grid, geometry="asam", stochastic=True, n=3 * 8192 + 17, offset=0, first=0, seed=5, step=2, moves=1
) -> Launch:
    def tensor(dtype):
        return torch.empty(offset + n, dtype=dtype)[offset:]

    def launch():
        subject = perturbation.Perturbation(
            [Move(tensor(theta_dtype), tensor(direction_dtype), tensor(theta_dtype), grid, i, first) for i in range(moves)],
            geometry,
            stochastic,
        )
        subject.squared_norm()
        subject.exchange(0.1, seed, step)
        subject.restore()
        subject.fill_with_noise([tensor(direction_dtype) for _ in range(moves)], [(first, i, 0) for i in range(moves)], step, seed)

    return launch


# An odd vocabulary on an aligned base is the ordinary case (GPT-2's); then what the JIT specialises on: pointers that
# are not aligned, storage beyond 2 GiB (AMD addresses less by buffer and 32-bit offset, more by pointer), and every
# compiled-in choice the other way round.
ORDINARY, UNALIGNED = "ordinary", "unaligned base"
LOSS_CASES = {
    ORDINARY: dict(),
    UNALIGNED: dict(offset=3),
    "beyond 2 GiB": dict(large=True, inplace=True),
    "packed": dict(packed=True),
    "packed, hinge, summed, given margin": dict(packed=True, others=True),
    "no anchor": dict(alone=True),
}
LINEAR_CASES = {ORDINARY: dict(first=0), UNALIGNED: dict()}
# Sizes that the JIT could make constants of, or take for divisible by 16. They must compile to the first case's binaries.
LOSS_SIZES = {
    "B = 1, T = 1": dict(pairs=1, length=1),
    "V = 128256": dict(pairs=8, length=16, vocabulary=128256),
    "V = 1": dict(vocabulary=1),
    "all rows but the last": dict(length=16, more=1),
    "all rows but the last, V = 128256": dict(length=16, vocabulary=128256, more=1),
    "the first rows of more": dict(more=8),
    "the first columns of more": dict(padding=47),
}

# (theta, direction, grid), options.
PERTURBATION_CASES = {
    "float32": ((F32, F32, F32), dict()),
    "bfloat16": ((BF16, BF16, BF16), dict()),
    "float16": ((F16, F16, F16), dict()),
    "float32 on bfloat16": ((F32, F32, BF16), dict()),
    "float32 on float16": ((F32, F32, F16), dict()),
    "float32 gradients": ((BF16, F32, BF16), dict()),
    "bfloat16 gradients": ((F32, BF16, BF16), dict()),
    "wider grid": ((BF16, BF16, F32), dict()),
    "sam": ((BF16, BF16, BF16), dict(geometry="sam")),
    "nearest": ((BF16, BF16, BF16), dict(stochastic=False)),
    "shard": ((BF16, BF16, BF16), dict(first=2 * 8192 + 16)),
    "shard of masters": ((F32, F32, BF16), dict(first=2 * 8192 + 16)),
    "float32 shard": ((F32, F32, F32), dict(first=2 * 8192 + 16)),
}
# With accesses of one element each, and for gradcheck.
UNALIGNED_CASES = {
    "unaligned": ((BF16, BF16, BF16), dict(offset=1)),
    "unaligned float16": ((F16, F16, F16), dict(offset=1)),
    "unaligned float32": ((F32, F32, F32), dict(offset=1)),
    "unaligned shard": ((BF16, BF16, BF16), dict(first=2 * 8192 + 1)),
}
PERTURBATION_CASES |= UNALIGNED_CASES | {"float64": ((F64, F64, F64), dict())}
# A new seed, step, number or size of parameters must not compile again.
PERTURBATION_SIZES = {
    "zeros": dict(seed=0, step=0),
    "ones": dict(seed=1, step=1),
    "all bits": dict(seed=2**64 - 1, step=2**32 - 1),
    "2^31, 16": dict(seed=2**31, step=16),
    "one weight": dict(seed=2**63 + 2**32, n=1),
    "two whole parameters": dict(n=16 * 8192, moves=2),
    "16 small parameters": dict(n=5, moves=16),
}

def candidates(target: str, what: str) -> dict[str, tuple[str, dict[str, int]]]:
    """Case -> (kernel of config.TABLE, parameters)."""
    every = {kernel: tuning.candidates(kernel, target, DTYPES[what]) for kernel in config.TABLE}
    return {f"{kernel} with {parameters}": (kernel, parameters) for kernel in every for parameters in every[kernel]}


class Job(NamedTuple):
    """What one process compiles at a time."""

    group: str  # of JOBS
    target: str
    what: str  # a dtype, or one of the perturbation's cases

    def __str__(self) -> str:
        return "-".join(self)


def loss_launches(target: str, what: str) -> dict[str, Launch]:
    every = (LOSS_CASES | LOSS_SIZES).items()
    # float64 is for gradcheck: never that large
    return {case: loss_path(DTYPES[what], **o) for case, o in every if what != "float64" or not o.get("large")}


def linear_launches(target: str, what: str) -> dict[str, Launch]:
    return {case: linear_path(DTYPES[what], **options) for case, options in LINEAR_CASES.items()}


def perturbation_launches(target: str, what: str) -> dict[str, Launch]:
    dtypes, options = PERTURBATION_CASES[what]
    sizes = PERTURBATION_SIZES if what == "bfloat16" else {}
    return {case: perturbation_path(*dtypes, **options, **size) for case, size in ({ORDINARY: {}} | sizes).items()}


def candidate_launches(target: str, what: str) -> dict[str, Launch]:
    """What tuning times."""

    def launch(kernel, parameters):
        with config.forced(**{kernel: parameters}):
            tuning.workload(kernel, torch.device("cpu"), DTYPES[what], scratch_bytes=1)()

    every = candidates(target, what)
    return {case: partial(launch, kernel, parameters) for case, (kernel, parameters) in every.items()}


GROUPS = {
    "loss": loss_launches,
    "linear": linear_launches,
    "perturbation": perturbation_launches,
    "candidates": candidate_launches,
}
JOBS = [
    *(Job(group, target, what) for group in ("loss", "linear") for target in artefacts.TARGETS for what in DTYPES),
    *(Job("perturbation", target, what) for target in artefacts.TARGETS for what in PERTURBATION_CASES),
    *(Job("candidates", target, "bfloat16") for target in artefacts.TARGETS),
    *(Job("candidates", target, "float32") for target in ("sm_90", "gfx942")),
    Job("candidates", "sm_90", "float16"),
]

# By their hash: cases and jobs share kernels, and to disassemble one takes longer than to compile it.
_read: dict[str, artefacts.Artefact] = {}


def compile_job(job: Job) -> dict[str, dict[str, artefacts.Artefact]]:
    """Case -> kernel -> what came out."""
    result = {}
    for case, launch in GROUPS[job.group](job.target, job.what).items():
        try:
            compiled = artefacts.compile_launches(launch, job.target)
        except Exception as error:
            raise RuntimeError(f"{job}, {case}: {error}") from error
        for name, kernel in compiled.items():
            if kernel.hash not in _read:
                _read[kernel.hash] = artefacts.read(kernel, job.target)
        result[case] = {name: _read[kernel.hash] for name, kernel in compiled.items()}
    return result
