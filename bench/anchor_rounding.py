"""What rounding does to the Anchor Gap: its error against float64 for nearest, stochastic and no rounding of theta~.

    python bench/anchor_rounding.py            # SmolLM2-135M-Instruct and tiny models
    python bench/anchor_rounding.py --quick    # the tiny models only, nothing is written

Four measurements. The error is || gaps - truth ||_2 / || truth ||_2 over the pairs of one batch.
    rho         SmolLM2 with weights on bfloat16's grid, over the radius of the perturbation
    batches     the same at one radius, on every batch of the shipped pairs: one pair's large gap can decide a norm
    parameters  Llamas with random weights on that grid, over their number of parameters
    masters     SmolLM2 with float32 masters off the grid, whose forward computes with bf16(theta), or as under
                autocast, where norms and embedding lookups are not cast

All but the truth is float32 arithmetic (and of the batches the truth, too: what "rho" says of float32 is how exact that
is), so what is compared is the rounding of the weights alone. A forward that casts its weights to bfloat16 is a forward
with weights that lie on the grid: the casts are made in the parameters, and the gradient at bf16(theta) is also the one
that such casts hand to the masters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]  # the tree that this file lies in, installed or not

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness
from gapo_kernels import AnchorStats, GeometricAnchor, gapo_objective, sequence_logps

RHOS = (0.0125, 0.025, 0.05, 0.1)
RHO = 0.025  # where only one is measured: the authors' recipe for Mistral-7B
BETA, GAMMA = 2.0, 0.5
MAX_LENGTH = 128
PAIRS_AT_ONCE = 4
TINY_SEEDS = 5
# hidden size, layers, vocabulary, MLP width: about 1e4 to 1e7 parameters.
TINY = ((16, 2, 256, 48), (32, 4, 512, 96), (64, 6, 1024, 192), (128, 8, 2048, 384), (256, 10, 4096, 768))
GRID = torch.bfloat16
# Masters off the grid: float32's lower 16 bits, of which 2^15 is half of a bfloat16's last digit.
MASTERS = {
    "close to the grid": 2**11 - 1,  # 1/32 of a last digit to either side: fine-tuning has just begun
    "anywhere off the grid": 2**15 - 1,
    "as this checkpoint has them": None,
}
Weights = list[Tensor]


# ---- the gaps of one batch ----


def margins(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """M (B,) of the pairs of a `PreferenceCollator` batch."""
    hidden = model.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    logps = sequence_logps(logits, batch["labels"])
    chosen, rejected = logps.chunk(2)
    return chosen - rejected


def all_margins(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """(B,) float64, without a graph."""
    with torch.no_grad():
        return torch.cat([margins(model, batch).double() for batch in batches])


def probe(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Weights:
    """The gradient of J = mean -log sigma(beta M - gamma) for every parameter, in the order of the anchor's."""
    params = GeometricAnchor.from_model(model).params
    pairs = sum(len(batch["index"]) for batch in batches)
    total = [torch.zeros_like(param) for param in params]
    for batch in batches:
        objective, _ = gapo_objective(margins(model, batch), beta=BETA, gamma=GAMMA)
        for sum_, grad in zip(total, torch.autograd.grad(objective, params)):
            sum_.add_(grad, alpha=len(batch["index"]) / pairs)
    return total


class Measurement:
    """Gaps of one model on one batch, at anchors made from one gradient."""

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Tensor]], grads: Weights, clean: Tensor) -> None:
        self._model, self._batches, self.grads, self.clean = model, batches, grads, clean

    def gaps(
        self,
        rho: float,
        dtype: torch.dtype | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, AnchorStats]:
        """(B,) float64. `then` is applied to every weight of the anchor before the model runs there."""
        anchor = GeometricAnchor.from_model(self._model, rho=rho, compute_dtype=dtype, rounding=rounding, seed=seed)
        with anchor.perturbed(grads=self.grads):
            for param in anchor.params if then else ():
                param.data.copy_(then(param.data))
            return self.clean - all_margins(self._model, self._batches), anchor.stats


