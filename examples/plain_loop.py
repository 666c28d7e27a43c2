"""GAPO in a plain PyTorch loop, with gradient accumulation and clipping.

python examples/plain_loop.py [--model NAME_OR_PATH]
"""

import torch

from common import arguments, collate, preference_pairs, tokenized
from gapo_kernels import GeometricAnchor, gapo_step, linear_sequence_logps
from decoder import load

PAIRS_AT_ONCE, ACCUMULATE = 4, 2


def main(argv=None):
    args = arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(args.model)
    model.to(device).train()
    rows = tokenized(preference_pairs(PAIRS_AT_ONCE * ACCUMULATE), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    anchor = GeometricAnchor.from_model(model, rho=0.05)

    def logps(batch):
        hidden = model.model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
        return linear_sequence_logps(hidden, model.lm_head.weight, batch["labels"], return_counts=True)

    history = []
    for step in range(1, args.steps + 1):
        loss = gap = 0.0
        for first in range(0, len(rows), PAIRS_AT_ONCE):
            batch = collate(rows[first : first + PAIRS_AT_ONCE], tokenizer.pad_token_id)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            out = gapo_step(lambda: logps(batch), anchor, beta=2.0, gamma=0.5)  # the model runs twice in here
            (out.loss / ACCUMULATE).backward()
            loss, gap = loss + out.loss.item() / ACCUMULATE, gap + out.gap.mean().item() / ACCUMULATE
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss, "gap": gap})
        print(f"step {step}: loss {loss:.4f}, gap {gap:+.4f}")
    # Beside the model and the optimizer: the anchor's random numbers go on where they were.
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "anchor": anchor.state_dict()}
    return model, history, checkpoint


if __name__ == "__main__":
    main()
