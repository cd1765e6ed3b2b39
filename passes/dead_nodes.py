"""Erase the nodes that no output needs."""

from gtcompile.passes.contract import G, graph_pass


@graph_pass
def eliminate_dead_nodes(given: G) -> None:
    """Erase every node that no output and no side effect depends on.

    Before: `dx = mm(dy, w); dw = mm(t(x), dy); return (loss, None, dx)`
    After:  `dx = mm(dy, w); return (loss, None, dx)`

    Sound because the remaining nodes neither read nor observe the erased ones: inputs stay, and so do random
    draws and mutations (`Node.is_impure`) with everything they depend on. Leaves the unread outputs of an
    operator with several outputs to `narrow_output_masks`.
    """
    given.graph.eliminate_dead_code()
