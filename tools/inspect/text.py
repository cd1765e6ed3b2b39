"""An inspection as text: readable at 100 columns and without colour."""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions
from rich.filesize import decimal
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gtcompile.costs.explain import Difference, Explanation, compare_trained_sets, explain
from gtcompile.errors import some
from gtcompile.graph.names import match_patterns, near_names
from gtcompile.tools.common.terminal import say
from gtcompile.tools.inspect.inspection import Inspection
from gtcompile.tools.inspect.options import ORDERS, check_order
from gtcompile.tools.inspect.why import selection_lines

BAR, SHORT_BAR = 20, 10
"""Characters of a full bar, on a wide and on a narrow terminal."""
NARROW = 100
"""On fewer columns, bars are short and shapes are left out, so that names have room."""
LOOK: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
"""Style of every table; a name of 46 characters fits on one line at 100 columns."""
LISTED = 6
"""Names of a long list that are printed."""


def show(
    console: Console, inspection: Inspection, *, only: str | None, order: str, top: int, blocks: bool = True
) -> None:
    """Print the model, its costs, the plan by block and the first parameters in the given order.

    Args:
        console: where to print.
        inspection: what to print.
        only: path segments, shell-style, that parameters must have: `layers.1` is not `layers.10`.
        order: `name` or a key of `ORDERS`.
        top: most parameters to list; 0 for all.
        blocks: whether to print the plan by block.

    Raises:
        ValueError: no parameter has these segments, or the order is unknown.
    """
    rows = chosen_rows(inspection, only, order)
    say(console, headline(inspection))
    console.print(_costs(inspection))
    say(console, f"this plan: {inspection.selection}")
    bound = inspection.selection.importance_bound
    say(console, "" if bound is None else f"no set within the budget has more importance than {bound:.4g}\n")
    if blocks:
        shown = {row["block"] for row in rows}
        chosen = [block for block in inspection.blocks() if block["block"] in shown]
        console.print(_blocks(chosen, SHORT_BAR if console.width < NARROW else BAR))
    console.print(_parameters(rows[: top or None], len(rows), order, shapes=console.width >= NARROW))
    say(console, *inspection.lines())


def headline(inspection: Inspection) -> str:
    """The model in one line."""
    parameters = inspection.costs.parameters
    elements = sum(p.numel for p in parameters)
    return (
        f"{inspection.model}: {inspection.architecture}, {elements:,} elements in {len(parameters)} "
        f"parameters, {len(inspection.costs.fqns)} selectable"
    )


def chosen_rows(inspection: Inspection, only: str | None, order: str) -> list[dict[str, Any]]:
    """Rows of the parameters with these path segments, in this order.

    Raises:
        ValueError: no parameter has them, or the order is unknown.
    """
    check_order(order)
    rows = inspection.rows()
    if only is not None:
        names = [row["parameter"] for row in rows]
        rows = [
            row for row in rows if any(has_segments(n, only) for n in (row["parameter"], *row["aliases"]))
        ]
        if not rows:
            raise ValueError(f"--filter: {only!r} matches no parameter; {near_names(only, _paths(names))}")
    if order != "name":
        rows.sort(key=lambda row: row[ORDERS[order]] or 0, reverse=True)
    return rows


def has_segments(fqn: str, wanted: str) -> bool:
    """Whether consecutive segments of a name match those wanted, shell-style and whole."""
    parts, patterns = fqn.split("."), wanted.strip(".").split(".")
    starts = range(len(parts) - len(patterns) + 1)
    return any(all(map(fnmatch.fnmatchcase, parts[start:], patterns)) for start in starts)


def _paths(names: Sequence[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(p[:n]) for p in parts for n in range(len(p), 0, -1)))


def _costs(inspection: Inspection) -> Table:
    totals = inspection.totals()
    full = totals["full_flops"] or 1
    table = Table(**LOOK)
    table.add_column("")
    for column in ("FLOPs a step", "of full"):
        table.add_column(column, justify="right")
    table.add_column("saved for backward", justify="right")
    saved = {"full step": totals["full_saved_bytes"], "this plan": totals["step_saved_bytes"]}
    for name, key in (
        ("forward", "forward_flops"),
        ("activation gradients dX", "dx_flops"),
        ("weight gradients dW", "dw_flops"),
        ("full step", "full_flops"),
        ("budget", "budget_flops"),
        ("this plan", "step_flops"),
    ):
        held = decimal(saved[name]) if name in saved else ""
        table.add_row(name, f"{totals[key]:.4g}", f"{totals[key] / full:.1%}", held)
    return table


def _blocks(blocks: Sequence[dict[str, Any]], length: int) -> Table:
    table = Table(title="plan by block", title_justify="left", **LOOK)
    table.add_column("block")
    for column in ("elements", "dW FLOPs", "trained"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("of elements", no_wrap=True)
    for block in blocks:
        share = block["trained_elements"] / block["elements"] if block["elements"] else 0.0
        table.add_row(
            DottedName(block["block"]),
            f"{block['elements']:,}",
            f"{block['dw_flops']:.3g}",
            f"{block['trained']}/{block['parameters']}",
            f"{bar(share, length)} {percentage(share):>4}",
        )
    return table


def bar(share: float, length: int = BAR) -> str:
    """A bar of `length` characters; any share above 0 shows, and only 1 fills it."""
    full = min(round(share * length), length if share >= 1 else length - 1)
    full = max(full, 1) if share > 0 else 0
    return "█" * full + "·" * (length - full)


def percentage(share: float) -> str:
    """A share in whole percent; only 1 is 100% and only 0 is 0%."""
    return f"{share:.0%}" if share in (0.0, 1.0) else f"{min(max(share, 0.01), 0.99):.0%}"


@dataclass(frozen=True, slots=True)
class DottedName:
    """A name in a table; a line break in it comes before a dot."""

    name: str

    def lines(self, width: int) -> list[str]:
        """The name in lines of at most `width` characters, or of one segment if that is longer."""
        lines = [""]
        for segment in re.split(r"(?=\.)", self.name):
            if lines[-1] and len(lines[-1] + segment) > width:
                lines.append("")
            lines[-1] += segment
        return lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text("\n".join(self.lines(options.max_width)), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(len, self.lines(1))), len(self.name))


