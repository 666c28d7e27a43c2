"""Triton launchers. They know neither autograd nor the API; `cpu.py` has the same signatures in torch."""

from gapo_kernels.kernels.gradient import logps_backward
from gapo_kernels.kernels.pairs import logps_forward, loss_forward

__all__ = ["logps_backward", "logps_forward", "loss_forward"]
