"""Erase dead nodes."""

from gtcompile.passes.contract import G, graph_pass


@graph_pass
def eliminate_dead_nodes(given: G) -> None:
    """Erase every node that no output and no side effect depends on.

    Before: `dx = mm(dy, w); dw = mm(t(x), dy); return (loss, None, dx)`
    After:  `dx = mm(dy, w); return (loss, None, dx)`

    Sound because no remaining node reads an erased one. Inputs stay, and so do random draws and mutations
    (`Node.is_impure`) with everything they depend on. Unread outputs of operators with several outputs are
    left to `narrow_output_masks`.
    """
    given.graph.eliminate_dead_code()