def _parameters(rows: Sequence[dict[str, Any]], of: int, order: str, *, shapes: bool) -> Table:
    by = "in the model's order" if order == "name" else f"by {order}"
    title = f"{len(rows)} of {of} parameters, {by}"
    table = Table(title=title, title_justify="left", **LOOK)
    table.add_column("parameter")
    for column in (*(("shape",) if shapes else ()), "dW FLOPs", "marginal", "importance", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            DottedName(row["parameter"]),
            *(("x".join(map(str, row["shape"])),) if shapes else ()),
            f"{row['dw_flops']:.3g}",
            f"{row['marginal_flops']:.3g}",
            "-" if row["importance"] is None else f"{row['importance']:.3g}",
            row["status"],
        )
    return table


def trained_set(inspection: Inspection, text: str) -> frozenset[str]:
    """Read a trained set from the command line.

    Args:
        inspection: of the model.
        text: `plan`, `all`, `none`, the number of a run's epoch, or FQNs and patterns separated by commas.

    Raises:
        ValueError: a pattern matches nothing, or there is no such epoch.
    """
    words = {"plan": inspection.selection.trained, "all": inspection.costs.fqns, "none": frozenset[str]()}
    if text in words:
        return words[text]
    if text.isdecimal():
        if inspection.run is None:
            raise ValueError(f"--diff: only a run has an epoch {text}; inspect its output folder to name one")
        return frozenset(inspection.run.selection_at(int(text))["trained"])
    return match_patterns(inspection.costs.names, [part.strip() for part in text.split(",")])


def show_why(console: Console, inspection: Inspection, subject: str) -> None:
    """Print why a parameter was selected or not, and why a node is computed in this plan or not.

    Raises:
        ValueError: there is no such node or parameter.
    """
    why = explain(inspection.joint, subject, inspection.selection.trained)
    say(console, f"why {subject}?", *selection_lines(inspection, subject), *why_lines(why), "")


def why_lines(why: Explanation) -> list[str]:
    """An explanation, one fact a line."""
    lines = [f"  {why}", f"  its own work: {why.flops:.4g} FLOPs a step"]
    if len(why.path) == 1:
        lines.append(f"  it is the gradient of {why.reached}")
    elif why.path:
        verb = "read by" if why.needed_by else "would be read by"
        lines.append(f"  {verb}: {_way(why.path)} = gradient of {why.reached}")
    if len(why.chain) > 1:
        lines.append(f"  from the loss: {_way(why.chain)}")
    if why.needed_by:
        lines.append(f"  needed by: {some(sorted(why.needed_by), most=LISTED)}")
        frees = sorted(why.freed_flops.items(), key=lambda item: -item[1])[:LISTED]
        if len(why.needed_by) > 1:
            lines += [f"    freezing {fqn} alone frees {flops:.4g} FLOPs" for fqn, flops in frees]
        goes = "eliminates it" if why.phase == "backward" else "lets it go after the forward"
        what = "that one" if len(why.needed_by) == 1 else f"all {len(why.needed_by)}"
        lines.append(f"    freezing {what} {goes} and frees {why.freed_together_flops:.4g} FLOPs")
    if why.would_need:
        also = "also read for the frozen" if why.needed_by else "training one of these brings it back"
        lines.append(f"  {also}: {some(sorted(why.would_need), most=LISTED)}")
    return lines


def show_difference(console: Console, inspection: Inspection, before: str, after: str) -> None:
    """Print the changes from one trained set to another.

    Raises:
        ValueError: a pattern matches nothing, or there is no such epoch.
    """
    sets = [trained_set(inspection, text) for text in (before, after)]
    say(console, *difference_lines(compare_trained_sets(inspection.joint, *sets), before, after))


def difference_lines(difference: Difference, before: str, after: str) -> list[str]:
    """A difference, one fact a line."""
    d = difference
    return [
        f"from {before} to {after}: {d}",
        f"  in: {some(d.entered, most=LISTED) or 'none'}",
        f"  out: {some(d.left, most=LISTED) or 'none'}",
        f"  FLOPs a step: +{d.gained_flops:.4g} -{d.lost_flops:.4g}",
        f"  saved for backward: +{decimal(d.gained_bytes)} -{decimal(d.lost_bytes)}",
        f"  nodes that appeared: {some(d.appeared, most=LISTED) or 'none'}",
        f"  nodes that went: {some(d.gone, most=LISTED) or 'none'}",
    ]


def _way(path: Sequence[str]) -> str:
    shown = (
        path
        if len(path) <= 2 * LISTED
        else (*path[:LISTED], f"({len(path) - 2 * LISTED} more)", *path[-LISTED:])
    )
    return " > ".join(shown)
