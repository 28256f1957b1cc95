"""The table of docs/reliability.md, and what is behind its numbers."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.outcome import BAD, OUTCOMES

__all__ = ["BEGIN", "END", "findings", "render", "write_table"]

BEGIN, END = "<!-- written by make faults -->", "<!-- end of what make faults wrote -->"


def render(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: one row a kind of file, door or command, and a last one of all."""
    groups: dict[str, Counter[str]] = {}
    for line in results:
        groups.setdefault(line["group"], Counter())[line["name"]] += 1
    rows = [*sorted(groups.items()), ("all", sum(groups.values(), Counter()))]
    lines = [
        f"| what | tried | {' | '.join(OUTCOMES)} |",
        "|---" + "|--:" * (len(OUTCOMES) + 1) + "|",
        *(f"| {name} | {n.total()} | {' | '.join(str(n[outcome]) for outcome in OUTCOMES)} |" for name, n in rows),
    ]
    return "\n".join(lines)


def write_table(results: Sequence[dict[str, Any]], report: Path | None) -> str:
    """Puts the table between the marks of a Markdown file, and returns it."""
    text = render(results)
    if report is not None:
        before, _, rest = report.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        report.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return text


def findings(results: Sequence[dict[str, Any]]) -> str:
    """What must not be, grouped by its cause: the message without paths and numbers."""
    causes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in results:
        if line["name"] in BAD:
            causes.setdefault((line["name"], _cause(line)), []).append(line)
    lines = []
    for outcome in BAD:
        of = {cause: cases for (name, cause), cases in causes.items() if name == outcome}
        if of:
            lines.append(f"\n## {outcome}: {sum(map(len, of.values()))}\n")
        for cases in sorted(of.values(), key=len, reverse=True):
            groups = Counter(case["group"] for case in cases)
            first = cases[0]
            where = ", ".join(f"{group} ({n})" for group, n in groups.most_common(6))
            lines.append(f"- {len(cases)}× {where}: `{first['line'][-300:]}` – {first['what']} (case {first['case']})")
    return "\n".join(lines) + "\n"


def _cause(line: dict[str, Any]) -> str:
    text = re.sub(r"'[^']*'|\S*/\S*|\d+|0x[0-9a-f]+", "…", line["line"])
    return text[:70] if line["name"] == "traceback" else f"{line['group']} {text[:40]}"
