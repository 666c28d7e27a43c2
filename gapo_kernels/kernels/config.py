"""Launch parameters: the one place where they are chosen, with the evidence.

The kernels are bound by bandwidth. What a choice has to give is bytes in flight, enough to cover the memory's latency (of
about 1 us: 25 KB on each multiprocessor of an H100, 54 on a B200, 31 on an MI355X), at few instructions an element and
without spills. More elements in each thread cost registers, and so programs that run side by side; fewer leave each load
alone. The choices below keep 40 to 144 KB in flight.

A kernel gives the same bits on every run with the same parameters. Others add up in another order: the last bits of
log-probs and norms may then differ, between architectures and dtypes as after tuning (tuning.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import triton


class Entry(NamedTuple):
    """Parameters, and what Triton 3.9 makes of them in bfloat16 or float32: tests/compile compares. Times await a GPU."""

    block: int | None  # elements of a row in flight per program; those of the perturbation are philox.py's
    num_warps: int
    registers: int  # of a thread; with the block, what is in flight on a multiprocessor
    instructions: float  # for each element, in the loop

    @property
    def parameters(self) -> dict[str, int]:
        block = {} if self.block is None else {"BLOCK": self.block}
        return {**block, "num_warps": self.num_warps}


# Kernel -> architecture -> bytes of a logit or a weight -> entry. Where the choices differ:
# - statistics: a float32 tile of 4096 takes 56 to 64 registers for the same loads in flight as half of it.
# - gradient, on AMD: 8 warps are 512 threads there, a lone load in each. With 4 there are two, and full occupancy still.
# - perturbation (the evidence is the exchange's, to which Philox adds 7 instructions before the loop; bandwidth leaves
#   time for about 75): a group of 1024 16-bit weights is 16 bytes for each thread of 4 warps, of 2 on AMD. More warps
#   make narrower accesses; a lone one spills.
TABLE = {
    "statistics": {
        "sm_80": {2: Entry(4096, 4, 36, 7.4), 4: Entry(2048, 4, 38, 6.7)},
        "sm_90": {2: Entry(4096, 4, 37, 7.4), 4: Entry(2048, 4, 32, 6.8)},
        "sm_100": {2: Entry(4096, 4, 46, 6.0), 4: Entry(2048, 4, 37, 6.1)},
        "sm_120": {2: Entry(4096, 4, 40, 7.3), 4: Entry(2048, 4, 38, 6.6)},
        "gfx942": {2: Entry(4096, 4, 36, 6.1), 4: Entry(4096, 4, 46, 5.3)},
        "gfx950": {2: Entry(4096, 4, 36, 6.1), 4: Entry(4096, 4, 46, 5.3)},
    },
    "gradient": {
        "sm_80": {2: Entry(4096, 8, 38, 10.2), 4: Entry(4096, 8, 45, 9.0)},
        "sm_90": {2: Entry(4096, 8, 32, 10.2), 4: Entry(4096, 8, 40, 9.0)},
        "sm_100": {2: Entry(4096, 8, 32, 8.4), 4: Entry(4096, 8, 40, 8.9)},
        "sm_120": {2: Entry(4096, 8, 40, 9.1), 4: Entry(4096, 8, 40, 8.4)},
        "gfx942": {2: Entry(4096, 4, 56, 12.6), 4: Entry(4096, 4, 56, 6.5)},
        "gfx950": {2: Entry(4096, 4, 56, 7.6), 4: Entry(4096, 4, 56, 6.5)},
    },
    "perturbation": {
        "sm_80": {2: Entry(None, 4, 91, 19.1), 4: Entry(None, 4, 56, 12.3)},
        "sm_90": {2: Entry(None, 4, 93, 19.0), 4: Entry(None, 4, 54, 12.7)},
        "sm_100": {2: Entry(None, 4, 80, 14.9), 4: Entry(None, 4, 56, 8.5)},
        "sm_120": {2: Entry(None, 4, 79, 17.4), 4: Entry(None, 4, 52, 12.3)},
        "gfx942": {2: Entry(None, 2, 124, 14.0), 4: Entry(None, 4, 46, 10.2)},
        "gfx950": {2: Entry(None, 2, 124, 14.0), 4: Entry(None, 4, 46, 10.2)},
    },
}

# Rows that one program of the second forward launch combines at a time. Each time it waits for three loads in a row: many
# rows are few such waits where a sequence is long. Of as many threads as AMD has; with two rows in each some spill.
PAIRS = {"ROWS": 512, "num_warps": 16}

# Of the perturbation where weights, direction or original begin elsewhere than at 16 bytes. Accesses are of one element
# then: a vector would be spread over threads, and summed across them. More threads hold fewer addresses each.
UNALIGNED = {"VEC": 1, "num_warps": 8}

# Plain loads: where a release of Triton pipelines such loops, num_stages >= 2 turns their loads into copies through
# shared memory, which is slower here.
# Fusing multiply and add is said aloud because its default differs between Triton releases.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}

# Programs to aim for on each multiprocessor; rows are split over several programs only to reach it.
PROGRAMS_PER_PROCESSOR = 32

_forced: dict[str, dict[str, int]] = {}


def launch(kernel: str, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """What to launch a kernel of TABLE with; `dtype` is the logits' or the weights'."""
    if kernel in _forced:
        return {**_forced[kernel], **OPTIONS}
    return _chosen(kernel, device, dtype)


def pairs(device: torch.device) -> dict[str, object]:
    """What to launch the forward's second kernel with."""
    parameters = {**PAIRS, **OPTIONS}
    if architecture(device).startswith("sm_"):
        # All that 16 warps can have: untold, NVIDIA's assembler takes 64 or 40, for more programs at a time, and spills.
        parameters["maxnreg"] = 128
    return parameters


