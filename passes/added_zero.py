"""Remove a zero that was added to activations so that their gradients are traced."""

from torch import fx

from gtcompile.passes.contract import interface_pass
from gtcompile.torch_internals import ParamAOTInput


@interface_pass("inputs")
def forget_added_zero(module: fx.GraphModule, target: str) -> None:
    """Remove an input that is zero, and the sums with it; the gradient by it stays an output.

    Before: `(x, zero, dy) -> y = add(x, zero); dx = mul(dy, w); return (mul(y, w), dx)`
    After:  `(x, dy) -> dx = mul(dy, w); return (mul(x, w), dx)`

    Sound because `x + 0` is `x`. The gradient by the zero is the sum of the gradients by the activations that
    it was added to, and keeping it keeps the backward down to them (`capture/forced_gradients.py`).

    Args:
        module: a joint graph with AOTAutograd's descriptors.
        target: name of the parameter that is the zero; a graph without such an input stays as it is.
    """
    for placeholder in module.graph.find_nodes(op="placeholder"):
        meaning = placeholder.meta.get("desc")
        if isinstance(meaning, ParamAOTInput) and meaning.target == target:
            _remove(placeholder)


def _remove(zero: fx.Node) -> None:
    for sum_ in list(zero.users):
        sum_.replace_all_uses_with(sum_.args[0])  # type: ignore[arg-type]
        zero.graph.erase_node(sum_)
    zero.graph.erase_node(zero)
