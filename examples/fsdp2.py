"""GAPO in a loop of your own over sharded parameters (FSDP2), as in torchtitan or torchtune:
torchrun --nproc-per-node 2 examples/fsdp2.py [--model NAME_OR_PATH]"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from common import arguments, collate, preference_pairs, tokenized
from gapo_kernels import GeometricAnchor, gapo_step, linear_sequence_logps
from decoder import load


def logps_of(model, input_ids, attention_mask, labels):
    """(2B,) log-probs and counts. A forward method of the root: inside it the head's weight is gathered, and plain."""
    hidden = model.model(input_ids, attention_mask, use_cache=False).last_hidden_state
    return linear_sequence_logps(hidden, model.lm_head.weight, labels, return_counts=True)


def shard(model):
    for layer in model.model.layers:  # with a MixedPrecisionPolicy the anchor moves on its param_dtype's grid
        fully_shard(layer)
    fully_shard(model)  # the root holds embedding, final norm and head
    type(model).logps = logps_of
    register_fsdp_forward_method(model, "logps")


def main(argv=None):
    cuda = torch.cuda.is_available()
    alone = {} if dist.is_torchelastic_launched() else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    try:
        return train(arguments(argv), torch.device("cuda", dist.get_node_local_rank(0)) if cuda else "cpu")
    finally:
        dist.destroy_process_group()


def train(args, device):
    model, tokenizer = load(args.model)
    model.to(device).train()
    shard(model)
    anchor = GeometricAnchor.from_model(model, rho=0.05)  # after sharding
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    rows = tokenized(preference_pairs(), tokenizer)[dist.get_rank() :: dist.get_world_size()]
    batch = {name: tensor.to(device) for name, tensor in collate(rows, tokenizer.pad_token_id).items()}
    history = []
    for _ in range(args.steps):
        out = gapo_step(lambda: model.logps(**batch), anchor, beta=2.0, gamma=0.5)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means = torch.stack([out.loss.detach(), out.gap.mean()]) / dist.get_world_size()
        dist.all_reduce(means)
        history.append(dict(zip(("loss", "gap"), means.tolist())))
    print(f"rank {dist.get_rank()}: {history}")
    return model, history


if __name__ == "__main__":
    main()
