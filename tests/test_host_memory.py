"""The kept gradient memory: whatever lay there before, and whoever still holds it, the gradient is right."""

import json
import mmap
import subprocess
import sys

import pytest
import torch

from gapo_kernels import fused_gapo_loss, fused_linear_gapo_loss, host_memory

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="memory is kept on Linux only")
VOCABULARY = 2**16  # 8 rows of float32 a huge page


@pytest.fixture(autouse=True)
def nothing_kept():
    host_memory.release()
    yield
    host_memory.release()


def gradient(lengths, total, dtype=torch.float32, backend="auto", seed=0):
    """The gradient of fused_gapo_loss with the given numbers of predicting rows at the end of `total` rows each."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(lengths), total, VOCABULARY, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (len(lengths), total), generator=generator)
    for row, length in enumerate(lengths):
        labels[row, : total - length] = -100
    fused_gapo_loss(logits, labels, beta=2.0, backend=backend).loss.backward()
    return logits.grad


def check(lengths, total, dtype=torch.float32):
    """Against the reference, relative to the smallest: a probability of a vocabulary this large is small."""
    expected = gradient(lengths, total, dtype, "reference")
    torch.testing.assert_close(
        gradient(lengths, total, dtype), expected, atol=0, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4
    )


def test_memory_is_used_again():
    address = gradient([3, 3], 24).data_ptr()
    assert gradient([3, 3], 24).data_ptr() == address
    assert len(host_memory._spare) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lay_there_does_not_show(dtype):
    # All rows written, then all but the last of each sequence, then few, a shorter batch in the same memory, a longer one.
    for lengths, total in [
        ([40, 40], 40),
        ([39, 39], 39),
        ([2, 7], 40),
        ([30, 1], 33),
        ([5, 5], 48),
        ([48, 48, 48, 48], 48),
        ([9, 0, 3, 2], 48),
    ]:
        check(lengths, total, dtype)


def test_rows_that_lost_their_gradient_are_zeroed():
    gradient([40, 40], 40)
    found = gradient([40, 0], 40)  # an empty completion: the pair is inert
    assert not found.any()


def test_a_gradient_that_is_held_stays():
    first = gradient([20, 20], 24, seed=1)
    kept = first.clone()
    rows = first[1]  # a view alone holds it as well
    second = gradient([20, 20], 24, seed=2)
    assert second.data_ptr() != first.data_ptr()
    assert torch.equal(first, kept)
    del first, second
    gradient([20, 20], 24, seed=3)
    assert torch.equal(rows, kept[1])


def test_one_gradient_is_kept_at_most_and_given_back_on_request():
    held = [gradient([4, 4], 24, seed=seed) for seed in range(3)]
    assert not host_memory._spare
    del held
    assert len(host_memory._spare) == 1
    host_memory.release()
    assert not host_memory._spare


def test_a_head_finds_its_buffer_and_its_weights_gradient_again():
    """However many rows there are: the buffer is then the smaller of the two, or the larger."""
    hidden, weight = torch.randn(6, 8, 16), torch.randn(VOCABULARY, 16, requires_grad=True)
    labels = torch.randint(VOCABULARY, (6, 8))

    def step(length):
        loss = fused_linear_gapo_loss(hidden[:, :length], weight, labels[:, :length], backend="torch").loss
        (found,) = torch.autograd.grad(loss, weight)
        expected = fused_linear_gapo_loss(hidden[:, :length], weight, labels[:, :length], backend="reference").loss
        torch.testing.assert_close(found, torch.autograd.grad(expected, weight)[0], atol=1e-7, rtol=1e-3)
        return found.data_ptr()

    step(8)
    kept = {kind: id(memory) for kind, memory in host_memory._spare.items()}
    assert len(kept) == 2
    address = step(8)
    assert step(8) == address
    step(4)
    assert {kind: id(memory) for kind, memory in host_memory._spare.items()} == kept


def test_short_batches_in_turn_with_long_ones_take_no_pages_from_these(monkeypatch):
    def uninitialized(mebibytes):
        return host_memory.uninitialized((mebibytes * 2**18,), torch.float32, torch.device("cpu"), host_memory.LOGITS)

    discarded, discard = [], host_memory._discard
    monkeypatch.setattr(host_memory, "_discard", lambda m, start, stop: discarded.append(stop - start) or discard(m, start, stop))
    for size in (16, 4, 16, 4, 16):
        uninitialized(size)
    assert not any(discarded)
    uninitialized(4)
    uninitialized(6)
    assert discarded[-2:] == [0, 10 * 2**20]


RESIDENT = """
import json, os, sys
from pathlib import Path
import torch
import torch._dynamo  # as the first call of an operator would, in each child anew
from gapo_kernels import fused_linear_gapo_loss, linear_sequence_logps
width, vocabulary = 16, 2**16
def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
def call(rows, budget, step):
    hidden, labels = torch.randn(2, rows // 2, width, requires_grad=True), torch.randint(vocabulary, (2, rows // 2))
    options = dict(shift=False, max_logits_bytes=int(budget * 2**20))
    if step:
        logps = linear_sequence_logps(hidden, weight, labels, **options)
        with torch.no_grad():
            linear_sequence_logps(hidden, weight, labels, **options)
        logps.sum().backward()
    else:
        fused_linear_gapo_loss(hidden, weight, labels, **options).loss.backward()
    weight.grad = None
for calls in json.loads(sys.argv[1]):
    if os.fork() == 0:  # of a process that has imported torch, and computed nothing
        weight, found = torch.randn(vocabulary, width, requires_grad=True), []
        call(64, 8, False), call(64, 8, True)
        before = status("VmRSS")
        for one in calls:
            Path("/proc/self/clear_refs").write_text("5")
            call(*one)
            found.append(status("VmHWM") - before)
        print(json.dumps(found), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
CALLS = {  # rows, budget in MiB, whether a step's
    "longer batches": [(rows, 256, False) for rows in (600, 700, 800, 900)],
    "a smaller budget": [(900, 256, False), (900, 32, False), (900, 32, False), (900, 32, False)],
    "longer and shorter steps": [(rows, 256, True) for rows in (900, 1000, 700)],
    "steps of a smaller budget": [(900, 256, True), (900, 32, True), (900, 32, True), (900, 32, True), (900, 32, False)],
}


@pytest.fixture(scope="module")
def peaks():
    """Of each of CALLS: MiB beyond what a process held before them, after each call."""
    command = [sys.executable, "-c", RESIDENT, json.dumps(list(CALLS.values()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "PermissionError" in done.stderr:
        pytest.skip("the kernel does not let the peak be reset")
    assert done.returncode == 0, done.stderr
    return dict(zip(CALLS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_what_is_kept_is_within_the_budget(peaks, name):
    """That of one of the two calls before or of this one, with 4 MiB for the weight's gradient, twice."""
    budgets = [budget for _, budget, _ in CALLS[name]]
    for number, beyond in enumerate(peaks[name][1:], 1):
        assert beyond <= max(budgets[max(0, number - 2) : number + 1]) + 64 + 8


def test_gradients_are_no_views():
    """To which autograd would add out of place."""
    weight, hidden = torch.randn(VOCABULARY, 16, requires_grad=True), torch.randn(2, 8, 16)
    labels = torch.randint(VOCABULARY, (2, 8))
    (found,) = torch.autograd.grad(fused_linear_gapo_loss(hidden, weight, labels, backend="torch").loss, weight)
    assert not found._is_view() and not gradient([3, 3], 24)._is_view()


def test_small_gradients_come_from_torch():
    logits = torch.randn(2, 4, 16, requires_grad=True)
    fused_gapo_loss(logits, torch.randint(16, (2, 4))).loss.backward()
    del logits
    assert not host_memory._spare


def test_without_advice_everything_is_zeroed_by_hand(monkeypatch):
    gradient([40, 40], 40)
    monkeypatch.setattr(host_memory, "_advise", lambda *_: False)
    check([2, 7], 40)
