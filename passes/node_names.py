"""Rename nodes so that their numbers have no gaps."""

import re
from collections import Counter

from torch import fx

from gtcompile.passes.contract import interface_pass


@interface_pass("names")
def renumber_names(module: fx.GraphModule) -> None:
    """Renumber the names of nodes, separately for each base name.

    Before: `primals_3, primals_9 -> mm_4 = mm(primals_3, primals_9); return mm_4`
    After:  `primals_1, primals_2 -> mm = mm(primals_1, primals_2); return mm`

    Sound because names have no meaning to torch. The names in reports, exports and dumps of a model then do
    not depend on nodes that were captured and removed.
    """
    graph = fx.Graph(tracer_cls=module.graph._tracer_cls)
    twin: dict[fx.Node, fx.Node] = {}
    inputs: Counter[str] = Counter()
    for node in module.graph.nodes:
        name = re.sub(r"_\d+$", "", node.name)
        if node.op == "placeholder":
            inputs[name] += 1
            name = f"{name}_{inputs[name]}"
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), twin.__getitem__)
        twin[node] = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        twin[node].meta = node.meta
    module.graph = graph
