"""How Inductor generates the code of regions."""

from typing import Any, Literal

from torch import fx

from gtcompile.passes import dropout
from gtcompile.torch_internals import CustomGraphPass, get_hash_for_files, inductor_config


class SplitDropout(CustomGraphPass):
    """Inductor's last pass over a graph: `passes.dropout.split_dropout`."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place."""
        dropout.split_dropout(graph)

    def uuid(self) -> bytes:
        """What the key of code on disk contains of this pass: its source."""
        return get_hash_for_files((dropout.__file__,))


def inductor_settings(random: Literal["eager", "compiler"]) -> dict[str, Any]:
    """Settings by name.

    Args:
        random: whose random numbers dropout draws; eager PyTorch's masks are multiplied by in generated code,
            unless a user's own last pass takes that place.
    """
    settings: dict[str, Any] = {"fallback_random": random == "eager"}
    if random == "eager" and inductor_config.post_grad_custom_post_pass is None:
        settings["post_grad_custom_post_pass"] = SplitDropout()
    return settings
