"""Fast, faithful GAPO (Geometric Anchor Preference Optimization, arXiv 2602.04909) training in PyTorch."""

from gapo_kernels import reference
from gapo_kernels.anchor import AnchorStats, GeometricAnchor
from gapo_kernels.linear import fused_linear_gapo_loss, linear_sequence_logps
from gapo_kernels.logprobs import sequence_logps
from gapo_kernels.loss import fused_gapo_loss
from gapo_kernels.objective import gapo_objective
from gapo_kernels.outputs import GAPOOutput
from gapo_kernels.step import gapo_step

__version__ = "0.1.0"

__all__ = [
    "AnchorStats",
    "GAPOOutput",
    "GeometricAnchor",
    "fused_gapo_loss",
    "fused_linear_gapo_loss",
    "gapo_objective",
    "gapo_step",
    "linear_sequence_logps",
    "reference",
    "sequence_logps",
]
