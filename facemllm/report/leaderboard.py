"""The leaderboard, and a benchmark's figures, as tables of words: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from facemllm.report.kit import decimals, number, p_value, plain_markdown
from facemllm.report.kit import table as markdown_table

NONE = "–"


@dataclass(frozen=True)
class Words:
    """A table: title, head and rows of words; `notes` stand beneath it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def tables(board: Mapping[str, Any]) -> Iterator[Words]:
    """What a leaderboard (`evaluate.leaderboard`) says: models, tasks, differences, failures."""
    models = [row for row in board["models"] if row["error"] is None]
    models.sort(key=lambda row: row["fine_tuned_from"] is not None)
    columns = list(dict.fromkeys(name for row in models for name in row["figures"]))
    heads = [name for name in columns if name.startswith("overall")]
    what = f"{board['benchmark'] or ', '.join(board['sources'])}, split {board['split']}"
    if models:
        yield Words(
            f"leaderboard on {what} (shares in %, with 95 % intervals)",
            ("model", "setting", "answers", "pictures", *heads, "unreadable", "not answered", "parameters")
            + ("a question costs", "price", "questions/s"),
            [_model(row, heads) for row in models],
            list(_notes(models)),
        )
        yield Words(
            "by task",
            ("task", *(row["name"] for row in models)),
            [(name, *(figure(row["figures"].get(name)) for row in models)) for name in columns if name not in heads],
        )
    if board["differences"]:
        yield Words(
            "fine-tuned against what it was tuned from (paired, the same people and pictures for both)",
            ("model", "from", "figure", "difference", "p (Holm)", "verdict"),
            [
                (row["name"], row["from"], name, figure({**entry["difference"], **_kind(entry)}, signed=True))
                + (p_value(entry["p_holm"]), entry["verdict"])
                for row in board["differences"]
                for name, entry in row["figures"].items()
            ],
        )
    if failed := [row for row in board["models"] if row["error"] is not None]:
        yield Words("failed; run again to go on", ("model", "why"), [(row["name"], row["error"]) for row in failed])


def _model(row: Mapping[str, Any], heads: Sequence[str]) -> tuple[str, ...]:
    tuned, cost = row["fine_tuned_from"], row["cost"]
    seconds, questions = cost["seconds"], cost["questions"]
    return (
        row["name"],
        "training-free" if tuned is None else f"fine-tuned from {tuned}",
        row["way"],
        _pictures(cost),
        *(figure(row["figures"].get(name)) for name in heads),
        _percent(row["unreadable"]),
        _percent(row["not_answered"]),
        NONE if cost["parameters"] is None else _scaled(cost["parameters"], "MBT", 1e6),
        _question_costs(cost),
        NONE if cost["price"] is None else f"{cost['price']:.4g}",
        f"{questions / seconds:.3g}" if seconds and questions else NONE,
    )


def _pictures(cost: Mapping[str, Any]) -> str:
    if cost["image_tokens"] is None:
        return f"at most {cost['side']} px"
    return f"{cost['side']} px, {cost['image_tokens']} tokens"


def _question_costs(cost: Mapping[str, Any]) -> str:
    if cost["operations"] is not None:
        return f"{cost['operations'] / 1e9:.3g} GFLOP"
    if cost["tokens_in"] is not None:
        return f"{cost['tokens_in']:.0f} + {cost['tokens_out']:.0f} tokens"
    return NONE


def _notes(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    by_name = {row["name"]: row for row in models}
    for row in models:
        base = by_name.get(row["fine_tuned_from"] or "")
        if base is not None and _pictures(base["cost"]) != _pictures(row["cost"]):
            yield (
                f"{row['name']} and {base['name']} were shown pictures of different sizes ({_pictures(row['cost'])}; "
                f"{_pictures(base['cost'])}): their difference is of both; image_size in the list makes them the same."
            )
    if len({row["way"] for row in models}) > 1:
        yield (
            "likelihood: the options are scored, as `facemllm evaluate` does with models of ours; written: asked in "
            "words and read strictly. The two do not compare; list a base as `ours` to have both scored."
        )
    if any(row["kind"] == "endpoint" for row in models):
        yield "Questions a second of an endpoint are one after the other; price is what its usage gives, as a sum."


def lines(metrics: Mapping[str, Any]) -> Words:
    """A benchmark's figures (`scoring.benchmarks`) by place: its own rules and ours side by side."""
    rules = [rule for rule in ("own", "own_answered", "ours", "likelihood") if rule in metrics["figures"][""]]
    body = metrics["figures"].items()
    gaps = any("gap" in entry for _, entry in body)
    return Words(
        f"{metrics['benchmark']}: accuracy in %, 95 % intervals over {metrics['clusters']:,} clusters",
        ("", "n", "chance", *(rule.replace("_", " ") for rule in rules), "unreadable", "own unreadable", "not answered")
        + (("to the mean of tasks", "p (Holm)") if gaps else ()),
        [
            (
                place or "overall",
                f"{entry['n']:,}",
                _percent(entry["chance"]),
                *(figure(entry[rule]) for rule in rules),
                *(_percent(entry[name]) for name in ("unreadable", "own_unreadable", "not_answered")),
                *(_gap(entry.get("gap")) if gaps else ()),
            )
            for place, entry in body
        ],
        [f"{metrics['left_out']:,} questions stand in no place of its own table"] if metrics["left_out"] else [],
    )


def _gap(gap: Mapping[str, Any] | None) -> tuple[str, str]:
    return ("", "") if gap is None else (figure(gap, signed=True), p_value(gap["p_holm"]))


def figure(found: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A figure with its interval: shares in per cent, others in their unit."""
    if found is None or found.get("value") is None:
        return NONE
    unit = found.get("unit", "")
    scale, most = (1, 2) if unit else (100, 1)
    scaled = {end: None if found.get(end) is None else found[end] * scale for end in ("value", "low", "high")}
    kept = decimals(scaled, most)
    value = f"{scaled['value']:+.{kept}f}" if signed else number(scaled["value"], kept)
    between = "" if scaled["low"] is None else f" [{number(scaled['low'], kept)}, {number(scaled['high'], kept)}]"
    return f"{value}{between}{f' {unit}' if unit else ''}"


def _kind(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"unit": entry["unit"]}


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _scaled(value: float, letters: str, first: float) -> str:
    """A count in millions, thousand millions, and so on: `3.75 B`."""
    step = 0
    while value >= first * 1000 and step < len(letters) - 1:
        first, step = first * 1000, step + 1
    return f"{value / first:.3g} {letters[step]}"


def markdown(found: Sequence[Words]) -> str:
    """Tables as Markdown."""
    parts = []
    for one in found:
        notes = [str(plain_markdown(note)) for note in one.notes]
        body = str(markdown_table([one.head, *one.rows]))
        parts.append("\n\n".join([f"## {plain_markdown(one.title)}", body, *notes]))
    return "\n\n".join(parts) + "\n"


def show(found: Sequence[Words]) -> None:
    """Print tables to the terminal; where it is none, as wide as they need."""
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 240)
    for one in found:
        table = Table(title=escape(one.title), title_justify="left", caption_justify="left")
        table.caption = "\n".join(map(escape, one.notes)) or None
        for place, name in enumerate(one.head):
            table.add_column(escape(name), justify="left" if place == 0 else "right")
        for row in one.rows:
            table.add_row(*map(escape, row))
        console.print(table)