@contextmanager
def forced(**parameters: dict[str, int]) -> Iterator[None]:
    """Kernels are launched with these, whatever the table and tuning say: forced(statistics={"BLOCK": ..., ...})."""
    before = dict(_forced)
    _forced.update(parameters)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@lru_cache(maxsize=None)
def _chosen(kernel: str, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    parameters = None
    if os.environ.get("GAPO_KERNELS_AUTOTUNE") == "1":
        from gapo_kernels.kernels import tuning

        parameters = tuning.tuned(kernel, device, dtype)
    return {**(parameters or entry(kernel, architecture(device), dtype).parameters), **OPTIONS}


def forget() -> None:
    """Looks everything up anew from the next launch on."""
    _chosen.cache_clear()


def entry(kernel: str, architecture: str, dtype: torch.dtype) -> Entry:
    """The table's; for an architecture that it lacks, that of the same generation or else of the least of its kind."""
    rows = TABLE[kernel]
    if architecture not in rows:
        generation = architecture[:-1] + "0"  # sm_89, sm_103
        sixty_four_threads = architecture.startswith("gfx9")
        architecture = generation if generation in rows else "gfx942" if sixty_four_threads else "sm_80"
    return rows[architecture].get(dtype.itemsize, rows[architecture][4])


@lru_cache(maxsize=None)
def architecture(device: torch.device) -> str:
    """sm_90, gfx942, ..., or the device's type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def vector_width(tensor: torch.Tensor) -> int:
    """Elements in 16 bytes, the widest load there is."""
    return 16 // tensor.element_size()


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or getattr(properties, "gpu_subslice_count", 64)


def split_row(device: torch.device, programs: int, vocabulary: int, block: int) -> tuple[int, int]:
    """(splits, chunk): chunk, a multiple of block, is what one program reads of a row when `programs` read one each."""
    blocks = triton.cdiv(vocabulary, block)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * _processors(device), max(1, programs))
    chunk = triton.cdiv(blocks, min(wanted, blocks))
    return triton.cdiv(blocks, chunk), chunk * block
