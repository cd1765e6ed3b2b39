"""Run subjects, store what was found out about each as one JSON line, and print a table in Markdown."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.torch_databases.comparison import (
    EXACT,
    FEWER,
    REFUSED,
    TOGETHER,
    VARIANTS,
    ZERO,
    Result,
    built,
    check,
    predict,
)
from benchmarks.torch_databases.subjects import FORMS, Form, Subject, subjects
from gtcompile.tools.common.files import read_lines, write_lines

RESULTS = Path(__file__).with_name("results.jsonl")
"""What was found out about all subjects, by the command in docs/operators.md."""
ONLY_CUDA = "the database has it for CUDA alone"
NOT_FUNCTIONAL = "torch's functionalization does not support `polygamma_`"
UPSTREAM: Mapping[tuple[str, Form], str] = {
    **{(f"polygamma (polygamma_n_{order})", "in place"): NOT_FUNCTIONAL for order in range(5)},
    ("torch.ops.aten._flash_attention_forward", "plain"): ONLY_CUDA,
    ("torch.ops.aten._efficient_attention_forward", "plain"): ONLY_CUDA,
    ("nn.functional.batch_norm (without_cudnn)", "plain"): ONLY_CUDA,
    ("nn.functional.one_hot", "plain"): "its result is an integer, which has no gradient",
}
"""Subjects and forms that eager PyTorch or its backend `aot_eager` cannot train either, with the reason."""
LEAVES_OUT: Mapping[str, str] = {
    "linalg.householder_product": "eager PyTorch computes both gradients, whatever is trained",
}
"""Subjects whose compiled code takes fewer FLOPs than eager PyTorch, with what it leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything found out about one subject."""

    subject: str
    forms: tuple[Form, ...]
    """The forms that were tried."""
    differences: tuple[Result, ...] = ()
    """Every result that is not right."""
    upstream: Mapping[Form, str] = field(default_factory=dict)
    """For each form with a wrong result: what `aot_eager` does wrong too; empty if nothing."""
    costs: str = ""
    """`exact`, `zero`, or why neither: first a key of `COSTS`, or `wrong`; empty if not run."""
    not_run: str = ""
    """Why the plain form was not run in eager PyTorch; empty if it was."""

    @property
    def kind(self) -> str:
        """The best word that holds for all results: a key of `KINDS`."""
        wrong = [result for result in self.differences if result.difference]
        if not self.forms:
            return "not run"
        if any(not self.upstream[result.form] for result in wrong):
            return "wrong"
        if wrong:
            return "upstream"
        return "FLOPs" if self.differences else "right"


KINDS = {
    "right": "right: gradients, None, buffers, `requires_grad` and FLOPs as in eager PyTorch",
    "FLOPs": "right, except for FLOPs",
    "upstream": "wrong where `aot_eager` is wrong too",
    "wrong": "wrong where `aot_eager` is right",
    "not run": "not run: eager PyTorch does not differentiate it on a CPU",
}
"""What each kind of report means."""
COSTS = {
    EXACT: "costs exact: predicted for random sets as counted in eager PyTorch",
    ZERO: "costs exact, and zero",
    FEWER: "costs exact for compiled code, which takes fewer FLOPs than eager PyTorch",
    REFUSED: "costs refused",
}
"""What each kind of costs means; anything else is wrong."""


def examine(members: Sequence[Subject]) -> list[Report]:
    """Try all forms of some subjects with both kinds of variants, and their costs."""
    tried = [result for form in FORMS for backend in VARIANTS for result in check(members, form, backend)]
    costs = predict(members)
    return [_report(member, [r for r in tried if r.subject == member.name], costs) for member in members]


def _report(member: Subject, results: Sequence[Result], costs: Mapping[str, str]) -> Report:
    failed = dict.fromkeys(result.form for result in results if result.difference)
    return Report(
        subject=member.name,
        forms=tuple(dict.fromkeys(result.form for result in results)),
        differences=tuple(result for result in results if not result.right),
        upstream={form: check([member], form, "aot_eager")[0].difference for form in failed},
        costs=costs.get(member.name, ""),
        not_run=built(member, "plain").failure,
    )


def unexpected(report: Report) -> list[str]:
    """What is not as in eager PyTorch and not in `UPSTREAM`, and what is in `UPSTREAM` needlessly."""
    found, listed = [], {form: why for (name, form), why in UPSTREAM.items() if name == report.subject}
    for result in report.differences:
        if report.subject in LEAVES_OUT and not result.difference and result.flops.startswith(FEWER):
            continue
        if result.form not in listed:
            found.append(str(result))
        elif not report.upstream.get(result.form):
            found.append(f"{result}, and aot_eager is right; so this is not why: {listed[result.form]}")
    for form, why in listed.items():
        if form in report.forms and all(result.form != form for result in report.differences):
            found.append(
                f"{report.subject}, {form}: right; take it off the list of what upstream fails: {why}"
            )
    if report.not_run and "plain" not in listed:
        found.append(f"{report.subject}, not run: {report.not_run}")
    kind = report.costs.partition(":")[0]
    if (kind == FEWER) != (report.subject in LEAVES_OUT) or (kind and kind not in COSTS):
        found.append(f"{report.subject}, its costs: {report.costs}")
    return found


def read_results(path: Path) -> list[Report]:
    """Read the reports that a file holds; none if there is no file."""
    return [_of_row(row) for row in read_lines(path)]


def _of_row(row: dict[str, Any]) -> Report:
    differences = tuple(Result(**{"subject": row["subject"], **each}) for each in row.get("differences", ()))
    return Report(**{**row, "forms": tuple(row["forms"]), "differences": differences})


def write_results(path: Path, reports: Iterable[Report]) -> None:
    """Write one JSON object a line; values that are empty are left out."""
    write_lines(path, [_without_empty(dataclasses.asdict(report)) for report in reports])


def _without_empty(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in row.items() if value or name == "forms"}
    if "differences" in kept:
        kept["differences"] = [{k: v for k, v in each.items() if v} for each in kept["differences"]]
    return kept


def markdown(reports: Sequence[Report]) -> str:
    """The numbers of operators and modules of each kind, and a list of everything that is not right."""
    return "\n\n".join(filter(None, (_numbers(reports), _differences(reports), _refusals(reports)))) + "\n"


def _numbers(reports: Sequence[Report]) -> str:
    columns = [[r for r in reports if not _is_module(r)], [r for r in reports if _is_module(r)]]

    def row(meaning: str, belongs: Callable[[Report], bool]) -> str:
        return _row(meaning, [sum(map(belongs, column)) for column in columns])

    lines = ["| | operators | modules |", "|---|---|---|", row("tried", lambda _: True)]
    lines += [row(meaning, lambda r, kind=kind: r.kind == kind) for kind, meaning in KINDS.items()]
    for kind, meaning in COSTS.items():
        lines.append(row(meaning, lambda r, kind=kind: r.costs.startswith(kind)))
    lines.append(row("costs wrong", lambda r: bool(r.costs) and not r.costs.startswith(tuple(COSTS))))
    return "\n".join(lines)


def _differences(reports: Sequence[Report]) -> str:
    rows = []
    for report in reports:
        for form in dict.fromkeys(result.form for result in report.differences):
            results = [result for result in report.differences if result.form == form]
            said = " ".join(dict.fromkeys(filter(None, (results[0].difference, results[0].flops))))
            variants = " and ".join(result.backend for result in results)
            reason = UPSTREAM.get((report.subject, form), "")
            rows.append(_row(report.subject, [form, variants, said, reason]))
        if report.not_run:
            reason = UPSTREAM.get((report.subject, "plain"), "")
            rows.append(_row(report.subject, ["plain", "", f"not run: {report.not_run}", reason]))
    if not rows:
        return ""
    header = [
        "| subject | form | variants | what happens | why upstream fails too |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*header, *rows])


def _refusals(reports: Sequence[Report]) -> str:
    listed = [report for report in reports if report.costs not in ("", EXACT, ZERO)]
    rows = [_row(report.subject, [report.costs, LEAVES_OUT.get(report.subject, "")]) for report in listed]
    return "\n".join(["| subject | its costs | why |", "|---|---|---|", *rows]) if rows else ""


def _is_module(report: Report) -> bool:
    return report.subject.startswith("nn.") and not report.subject.startswith("nn.functional.")


def _row(first: str, cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in (first, *cells))} |"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Subjects to try. Default: all.")] = None,
    output: Annotated[
        Path, typer.Option(help="results; subjects that an existing file holds are not tried again")
    ] = Path("torch_databases.jsonl"),
) -> None:
    """Train every operator and module of PyTorch's test databases, and print a table in Markdown."""
    known, console = subjects(), Console(stderr=True)
    if unknown := set(names or ()) - known.keys():
        raise typer.BadParameter(f"no operator or module is called {', '.join(sorted(unknown))}")
    reports = {report.subject: report for report in read_results(output)}
    chosen = [known[name] for name in names or known if name not in reports]
    groups = [chosen[i : i + TOGETHER] for i in range(0, len(chosen), TOGETHER)]
    for group in track(groups, description="training", console=console):
        for report in examine(group):
            reports[report.subject] = report
            for line in unexpected(report):
                console.print(line, highlight=False, markup=False)
        write_results(output, [reports[name] for name in known if name in reports])
    typer.echo(markdown([reports[name] for name in names or known]))
