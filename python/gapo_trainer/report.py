"""What a run amounted to: facts, in words, as a table and as plots. Everything is made from one dict of metrics."""

import math
from pathlib import Path
from statistics import fmean, variance


def summarise_pairs(records):
    """Mean gap and weight of clean and of flipped pairs, over each pair's first and its last visit.

    records: `GAPOTrainer.pair_records`. Returns {"first_visit": visit, "last_visit": visit}, where
        visit is {"clean": group, "flipped": group, "weight_difference", "standard_error"}: the difference is flipped -
            clean, the error Welch's; both None unless each group has two pairs;
        group is {"pairs", "gap", "weight"}: a count and two means, None without pairs.
    Empty without records.
    """
    if not records:
        return {}
    last = {record["index"]: record for record in records}
    first = {record["index"]: record for record in reversed(records)}
    return {"first_visit": _summarise_visit(first.values()), "last_visit": _summarise_visit(last.values())}


def _summarise_visit(records):
    groups = {name: [r for r in records if r["is_flipped"] == (name == "flipped")] for name in ("clean", "flipped")}
    visit = {
        name: {
            "pairs": len(group),
            "gap": fmean(r["gap"] for r in group) if group else None,
            "weight": fmean(r["weight"] for r in group) if group else None,
        }
        for name, group in groups.items()
    }
    difference = error = None
    if min(map(len, groups.values())) >= 2:
        difference = visit["flipped"]["weight"] - visit["clean"]["weight"]
        error = math.sqrt(sum(variance(r["weight"] for r in group) / len(group) for group in groups.values()))
    return visit | {"weight_difference": difference, "standard_error": error}


def findings(metrics):
    """What the numbers say, as sentences: weights of flipped pairs, held-out accuracy, an early end."""
    sentences = []
    if metrics.get("interrupted"):
        sentences.append(f"The run was interrupted while {metrics['stage']}; the numbers cover what was done by then.")
    elif metrics.get("out_of_time"):
        sentences.append(
            f"Time was up: training ended after {metrics['steps']} of {metrics['planned_steps']} steps "
            "(--time-limit allows more)."
        )
    if metrics.get("pairs"):
        sentences.append(_weights_in_words(metrics["pairs"]["last_visit"]))
    heldout = metrics.get("heldout", [])
    if len(heldout) >= 2:
        sentences.append(_accuracy_in_words(heldout[0], heldout[-1], metrics["data"]["heldout_pairs"]))
    elif metrics.get("planned_steps"):
        sentences.append("Held-out accuracy was not measured both before and after training.")
    return sentences


def _weights_in_words(visit):
    difference, error = visit["weight_difference"], visit["standard_error"]
    if difference is None:
        return (
            f"Weights of clean and flipped pairs cannot be compared: {visit['clean']['pairs']} clean and "
            f"{visit['flipped']['pairs']} flipped pairs were seen."
        )
    if math.isnan(difference) or math.isnan(error):
        return "Weights of clean and flipped pairs cannot be compared: some are not a number."
    size = f"{abs(difference):.4f} (standard error {error:.4f})"
    if difference == 0:
        return "Flipped pairs did NOT get a smaller weight than clean ones: the means are equal."
    if difference > 0:
        return f"Flipped pairs did NOT get a smaller weight than clean ones: the mean is larger by {size}."
    if difference > -2 * error:
        return (
            f"Flipped pairs got a smaller mean weight, by {size}: less than two standard errors, so it may be chance."
        )
    return f"Flipped pairs got a smaller weight than clean ones: the mean is smaller by {size}."


def _accuracy_in_words(before, after, pairs):
    a, b = (f"{round(e['accuracy'] * pairs)}/{pairs}" for e in (before, after))
    if after["accuracy"] > before["accuracy"]:
        return f"Held-out accuracy rose from {a} to {b}."
    change = "fell" if after["accuracy"] < before["accuracy"] else "stayed"
    margin = "rose" if after["margin"] > before["margin"] else "did not rise"
    return (
        f"Held-out accuracy did NOT improve: it {change} {'at' if change == 'stayed' else 'from'} {a}"
        f"{'' if change == 'stayed' else f' to {b}'} (the mean held-out margin {margin})."
    )


