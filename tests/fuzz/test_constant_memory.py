"""Memory stays what it is after a warm-up, over as many steps as there are configurations: 1,000 in `make fuzz`.

The steps are those of a training run, of another shape each, forward and backward. A leak of one small tensor a step
moves at least one of the counters by several times what it may grow by, which the last test holds.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gapo_kernels import GeometricAnchor, fused_gapo_loss, fused_linear_gapo_loss, gapo_step, linear_sequence_logps

SHAPES = [(pairs, length) for pairs in (1, 2, 3) for length in (2, 3, 5, 9)]
WARM_UP = 3 * len(SHAPES)
VOCABULARY, WIDTH = 97, 8
# Large enough for gradients of 2 MiB, whose memory the CPU path keeps from step to step.
LARGE_VOCABULARY = 32771


class Use(NamedTuple):
    """Of memory."""

    objects: int  # that Python's garbage collector knows: tensors, and all that may hold others
    blocks: int  # of Python's small objects
    allocated: int  # bytes that malloc has handed out, to torch's CPU tensors and autograd's nodes as well
    resident: int  # bytes
    device: int  # bytes, a GPU's


def allowed(steps: int) -> Use:
    """A tensor of one element takes an object and some 420 bytes. Without any leak, Python's caches fill with some
    hundred blocks more, and a huge page, of 2 MiB, is or is not given back."""
    return Use(5 + steps // 20, 500 + steps // 2, 8192 + 64 * steps, 2 * 2**21, 0)


class _Malloc(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def use(device: torch.device) -> Use:
    """Zero for what cannot be told on this system: malloc's numbers are glibc's, resident pages Linux's."""
    gc.collect()
    allocated = resident = 0
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = _Malloc
        libc.malloc_trim(0)
        found = libc.mallinfo2()
        allocated = found.uordblks + found.hblkhd
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    on_device = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    return Use(len(gc.get_objects()), sys.getallocatedblocks(), allocated, resident, on_device)


def assert_constant(step: Callable[[int], None], steps: int, device: torch.device) -> None:
    for number in range(WARM_UP):
        step(number)
    before = use(device)
    for number in range(steps):
        step(number)
    for name, after, earlier, few in zip(Use._fields, use(device), before, allowed(steps)):
        assert after - earlier <= few, f"{name} grew by {after - earlier} in {steps} steps, by {few} at most allowed"


def random_labels(number: int, vocabulary: int, device: torch.device) -> Tensor:
    pairs, length = SHAPES[number % len(SHAPES)]
    labels = torch.randint(vocabulary, (2 * pairs, length), device=device)
    labels[:, : number % 3] = -100
    return labels


@pytest.fixture
def steps(configurations, interpreted):
    if interpreted:
        pytest.skip("a thousand steps of the interpreter take longer than all else")
    return configurations


@pytest.fixture
def logits_step(backend, device):
    def step(number: int) -> None:
        vocabulary = LARGE_VOCABULARY if number % 4 == 3 else VOCABULARY
        labels = random_labels(number, vocabulary, device)
        dtype = torch.bfloat16 if number % 2 else torch.float32
        logits = torch.randn(*labels.shape, vocabulary, device=device, dtype=dtype).requires_grad_()
        anchor = logits.detach() * 0.9
        fused_gapo_loss(logits, labels, anchor_logits=anchor, sft_weight=0.1, backend=backend).loss.backward()

    return step


@pytest.fixture
def linear_step(backend, device):
    weight = torch.randn(VOCABULARY, WIDTH, device=device).requires_grad_()

    def step(number: int) -> None:
        labels = random_labels(number, VOCABULARY, device)
        hidden = torch.randn(*labels.shape, WIDTH, device=device).requires_grad_()
        options = dict(max_logits_bytes=4 * VOCABULARY * (5 if number % 2 else 2**10), backend=backend)
        weight.grad = None
        fused_linear_gapo_loss(hidden, weight, labels, anchor_hidden=hidden, **options).loss.backward()
        linear_sequence_logps(hidden, weight, labels, **options).sum().backward()

    return step


@pytest.fixture
def anchor_step(backend, device):
    """A whole training step on an embedding, tied to the head, and one layer."""
    embedding, layer = nn.Embedding(VOCABULARY, WIDTH, device=device), nn.Linear(WIDTH, WIDTH, device=device)
    params = [*embedding.parameters(), *layer.parameters()]
    anchor, optimizer = GeometricAnchor(params, rho=0.05), torch.optim.SGD(params, lr=0.01)

    def step(number: int) -> None:
        labels = random_labels(number, VOCABULARY, device)

        def logps():
            hidden = torch.tanh(layer(embedding(labels.clamp(min=0))))
            return linear_sequence_logps(hidden, embedding.weight, labels, return_counts=True, backend=backend)

        gapo_step(logps, anchor, sft_weight=0.1).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("name", ["logits_step", "linear_step", "anchor_step"])
def test_memory_is_constant(name, request, steps, device):
    assert_constant(request.getfixturevalue(name), steps, device)


@pytest.mark.parametrize("leak", ["tensor", "memory without an object"])
def test_a_leak_of_one_small_tensor_a_step_is_seen(leak, steps, anchor_step, device):
    held, libc = [], ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    if leak != "tensor" and not hasattr(libc, "mallinfo2"):
        pytest.skip("only glibc tells what its malloc has handed out")

    def leaking(number: int) -> None:
        anchor_step(number)
        held.append(torch.empty(1, device=device) if leak == "tensor" else libc.malloc(420))

    try:
        with pytest.raises(AssertionError, match="grew by"):
            assert_constant(leaking, min(steps, 200), device)
    finally:
        if leak != "tensor":
            for address in held:
                libc.free(address)