def truth_of(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Callable[[float], Tensor]:
    """rho -> gaps (B,) with everything in float64: the probe, its gradient, the anchor, both margins."""
    model = deepcopy(model).double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # transformers' own computes in float32 whatever it is given
            module.forward = _norm_in_own_dtype(module)
    measurement = Measurement(model, batches, probe(model, batches), all_margins(model, batches))
    return lambda rho: measurement.gaps(rho)[0]


def _norm_in_own_dtype(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda hidden: F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def error(gaps: Tensor, truth: Tensor) -> float:
    return (torch.linalg.vector_norm(gaps - truth) / torch.linalg.vector_norm(truth)).item()


# ---- weights ----


def to_grid(weight: Tensor) -> Tensor:
    return weight.to(GRID).float()


def round_stochastically(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A float32 weight to one of its two bfloat16 neighbours: what the anchor does, around another value."""
    bits = torch.randint(2**16, weight.shape, dtype=torch.int32, generator=generator)
    return (weight.view(torch.int32) + bits).bitwise_and_(-(2**16)).view(torch.float32)


def off_grid(weight: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """A weight on the grid plus uniform noise in its lower bits, too small for the cast to see."""
    bits = torch.randint(-reach, reach + 1, weight.shape, dtype=torch.int32, generator=generator)
    return torch.where(weight == 0, weight, (weight.view(torch.int32) + bits).view(torch.float32))


def load(model: nn.Module, weights: Weights) -> None:
    for param, weight in zip(model.parameters(), weights):
        param.data.copy_(weight)


# ---- measurements ----


def on_the_grid(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], rhos: Sequence[float], seeds: int, names: dict
) -> tuple[list[dict], Measurement, dict[float, Tensor]]:
    """One case for each rho: nearest, stochastic and float32 on weights that lie on the grid."""
    truth_at = truth_of(model, batches)
    truths = {rho: truth_at(rho) for rho in rhos}
    del truth_at
    measurement = Measurement(model, batches, probe(model, batches), all_margins(model, batches))
    cases = []
    for rho in rhos:
        runs = {
            "nearest": [measurement.gaps(rho, GRID, "nearest")],
            "stochastic": [measurement.gaps(rho, GRID, "stochastic", seed) for seed in range(seeds)],
            "float32": [measurement.gaps(rho, torch.float32)],
        }
        roundings = {name: _described([gaps for gaps, _ in run], truths[rho]) for name, run in runs.items()}
        for name, run in runs.items():
            roundings[name]["changed_fraction"] = fmean(stats.changed_fraction for _, stats in run)
            roundings[name]["applied_over_intended_norm"] = fmean(s.applied_norm / s.intended_norm for _, s in run)
        case = {**names, "rho": rho, "true_mean_gap": truths[rho].mean().item(), "roundings": roundings}
        cases.append(case)
        _say(f"{names['model']}, rho {rho}", case)
    return cases, measurement, truths


def _described(gaps: Sequence[Tensor], truth: Tensor) -> dict[str, list[float]]:
    return {"errors": [error(g, truth) for g in gaps], "mean_gaps": [g.mean().item() for g in gaps]}


def tiny_model(hidden: int, layers: int, vocabulary: int, width: int, seed: int) -> nn.Module:
    """A Llama with random weights on the grid."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 8,
        num_key_value_heads=hidden // 8,
        intermediate_size=width,
        max_position_embeddings=64,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    load(model, [to_grid(param.data) for param in model.parameters()])
    return model


def tiny_models(seeds: int, pairs: int) -> list[dict]:
    cases = []
    for shape in TINY:
        for seed in range(TINY_SEEDS):
            model = tiny_model(*shape, seed)
            size = sum(param.numel() for param in model.parameters())
            names = {
                "part": "parameters",
                "model": f"random Llama of {size} parameters, seed {seed}",
                "parameters": size,
                "model_seed": seed,
            }
            cases += on_the_grid(model, random_batches(shape[2], pairs, seed), (RHO,), seeds, names)[0]
    return cases


def random_batches(vocabulary: int, pairs: int, seed: int) -> list[dict[str, Tensor]]:
    from gapo_trainer.preferences import PreferenceCollator

    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(1, vocabulary, (count,), generator=generator).tolist()

    rows = [
        {"prompt_ids": tokens(8), "chosen_ids": tokens(24), "rejected_ids": tokens(16), "index": i, "is_flipped": False}
        for i in range(pairs)
    ]
    return [PreferenceCollator(0)(rows)]


def smollm2(seeds: int, pairs: int) -> list[dict]:
    from gapo_trainer.preferences import PreferenceCollator, load_preferences, tokenize_pairs
    from gapo_trainer.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    collate = PreferenceCollator(tokenizer.pad_token_id or 0)

    def batches_of(shipped):
        rows = tokenize_pairs(shipped, tokenizer, MAX_LENGTH)
        return [collate(rows[i : i + PAIRS_AT_ONCE]) for i in range(0, len(rows), PAIRS_AT_ONCE)]

    batches = batches_of(load_preferences("train")[:pairs])
    checkpoint = [param.data.clone() for param in model.parameters()]
    grid = [to_grid(weight) for weight in checkpoint]
    load(model, grid)
    names = {"model": "SmolLM2-135M-Instruct", "parameters": sum(weight.numel() for weight in grid)}
    cases, measurement, truths = on_the_grid(model, batches, RHOS, seeds, {"part": "rho", **names})
    for number, (kind, reach) in enumerate(MASTERS.items()):
        generator = torch.Generator().manual_seed(number)
        masters = checkpoint if reach is None else [off_grid(weight, reach, generator) for weight in grid]
        case = {"part": "masters", **names, "masters": kind, "rho": RHO}
        case |= off_the_grid(model, batches, masters, grid, measurement, truths[RHO], seeds)
        cases.append(case)
        _say(f"masters {kind}", case)
    for split in ("train", "test"):
        shipped = load_preferences(split)
        for start in range(0, len(shipped) - pairs + 1, pairs):
            case = {"part": "batches", **names, "batch": f"{split} {start + 1} to {start + pairs}", "rho": RHO}
            case |= one_batch(model, batches_of(shipped[start : start + pairs]), seeds)
            cases.append(case)
            _say(case["batch"], case)
    return cases


def one_batch(model: nn.Module, batches: Sequence[dict[str, Tensor]], seeds: int) -> dict:
    """Of weights on the grid at RHO. `errors_of_others`: of all pairs but the one whose gap is the largest."""
    measurement = Measurement(model, batches, probe(model, batches), all_margins(model, batches))
    truth = measurement.gaps(RHO, torch.float32)[0]
    others = torch.arange(len(truth)) != truth.abs().argmax()
    runs = {
        "nearest": [measurement.gaps(RHO, GRID, "nearest")[0]],
        "stochastic": [measurement.gaps(RHO, GRID, "stochastic", seed)[0] for seed in range(seeds)],
    }
    roundings = {
        name: {**_described(run, truth), "errors_of_others": [error(gaps[others], truth[others]) for gaps in run]}
        for name, run in runs.items()
    }
    return {"true_mean_gap": truth.mean().item(), "true_gaps": truth.tolist(), "roundings": roundings}


def off_the_grid(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    masters: Weights,
    grid: Weights,
    measurement: Measurement,
    truth: Tensor,
    seeds: int,
) -> dict:
    """Float32 masters whose forward computes with `grid`, their cast. `measurement`, `truth`: of the model on that grid.

    The truth is that of the model that the forward computes; `float32_training` is how far from it are the gaps of
    somebody who trains the masters in float32, without casts, and so at slightly different weights.
    """
    if not all(map(torch.equal, map(to_grid, masters), grid)):
        raise AssertionError("expected masters that the cast takes to the grid's weights, got others")
    load(model, masters)
    uncast = Measurement(model, batches, probe(model, batches), all_margins(model, batches))
    in_float32 = uncast.gaps(RHO, torch.float32)[0]
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    clean = autocast_margins(model, batches)

    def autocast_gaps(seed: int) -> Tensor:
        anchor = GeometricAnchor.from_model(model, rho=RHO, compute_dtype=GRID, seed=seed)
        with anchor.perturbed(grads=measurement.grads):
            return clean - autocast_margins(model, batches)

    ways = {
        "cast(theta + delta)": [measurement.gaps(RHO, torch.float32, then=to_grid)[0]],
        "SR(theta + delta)": [
            measurement.gaps(RHO, torch.float32, then=lambda weight, g=g: round_stochastically(weight, g))[0]
            for g in generators
        ],
        "SR(cast(theta) + delta)": [
            measurement.gaps(RHO, GRID, "stochastic", seed, then=to_grid)[0] for seed in range(seeds)
        ],
        "SR(cast(theta) + delta), autocast": list(map(autocast_gaps, range(seeds))),
    }
    load(model, grid)
    return {
        "true_mean_gap": truth.mean().item(),
        "float32_training": _described([in_float32], truth),
        "ways": {name: _described(gaps, truth) for name, gaps in ways.items()},
    }


def autocast_margins(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """(B,) float64: the model's margins in float32 arithmetic, all weights cast but norms and embedding lookups."""
    embedding = model.get_input_embeddings()
    lookup = embedding.weight.data.clone()  # the head, which is tied to it, is cast
    own = [param.data.clone() for param in model.parameters()]
    for name, param in model.named_parameters():
        if "norm" not in name:
            param.data.copy_(to_grid(param.data))
    handle = embedding.register_forward_hook(lambda module, args, output: F.embedding(args[0], lookup))
    try:
        return all_margins(model, batches)
    finally:
        handle.remove()
        load(model, own)


# ---- results ----


def _say(name: str, case: dict) -> None:
    ways = case.get("roundings") or {"float32 training": case["float32_training"], **case["ways"]}
    print(f"{name}: true mean gap {case['true_mean_gap']:.4g}")
    for way, results in ways.items():
        low, high = min(results["errors"]), max(results["errors"])
        spread = f" ({low:.3%} to {high:.3%})" if len(results["errors"]) > 1 else ""
        print(f"    {way:34} error {fmean(results['errors']):9.3%}{spread}, mean gap {fmean(results['mean_gaps']):.4g}")
    sys.stdout.flush()


def write_json(folder: Path, origin: dict, settings: dict, cases: list[dict]) -> Path:
    """FOLDER/anchor-rounding-DEVICE.json, replaced as a whole."""
    path = folder / f"anchor-rounding-{harness.slug(harness.device_name())}.json"
    temporary = path.with_suffix(".tmp")
    command = " ".join(["python bench/anchor_rounding.py", *sys.argv[1:]])
    content = {"environment": origin, "command": command, "settings": settings, "cases": cases}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the tiny models only")
    parser.add_argument("--pairs", type=int, default=16, help="preference pairs in the batch")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the stochastic rounding")
    parser.add_argument("--output", type=Path, help="folder for the results; default: bench/results here")
    arguments = parser.parse_args()
    if arguments.pairs < 2 or arguments.seeds < 1:
        parser.error("--pairs must be at least 2 and --seeds at least 1")
    results = arguments.output or ROOT / "bench" / "results"
    results.mkdir(parents=True, exist_ok=True)

    # The library says that nearest rounding loses the perturbation, which is what is measured here.
    warnings.filterwarnings("ignore", message="of a perturbation with norm")
    origin, begin = harness.environment(), time.perf_counter()
    cases = tiny_models(arguments.seeds, arguments.pairs)
    if not arguments.quick:
        cases += smollm2(arguments.seeds, arguments.pairs)
    settings = {"pairs": arguments.pairs, "max_length": MAX_LENGTH, "rounding_seeds": arguments.seeds}
    settings |= {"tiny_model_seeds": TINY_SEEDS, "beta": BETA, "gamma": GAMMA, "probe": "loss", "geometry": "asam"}
    settings["seconds"] = round(time.perf_counter() - begin)
    if arguments.quick and not arguments.output:
        print(f"{settings['seconds']} s; a quick run writes its results only with --output")
        return
    print(f"{settings['seconds']} s, written to {write_json(results, origin, settings, cases)}; `make report` draws the plot")


if __name__ == "__main__":
    main()
