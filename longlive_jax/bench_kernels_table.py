"""What `longlive bench --suite kernels` prints: a table for each op, and notes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from longlive_jax.bench_compile import GPUS, OK

if TYPE_CHECKING:
    from longlive_jax.bench_kernels import Default, KernelsReport, Row

COLUMNS = ("backend", "ms (best)", "TFLOP/s (of product)", "GB/s (of copy)", "others / it")


def tables(summary: KernelsReport) -> list[Table]:
    """Of each op, and notes."""
    peaks = ", ".join(f"{name} {x / 1e12:.4g}" for name, x in summary.peaks.flops.items())
    notes = Table(show_header=False, title=summary.device)
    notes.add_column(overflow="fold")
    notes.add_row(
        f"measured peaks: products of {summary.peaks.side} x {summary.peaks.side} {peaks} TFLOP/s;"
        f" copy of {summary.peaks.copied / 1e6:.0f} MB {summary.peaks.bandwidth / 1e9:.4g} GB/s"
    )
    for text in (*_left(summary), *_reasons(summary.rows)):
        notes.add_row(text)
    where = "everywhere" if summary.defaults_within else "not everywhere"
    notes.add_row(f"defaults are {where} within 5 % of the best other backend")
    return [*map(_table, *_grouped(summary)), notes]


def _grouped(summary: KernelsReport) -> tuple[list[list[Row]], list[dict[str, Default]]]:
    """Rows of each op, and its defaults by shape."""
    ops = list(dict.fromkeys(row.op for row in summary.rows))
    rows = [[row for row in summary.rows if row.op == op] for op in ops]
    picked = [{x.shape: x for x in summary.defaults if x.op == op} for op in ops]
    return rows, picked


def _table(rows: Sequence[Row], picked: dict[str, Default]) -> Table:
    """Backends that ran, or compile for something."""
    table = Table(title=rows[0].op)
    for column in ("shape", *COLUMNS, "default", *GPUS):
        table.add_column(column, no_wrap=column == "shape")
    for row in rows:
        verdicts = [OK if row.compiles.get(gpu) == OK else "–" for gpu in GPUS]
        if row.median_s is not None:
            table.add_row(row.shape, *_cells(row), _said(row, picked[row.shape]), *verdicts)
        elif OK in verdicts:
            table.add_row(row.shape, row.backend, *["–"] * 4, "", *verdicts)
    return table


def _said(row: Row, default: Default) -> str:
    """Of a default, whether it should be one."""
    if row.backend != default.default:
        return ""
    return "yes" if default.within else f"{default.ratio:.2f} x the best"


def _cells(row: Row) -> list[str]:
    return [
        row.backend,
        f"{1e3 * row.median_s:.3g} ({1e3 * row.best_s:.3g})",
        f"{row.tflops:.3g} ({row.of_product:.1%})" if row.tflops else "–",
        f"{row.gbps:.3g} ({row.of_copy:.1%})",
        ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.ratios.items()) or "–",
    ]


def _left(summary: KernelsReport) -> Iterator[str]:
    for op, shapes in summary.left_out.items():
        yield f"{op}: not run, a call may take over {summary.budget_s:g} s: {', '.join(shapes)}"


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Why what did not run, and what does not compile; once for all shapes of an op."""
    told = defaultdict(list)
    verdicts = {verdict for row in rows for verdict in row.compiles.values()}
    alike = len(verdicts) == 1 and OK not in verdicts
    if alike:
        yield f"not compiled for {', '.join(GPUS)}: {verdicts.pop()}"
    for row in rows:
        if row.refused:
            told[row.op, row.backend, row.refused].append(row.shape)
        for gpu, verdict in row.compiles.items():
            if verdict != OK and not alike:
                told[row.op, f"{row.backend} for {gpu}", verdict].append(row.shape)
    for (op, what, why), shapes in told.items():
        every = {row.shape for row in rows if row.op == op}
        where = "" if set(shapes) == every else f" ({', '.join(shapes)})"
        yield f"{op}: {what}: {why}{where}"
