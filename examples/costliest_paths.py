"""The ten costliest gradient paths of a model, found with networkx: the products that a gradient waits for.

python examples/costliest_paths.py
"""

import networkx as nx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gtcompile


def main() -> list[tuple[int, int, str]]:
    """Print the ten costliest paths; returns FLOPs, number of nodes and parameter of each."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):  # shapes suffice: no weights in memory
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes))
    tokens = torch.ones(4, 32, dtype=torch.long)
    graph = gtcompile.dependency_graph(model, {"input_ids": tokens, "labels": tokens})
    backward = graph.subgraph(n for n, direction in graph.nodes(data="direction") if direction == "backward")
    paths = []
    for gradient, parameter in backward.nodes(data="gradient_of"):
        if parameter is not None:
            needed = backward.subgraph(nx.ancestors(backward, gradient) | {gradient}).copy()
            for _, reader, edge in needed.edges(data=True):
                edge["flops"] = needed.nodes[reader]["flops"]
            path = nx.dag_longest_path(needed, weight="flops")
            paths.append((sum(needed.nodes[node]["flops"] for node in path), len(path), parameter))
    costliest = sorted(paths, reverse=True)[:10]
    for flops, length, parameter in costliest:
        print(f"{flops / 1e6:8.2f} MFLOP through {length:3} nodes: {parameter}")
    return costliest


if __name__ == "__main__":
    main()
