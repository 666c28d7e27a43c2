"""What importing the library brings in, each time in a fresh process."""

import os
import subprocess
import sys

from pathlib import Path

ROOT = Path(__file__).parents[1]

WITHOUT_TRITON = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run(program):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_in_nothing_but_itself():
    """No Triton, which takes a second to import, no numpy, no transformers: only what `import torch` brings anyway."""
    added = run(
        "import sys, torch\nbefore = set(sys.modules)\nimport gapo_kernels\nprint(*sorted(set(sys.modules) - before))"
    ).split()
    assert "gapo_kernels.loss" in added
    foreign = {name.partition(".")[0] for name in added} - {"gapo_kernels", "torch"} - set(sys.stdlib_module_names)
    assert foreign == set()
    heavy = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"} & set(added)
    assert heavy == set()


def test_computes_without_triton():
    run(
        WITHOUT_TRITON
        + """
import torch
from gapo_kernels import fused_gapo_loss, reference

logits = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
labels = torch.tensor([[0, 1, 2]] * 4)
out = fused_gapo_loss(logits, labels)
out.loss.backward()
torch.testing.assert_close(out.loss, reference.fused_gapo_loss(logits, labels).loss)
assert logits.grad.abs().max() > 1e-3
try:
    fused_gapo_loss(logits, labels, backend="triton")
except RuntimeError as error:
    assert "Triton cannot be imported" in str(error) and "install triton" in str(error), error
else:
    raise AssertionError("no error without Triton")
"""
    )
