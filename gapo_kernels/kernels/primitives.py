"""What the kernels share: which token a row predicts, where a row lies, and the aligned part of it; and their launchers.

Names: i_ program or row index, o_ offsets, m_ masks, b_ values in registers.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def sequence_of_row(i_row, cu_seqlens, sequences, length, PACKED: tl.constexpr):
    """The sequence that a row belongs to, and the first row after that sequence; of a row that belongs to none, 0."""
    if PACKED:
        # The last s with cu_seqlens[s] <= row: a few loads that all programs share in the L2 cache.
        low = i_row * 0
        high = low + sequences
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(cu_seqlens + middle).to(tl.int64) <= i_row:
                low = middle
            else:
                high = middle - 1
        i_sequence = low
        within = (i_sequence < sequences) & (tl.load(cu_seqlens).to(tl.int64) <= i_row)
        end = tl.load(cu_seqlens + i_sequence + 1, mask=within, other=0).to(tl.int64)
    else:
        i_sequence = i_row // length
        end = (i_sequence + 1) * length
    return i_sequence, end


@triton.jit
def predicted_label(o_row, end, labels, ignore_index, SHIFT: tl.constexpr):
    """Labels of rows that end before row `end`, and whether each is predicted. Rows may be a block or a scalar."""
    o_label = o_row + SHIFT
    m_row = o_label < end
    b_label = tl.load(labels + o_label, mask=m_row, other=0).to(tl.int64)
    return b_label, m_row & (b_label != ignore_index)


@triton.jit
def row_offset(o_row, length, stride_sequence, stride_row):
    """Offset of a row's first logit, int64: 2B * T * V passes 2^31 at ordinary sizes."""
    return (o_row // length) * stride_sequence + (o_row % length) * stride_row


@triton.jit
def row_address(base, i_row, length, stride_sequence, stride_row):
    """Address of a row's first logit, int64. An integer, not a pointer, until it is complete: the compiler for AMD takes
    a sum of pointer and offset apart, and what is known of its alignment is lost."""
    element_bytes: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
    return base.to(tl.int64) + row_offset(i_row, length, stride_sequence, stride_row) * element_bytes


@triton.jit
def aligned_part(row, vocabulary, VEC: tl.constexpr):
    """The row's first 16-byte aligned element, how many stand before it, and how many whole vectors' elements follow.

    With an odd row stride (V = 50257) only every eighth row is aligned; without this the compiler must assume that
    none is, and loads element by element.
    """
    # Bytes to the next 16-byte boundary, in elements.
    element_bytes: tl.constexpr = 16 // VEC
    b_head = ((16 - row.to(tl.int64) % 16) % 16 // element_bytes).to(tl.int32)
    b_head = tl.minimum(b_head, vocabulary)
    return tl.multiple_of(row + b_head, 16), b_head, (vocabulary - b_head) // VEC * VEC


@triton.jit
def ragged_offsets(vocabulary, b_head, b_whole, LANES: tl.constexpr):
    """Offsets in the row, and their mask, of the elements before the aligned part and after its last whole vector."""
    tl.static_assert(LANES >= 14, "a tile needs a lane for each of the 7 + 7 elements that may stand around")
    o_lane = tl.arange(0, LANES)
    o_ragged = tl.where(o_lane < b_head, o_lane, o_lane + b_whole)
    return o_ragged, o_lane < vocabulary - b_whole


@triton.jit
def exp(x):
    """e^x. In float32 by way of exp2, one special-function instruction: tl.exp adds three for denormal results."""
    if x.dtype == tl.float64:  # a constant would be rounded to float32, so the detour costs digits here
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def float_from_bits(bits):
    """A float64 argument, exact: Triton passes Python floats as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def joined(low, high):
    """Two halves from `int32` as an unsigned 64-bit number."""
    return (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True)


@triton.jit
def round_to_nearest(b_x, DTYPE: tl.constexpr):
    """To DTYPE. To 16 bits by way of float32, as torch does it; to bfloat16 by bits: the interpreter's own cast truncates."""
    if DTYPE == tl.bfloat16:
        b_x = b_x.to(tl.float32)
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        b_bits = tl.where(b_x == b_x, b_bits, 0x7FC0)  # noqa: PLR0124  a carry makes infinity of some NaNs
        return b_bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif DTYPE == tl.float16:
        return b_x.to(tl.float32).to(tl.float16)
    else:
        return b_x.to(DTYPE)


@triton.jit
def vector_offsets(ELEMENTS: tl.constexpr, VEC: tl.constexpr):
    """(ELEMENTS / VEC, VEC): a row is a thread's 16 bytes, so that sums over axis 1 take no step across threads."""
    return (tl.arange(0, ELEMENTS // VEC) * VEC)[:, None] + tl.arange(0, VEC)[None, :]


@triton.jit
def widen(b_x, DTYPE: tl.constexpr):
    """Exact. By bits from bfloat16: the interpreter's cast loses subnormal numbers."""
    if b_x.dtype == tl.bfloat16:
        b_x = (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return b_x.to(DTYPE)


@triton.jit
def lanes_beside(b_load):
    """Offsets of `b_load`, a load at `vector_offsets`, in the registers of the threads that hold it.

    Computed from the offsets alone, what follows from them would be laid out otherwise and, at each use, go through shared
    memory. So they take in a zero made of the load, which only the compiler's last stage knows to be one: it drops the load.
    """
    b_zero = widen(b_load, tl.float32).to(tl.uint32, bitcast=True).to(tl.uint64) >> 32
    return vector_offsets(b_load.shape[0] * b_load.shape[1], b_load.shape[1]) + b_zero.to(tl.int32)


def int32(value: int) -> int:
    """The lowest 32 bits as a signed number: unsigned ones would be compiled anew from 2^31 on."""
    return (value + 2**31) % 2**32 - 2**31


def from_host(numbers: Sequence, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As a tensor on the device, for which the host does not wait."""
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=device.type != "cpu").to(device, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
