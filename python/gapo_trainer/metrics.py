"""What training and evaluation measured for every pair, and the means that are logged."""

import torch

FIELDS = ("gap", "weight", "margin", "anchor_margin", "chosen_logps", "rejected_logps")
MARKS = ("valid", "is_flipped", "index")


def table(out, inputs):
    """(B, 9) float64, on the device of `out`, a GAPOOutput: FIELDS, then MARKS."""
    marks = [out.valid, inputs["is_flipped"], inputs["index"]]
    return torch.stack([column.double() for column in (*(getattr(out, name) for name in FIELDS), *marks)], 1)


def means(rows, beta, *, anchor, split=False):
    """dict of TRL's names, and with an anchor of gapo/ names, over the pairs of a table (N, 9) that are valid. split: gap
    and weight also of clean and flipped pairs apart."""
    columns = dict(zip(FIELDS + MARKS, rows.t()))
    valid, flipped = columns["valid"].bool(), columns["is_flipped"].bool()
    if not valid.any():
        return {}
    values = {
        "rewards/chosen": beta * columns["chosen_logps"],
        "rewards/rejected": beta * columns["rejected_logps"],
        "rewards/margins": beta * columns["margin"],
        "rewards/accuracies": (columns["margin"] > 0).double(),
        "logps/chosen": columns["chosen_logps"],
        "logps/rejected": columns["rejected_logps"],
        "gapo/margin": columns["margin"],
    }
    groups = {"": valid}
    if anchor:
        values |= {f"gapo/{name}": columns[name] for name in ("gap", "weight", "anchor_margin")}
        if split:
            groups |= {"_clean": valid & ~flipped, "_flipped": valid & flipped}
    return {
        name + suffix: column[group].mean().item()
        for suffix, group in groups.items()
        for name, column in values.items()
        if group.any() and (not suffix or name in ("gapo/gap", "gapo/weight"))
    }


def evaluation(rows, losses, counts, args):
    """dict of `means` and the loss over all pairs. losses (N,): without the NLL term; counts (N,): chosen tokens."""
    columns = dict(zip(FIELDS + MARKS, rows.t()))
    valid = columns["valid"].bool()
    if not valid.any():
        return {"loss": 0.0}
    loss = losses[valid].mean()
    if args.sft_weight:
        loss = loss - args.sft_weight * (columns["chosen_logps"] * counts)[valid].sum() / counts[valid].sum()
    return {"loss": loss.item(), **means(rows, args.beta, anchor=False)}


class TrainingRecord:
    """Tables of the micro-batches trained on. They stay on the device until they are read: reading waits for it."""

    def __init__(self, keep):
        self._keep = keep
        self._pending = []  # (step, table)
        self._rows = []

    def add(self, step, rows):
        self._pending.append((step, rows))

    def take(self):
        """The table (N, 9) since the last call, on its device."""
        if not self._pending:
            return None
        steps, tables = zip(*self._pending)
        self._pending = []
        if self._keep:
            self._rows += [(step, row) for step, rows in zip(steps, tables) for row in rows.tolist()]
        return torch.cat(tables)

    def pairs(self, last_step):
        """list of dicts, in the order of training, of the updates up to last_step."""
        self.take()
        records = []
        for step, row in self._rows:
            record = dict(zip(FIELDS + MARKS, row))
            if step <= last_step:
                floats = {name: record[name] for name in ("gap", "weight", "margin", "anchor_margin")}
                records.append(
                    {"step": step, "index": int(record["index"]), **floats, "is_flipped": bool(record["is_flipped"])}
                )
        return records