def render_table(metrics):
    """The metrics as plain text: a table of name and value, then the findings. What was not measured is left out."""
    rows = [("steps", f"{metrics.get('steps', 0)} of {metrics.get('planned_steps', 0)}")]
    data = metrics.get("data")
    if data:
        rows.append(("training pairs", f"{data['train_pairs']}, of which {data['flipped_pairs']} flipped"))
        rows.append(("held-out pairs", f"{data['heldout_pairs']}, none flipped"))
    training = metrics.get("training", [])
    if training:
        first, last = training[0], training[-1]
        rows.append(("training loss, first -> last step", f"{first['loss']:.4f} -> {last['loss']:.4f}"))
        rows.append(("training margin, first -> last step", f"{first['margin']:+.4f} -> {last['margin']:+.4f}"))
    heldout = metrics.get("heldout", [])
    if heldout:
        named = [("before", heldout[0])]
        if len(heldout) > 1:
            named.append((f"after step {heldout[-1]['step']}", heldout[-1]))
        for when, e in named:
            rows.append((f"held-out loss {when} (no anchor)", f"{e['loss']:.4f}"))
            rows.append((f"held-out margin {when}", f"{e['margin']:+.4f}"))
            rows.append((f"held-out accuracy {when}", f"{100 * e['accuracy']:.1f} %"))
    for visit, groups in metrics.get("pairs", {}).items():
        for name in ("clean", "flipped"):
            group = groups[name]
            if group["pairs"]:
                label = f"{name} pairs, {visit.replace('_', ' ')}: mean gap, mean weight"
                rows.append((label, f"{group['gap']:+.4f}, {group['weight']:.4f} ({group['pairs']} pairs)"))
    if metrics.get("tokens_per_second"):
        rows.append(("tokens per second, training", f"{metrics['tokens_per_second']:.0f}"))
    if metrics.get("peak_memory_bytes"):
        rows.append((f"peak memory ({metrics['peak_memory_of']})", f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"))
    if metrics.get("seconds"):
        rows.append(("time", ", ".join(f"{name} {seconds:.0f} s" for name, seconds in metrics["seconds"].items())))
    if metrics.get("device"):
        rows.append(("device", metrics["device"]))
    if metrics.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join([rule, *lines, rule, *metrics.get("findings", [])])


def write_plots(metrics, folder):
    """Write loss_and_accuracy.png and weight_against_gap.png into `folder`, each only when there is something to plot.

    Returns the list of files written (pathlib.Path).
    """
    # The object-oriented interface, with no pyplot: nothing looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []

    def save(figure, name):
        FigureCanvasAgg(figure)
        path = Path(folder) / name
        figure.savefig(path, dpi=120)
        written.append(path)

    training, heldout = metrics.get("training", []), metrics.get("heldout", [])
    if training or heldout:
        figure = Figure(figsize=(7, 6), layout="constrained")
        loss, accuracy = figure.subplots(2, sharex=True)
        steps = [e["step"] for e in heldout]
        loss.plot([e["step"] for e in training], [e["loss"] for e in training], label="training, with the anchor")
        loss.plot(steps, [e["loss"] for e in heldout], "o-", label="held out, no anchor")
        loss.set_ylabel("loss")
        loss.legend()
        accuracy.plot(steps, [e["accuracy"] for e in heldout], "o-", color="C1")
        accuracy.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        accuracy.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1))
        save(figure, "loss_and_accuracy.png")

    if metrics.get("pair_records"):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, marker, colour in (("clean", "o", "C0"), ("flipped", "x", "C3")):
            group = [r for r in metrics["pair_records"] if r["is_flipped"] == (name == "flipped")]
            if group:
                gaps = [r["gap"] for r in group]
                weights = [r["weight"] for r in group]
                label = f"{name} ({len(group)} visits)"
                axes.scatter(gaps, weights, s=22, marker=marker, color=colour, alpha=0.6, label=label)
                axes.axvline(fmean(gaps), color=colour, linewidth=1, linestyle="--", label=f"mean gap, {name}")
        axes.set(xlabel="anchor gap", ylabel="update weight")
        axes.legend()
        save(figure, "weight_against_gap.png")
    return written
