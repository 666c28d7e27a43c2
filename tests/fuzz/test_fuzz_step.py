"""`gapo_step` in float64 against the authors' recipe, three forwards and two backwards, around `gapo_kernels.reference`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from bounds import largest
from configurations import OBJECTIVES, SEEDS, Objective, Rows, make_labels, rows
from gapo_kernels import GAPOOutput, GeometricAnchor, gapo_step, linear_sequence_logps, reference, sequence_logps

PARAMETERS = ["embedding", "inner", "bias", "scale", "head"]


class Step(NamedTuple):
    seed: int
    rows: Rows
    vocabulary: int
    width: int
    moved: tuple[str, ...]  # of PARAMETERS; where none of them is trained, all that are
    frozen: tuple[str, ...]  # of these, what neither moves nor is trained
    tied: bool
    logps: str  # "logits", "head" or "eager"
    counts: bool  # does logps_fn return them
    batches: int  # steps whose gradients add up
    objective: Objective
    rho: float
    geometry: str
    probe: str
    share_backward: bool


STEPS = st.builds(
    Step,
    seed=SEEDS,
    rows=rows(st.integers(1, 4).map(lambda pairs: 2 * pairs), longest=9),
    vocabulary=st.integers(2, 40),
    width=st.integers(1, 9),
    moved=st.one_of(st.just(tuple(PARAMETERS)), st.lists(st.sampled_from(PARAMETERS), min_size=1, unique=True).map(tuple)),
    frozen=st.lists(st.sampled_from(PARAMETERS), max_size=2, unique=True).map(tuple),
    tied=st.booleans(),
    logps=st.sampled_from(["logits", "head", "eager"]),
    counts=st.booleans(),
    batches=st.integers(1, 2),
    objective=OBJECTIVES,
    rho=st.sampled_from([0.05, 0.5, 0.0]),
    geometry=st.sampled_from(["asam", "sam"]),
    probe=st.sampled_from(["loss", "margin"]),
    share_backward=st.booleans(),
)


class Model(nn.Module):
    def __init__(self, case: Step) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)

        def parameter(name: str, *shape: int) -> nn.Parameter:
            values = torch.randn(shape, dtype=torch.float64, generator=generator)
            return nn.Parameter(values, requires_grad=name not in case.frozen)

        self.embedding = parameter("embedding", case.vocabulary, case.width)
        self.inner = parameter("inner", case.width, case.width)
        self.bias = parameter("bias", case.width)
        self.scale = parameter("scale")  # no dimension
        self.head = self.embedding if case.tied else parameter("head", case.vocabulary, case.width)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states."""
        hidden = F.embedding(ids, self.embedding)
        return hidden + self.scale * torch.tanh(F.linear(hidden, self.inner, self.bias))


def authors_recipe(
    case: Step, moved: list[nn.Parameter], logits: Callable[[], Tensor], labels: Tensor, layout: dict
) -> GAPOOutput:
    """The loss, whose gradients are added to every .grad."""
    objective = case.objective
    normalized = dict(length_normalized=objective.length_normalized)
    logps, counts = reference.sequence_logps(logits(), labels, return_counts=True, **normalized, **layout)
    margin, valid = torch.sub(*logps.chunk(2)), (counts > 0).view(2, -1).all(0)
    probe = -F.logsigmoid(objective.beta * margin - objective.gamma) if case.probe == "loss" else -margin
    probe = (probe * valid).sum() / valid.sum().clamp(min=1)
    g = torch.autograd.grad(probe, moved, allow_unused=True)
    direction = [torch.zeros_like(p) if d is None else d * p.detach() ** (case.geometry == "asam") for p, d in zip(moved, g)]
    norm = torch.stack([d.square().sum() for d in direction]).sum().sqrt()
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for p, d in zip(moved, direction):
            p += case.rho * p ** (case.geometry == "asam") * d / (norm + 1e-12)
        anchor_logits = logits()
        for p, saved in zip(moved, before):
            p.copy_(saved)
    out = reference.fused_gapo_loss(logits(), labels, anchor_logits=anchor_logits, **objective._asdict(), **layout)
    out.loss.backward()
    return out


def check_step(case: Step) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    objective = case.objective._replace(reduction="mean")
    if not case.counts or not objective.length_normalized:
        objective = objective._replace(sft_weight=0.0)
    case = case._replace(objective=objective)
    if not case.counts:  # an empty completion is not known as one
        lengths = tuple(max(2, length) for length in case.rows.lengths)
        case = case._replace(rows=case.rows._replace(kept="every label", lengths=lengths, ignore_index=-100))
    batches = []
    for _ in range(case.batches):
        made = make_labels(case.rows, case.vocabulary, generator)
        ids = torch.randint(case.vocabulary, made.labels.shape, generator=generator)
        layout = dict(shift=case.rows.shift, ignore_index=case.rows.ignore_index, cu_seqlens=made.cu_seqlens)
        batches.append((ids, made.labels, layout))

    ours, theirs = Model(case), Model(case)
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    names = [name for name in trained if name in case.moved] or trained
    shared = case.share_backward and names == trained and not case.rows.packed
    moved = [dict(theirs.named_parameters())[name] for name in names]
    anchor = GeometricAnchor([dict(ours.named_parameters())[name] for name in names], rho=case.rho, geometry=case.geometry)
    keywords = {name: getattr(objective, name) for name in ("beta", "gamma", "label_smoothing", "loss_type", "sft_weight")}
    options = dict(return_counts=True, length_normalized=objective.length_normalized)
    for ids, labels, layout in batches:

        def logps():
            hidden = ours(ids)
            if case.logps == "head":
                found = linear_sequence_logps(hidden, ours.head, labels, **options, **layout)
            else:
                path = sequence_logps if case.logps == "logits" else reference.sequence_logps
                found = path(F.linear(hidden, ours.head), labels, **options, **layout)
            return found if case.counts else found[0]

        before = [p.detach().clone() for p in ours.parameters()]
        out = gapo_step(logps, anchor, probe=case.probe, share_backward=shared, **keywords)
        out.loss.backward()
        assert all(torch.equal(p, saved) for p, saved in zip(ours.parameters(), before))
        expected = authors_recipe(case, moved, lambda: F.linear(theirs(ids), theirs.head), labels, layout)
        for name, one in out._asdict().items():
            other = getattr(expected, name)
            if one.dtype == torch.bool:
                assert torch.equal(one, other), name
            else:
                tolerance = dict(rtol=1e-9, atol=1e-9 * max(1.0, largest(other)))
                torch.testing.assert_close(one, other, **tolerance, msg=lambda m: f"{name}: {m}")
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            tolerance = dict(rtol=1e-9, atol=1e-9 * max(1.0, largest(other.grad)))
            torch.testing.assert_close(one.grad, other.grad, **tolerance, msg=lambda m: f"d {name}: {m}")


def test_gapo_step(explore):
    explore("gapo_step", check_step, STEPS)
