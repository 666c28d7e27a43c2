"""The README's table of memory per GPU: arithmetic on published sizes, by the formula above it there.

python docs/memory_table.py
"""

# Name, parameters, layers, width, vocabulary.
MODELS = [
    ("7B", 6.74e9, 32, 4096, 32000),
    ("8B", 8.03e9, 32, 4096, 128256),
    ("13B", 13.0e9, 40, 5120, 32000),
    ("70B", 70.6e9, 80, 8192, 128256),
]
TOKENS, COMPLETION_TOKENS, BUDGET = 2 * 2 * 2048, 2 * 2 * 512, 2**30  # 2 pairs, each completion with its prompt 2048
GIB = 2**30


def gib(parameters, layers, width, vocabulary, ranks):
    """(states, probe, layers, graph, head) in GiB."""
    states = 16 * parameters / ranks
    probe = 4 * parameters / ranks
    of_layers = 2 * 2 * parameters / layers + 2 * 2 * parameters / layers
    graph = 2 * layers * TOKENS * width
    head = BUDGET + 4 * COMPLETION_TOKENS * width + (2 + 4) * vocabulary * width
    return [part / GIB for part in (states, probe, of_layers, graph, head)]


def table():
    """Lines of Markdown."""
    lines = [
        "| model | GPUs | states | probe | layers | kept graph | head | GiB per GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, parameters, layers, width, vocabulary in MODELS:
        for ranks in (16, 64) if parameters > 2e10 else (4, 8):
            parts = gib(parameters, layers, width, vocabulary, ranks)
            cells = [f"{part:.1f}" for part in (*parts, sum(parts))]
            lines.append(f"| {name} | {ranks} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
