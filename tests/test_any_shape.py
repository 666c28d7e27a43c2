"""fused_gapo_loss in any shape, drawn by hypothesis, against the float64 reference."""

import pytest
import torch

from batches import assert_equals_reference, make_batch, run_loss

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


# From one pair of one token to more rows than a block of rows, vocabularies around tile and vector ends.
@given(
    pairs=st.integers(1, 3),
    length=st.integers(1, 6),
    vocabulary=st.one_of(st.integers(1, 20), st.sampled_from([64, 127, 128, 129, 136, 255, 256, 264, 400])),
    packed=st.booleans(),
    shift=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def check_any_shape(backend, device, pairs, length, vocabulary, packed, shift, dtype, seed):
    batch = make_batch(2 * pairs, length, vocabulary, packed=packed, device=device, seed=seed).to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_equals_reference(
        run_loss, batch, backend, tolerance=tolerance, anchor_logits=batch.anchor_logits, shift=shift, sft_weight=0.2
    )


def test_any_shape(backend, device, interpreted):
    check = settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=8 if interpreted else 80,
        phases=[Phase.generate] if interpreted else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(check_any_shape)
    check(backend, device)
