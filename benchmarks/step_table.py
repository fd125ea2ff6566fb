"""Insert the tables of step times into pages, from the results of benchmarks/step.py and benchmarks/levers.py.

    python -m benchmarks.step_table docs/performance.md

A table starts with `<!-- step_table: KIND RESULT.json -->` and ends with `<!-- end -->`. KIND is reference,
perturbations or levers; RESULT.json is relative to the root of the repository.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- step_table: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.S)


def main() -> None:
    for page in map(Path, sys.argv[1:]):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """Return a page with its tables regenerated."""

    def table(match: re.Match) -> str:
        result = json.loads((ROOT / match[3]).read_text(encoding="utf-8"))
        return f"{match[1]}\n{TABLES[match[2]](result)}\n\n{match[4]}"

    return MARKED.sub(table, text)


def reference_table(result: dict) -> str:
    """Compare every step with the reference of its method, and MLPMatch's with its floor."""
    rows = result["against_reference"]
    floors = {row["name"].removeprefix("floor "): row["ms"] for row in rows if row["name"].startswith("floor ")}
    lines = [
        "| step | precision | ms | images/s | peak memory, MiB | times as fast | times the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor = f"{row['ms'] / floors[row['name']]:.2f}" if row["name"] in floors else ""
        lines.append(
            f"| {row['name']} | {row['precision']} | {row['ms']:.0f} | {row['images_per_second']:.1f} | "
            f"{row['peak_mib']:.0f} | {row['ratio']:.2f} | {floor} |"
        )
    return "\n".join(lines)


def perturbations_table(result: dict) -> str:
    """Time and memory of every method, relative to supervised training."""
    rows = result["perturbations"]
    lines = ["| method | ms | time | peak memory, MiB | memory |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['ms']:.0f} | {1 / row['ratio']:.2f} | {row['peak_mib']:.0f} | "
            f"{row['peak_mib'] / rows[0]['peak_mib']:.2f} |"
        )
    return "\n".join(lines)


def levers_table(result: dict) -> str:
    """Compare each change to the step with the plain step."""
    lines = ["| change | predicted | measured | ms | peak memory, MiB |", "|---|---|---|---|---|"]
    for row in result["levers"]:
        lines.append(
            f"| {row['name']} | {row['predicted']:.2f} | {row['ratio']:.2f} | {row['ms']:.0f} | {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


TABLES = {"reference": reference_table, "perturbations": perturbations_table, "levers": levers_table}


if __name__ == "__main__":
    main()
