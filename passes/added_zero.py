"""Remove the zero that was added to activations to trace their gradients."""

from torch import fx

from gtcompile.passes.contract import interface_pass
from gtcompile.torch_internals import ParamAOTInput


@interface_pass("inputs")
def forget_added_zero(module: fx.GraphModule, target: str) -> None:
    """Remove a zero input and the additions of it. The gradient with respect to it stays an output.

    Before: `(x, zero, dy) -> y = add(x, zero); dx = mul(dy, w); return (mul(y, w), dx)`
    After:  `(x, dy) -> dx = mul(dy, w); return (mul(x, w), dx)`

    Sound because `x + 0` is `x`. The gradient of the zero is the sum of the gradients of the activations that
    it was added to. As an output it keeps their backward alive (see `capture/forced_gradients.py`).

    Args:
        module: a joint graph with AOTAutograd's descriptors.
        target: name of the zero parameter. A graph without this input does not change.
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
