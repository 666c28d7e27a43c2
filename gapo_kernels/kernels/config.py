"""Launch parameters: the one place where they are chosen, with the evidence."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

# Elements of a row in flight per program, and its warps. Compiled for sm_90 in bfloat16 by Triton 3.9: 37 registers and
# 7.3 instructions a logit forward, 32 and 10.3 backward, nothing spilled (tests/compile holds the ceilings).
FORWARD = {"BLOCK": 4096, "num_warps": 4}
BACKWARD = {"BLOCK": 4096, "num_warps": 8}
# Rows that one program of the second forward launch combines at a time.
PAIRS = {"ROWS": 256, "num_warps": 4}

# Plain loads: where a release of Triton pipelines such loops, num_stages >= 2 turns their loads into copies through
# shared memory, which is slower here.
# Fusing multiply and add is said aloud because its default differs between Triton releases.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}

# Programs to aim for on each multiprocessor; rows are split over several programs only to reach it.
PROGRAMS_PER_PROCESSOR = 32


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
