"""Two processes train as one does on the joined batch."""

import socket

import pytest
import trainer_ranks
import torch

PRELOADED = ["trainer_ranks", "gapo_trainer.trainer", "transformers.models.llama.modeling_llama", "torch.distributed.fsdp"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    found = {}

    def start(world, kind, **settings):
        key = (world, kind, *sorted(settings.items()))
        if key not in found:
            folder = str(tmp_path_factory.mktemp("run"))
            arguments = (world, folder, free_port(), kind, dict(settings))
            # Forked from a server that has imported what they need, once for all tests.
            torch.multiprocessing.set_forkserver_preload(PRELOADED)
            torch.multiprocessing.start_processes(trainer_ranks.run, arguments, world, start_method="forkserver")
            found[key] = torch.load(f"{folder}/found.pt")
        return found[key]

    return start


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("ddp", {"tied": True}),
        ("ddp", {"tied": True, "share_backward": True}),
        ("ddp", {"tied": False, "padding_free": True, "evaluate_first": True}),
        ("ddp", {"tied": True, "resumed": True}),
        ("ddp", {"tied": True, "lora": True}),
        ("ddp", {"tied": True, "padding_free": True, "sft_weight": 0.5}),
        ("ddp", {"tied": True, "inert": True, "sft_weight": 0.5}),
        ("fsdp2", {"tied": True}),
        ("fsdp2", {"tied": True, "resumed": True, "optim": "adamw_torch"}),  # of a state without tensors torch asks a device
        (
            "fsdp2",
            {"tied": False, "padding_free": True, "evaluate_first": True, "state_dict_type": "SHARDED_STATE_DICT", "resumed": True},
        ),
    ],
    ids=[
        "DDP",
        "DDP, shared backward",
        "DDP, untied, padding-free, evaluated before",
        "DDP, resumed",
        "DDP, LoRA",
        "DDP, padding-free, NLL",
        "DDP, empty completions, NLL",
        "FSDP2",
        "FSDP2, resumed",
        "FSDP2, untied, padding-free, resumed from shards",
    ],
)
def test_two_processes_train_as_one(train, kind, settings):
    """Loss, gap, gradient norm and the weights after five updates of two micro-batches; and the evaluation. Cut off in the
    fourth, they resume from the second."""
    logged, weights, evaluated, saved = train(2, kind, **settings)
    alike = {name: value for name, value in settings.items() if name in ("tied", "lora", "optim", "sft_weight", "inert")}
    expected, expected_weights, expected_evaluation, _ = train(1, "one process", **alike)
    assert weights.keys() <= saved.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in weights.items())
    assert len(logged) == 5
    # Llama's norms compute in float32 whatever the model's dtype.
    assert torch.allclose(torch.tensor(logged), torch.tensor(expected), rtol=1e-5)
    assert max(entry[1] for entry in expected) > 0.1
    for name, weight in expected_weights.items():
        assert torch.allclose(weights[name], weight, rtol=1e-6, atol=1e-8), name
    assert evaluated == pytest.approx(expected_evaluation, rel=1e-5)
