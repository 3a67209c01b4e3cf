"""The one table of a run, as text or Markdown, and its JSON file."""

import json
import os
import re
import tempfile
from pathlib import Path

BUSY = 0.05  # background load that the table warns of


def rows(document):
    """Header and rows of cells: one row per implementation of every case."""
    pairs = entries(document)
    baselines = [name for name in document["baselines"] if any(name in _ratios(entry) for _, entry in pairs)]
    cuda = any(entry.get("extra_bytes") is not None for _, entry in pairs)
    hosts = any("host_s" in entry for _, entry in pairs)
    header = ["shape", "implementation", "time (20-80 %)", "result", "bytes", "operations", "roofline", "% of roofline"]
    header += ["extra memory"] * cuda + ["host, in a row"] * hosts + [f"vs {name}" for name in baselines]
    table = []
    for case, entry in pairs:
        row = [case["shape"], entry["name"]]
        if entry["status"] not in ("ok", "WRONG"):
            row += [f"{entry['status']}: {entry['reason']}"]
        else:
            timed = "median_s" in entry
            spread = f"{time(entry['median_s'])} ({time(entry['p20_s'])} - {time(entry['p80_s'])})" if timed else "-"
            row += [spread, entry["reason"], quantity(case["bytes"], "B"), quantity(case["operations"], "op")]
            row += [time(case["roofline_s"]), percent(entry["of_roofline"]) if timed else "-"]
            row += [quantity(entry["extra_bytes"] or 0, "B")] * cuda
            row += [time(entry["host_s"]) if "host_s" in entry else "-"] * hosts
            row += [speed(_ratios(entry).get(name)) for name in baselines]
        table.append(row)
    return header, table


def text(document):
    """Aligned columns; a reason that fills the rest of its row does not widen a column."""
    header, table = rows(document)
    full = [row for row in [header, *table] if len(row) == len(header)]
    widths = [max(len(row[i]) for row in full) for i in range(len(header))]
    widths[:2] = [max(len(row[i]) for row in [header, *table]) for i in range(2)]
    lines, last = [], None
    for row in [header, ["-" * width for width in widths], *table]:
        shown = ["" if row[0] == last else row[0], *row[1:]]
        last = row[0]
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(shown, widths)).rstrip())
        if len(row) < len(header):
            lines[-1] = "  ".join(cell.ljust(width) for cell, width in zip(shown[:2], widths)) + "  " + row[2]
    return "\n".join([*lines, *notes(document)])


def markdown(document):
    """The same table for a README."""
    header, table = rows(document)
    lines = [header, ["---"] * len(header), *(row + [""] * (len(header) - len(row)) for row in table)]
    return "\n".join(["| " + " | ".join(row) + " |" for row in lines] + ["", *(f"- {n}" for n in notes(document))])


def notes(document):
    """Notes under the table: machine, versions, peak rates, and what could not run."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    lines = [f"{document['device']}, {versions}, commit {commit(document)}, {document['date']}"]
    if (document["background_load"] or 0) > BUSY:
        lines.append(f"BUSY MACHINE: other processes took {percent(document['background_load'])} of the processors")
    if document["peak_rates"]:
        keys = ("read_bytes", "copy_bytes", "matmul_operations")
        read, copy, products = (document["peak_rates"][f"{key}_per_s"] for key in keys)
        rates = [f"reads {quantity(read, 'B/s')}", f"copies {quantity(copy, 'B/s')} (in and out)"]
        rates += [f"{dtype} products {quantity(rate, 'op/s')}" for dtype, rate in products.items()]
        lines.append("bytes: inputs read once, outputs written once; operations: the minimum of any implementation")
        lines.append(f"roofline: the longer of the two at the peak rates of this run: {', '.join(rates)}")
        lines.append(f"% of roofline: roofline / time; {_caches(document)}")
    if any("host_s" in entry for _, entry in entries(document)):
        lines.append("host, in a row: host time of one of many calls in a row, without turns")
    lines += [f"{name} not run: {reason}" for name, reason in document["unavailable"].items()]
    if not document["complete"]:
        lines.append("INCOMPLETE: the run was interrupted")
    return lines


def _caches(document):
    if "gpu" in document["machine"]:
        return "caches are cold before every call"
    size = document["machine"].get("cache_bytes")
    return f"caches are warm: inputs that fit them ({quantity(size, 'B') if size else 'unknown size'}) can exceed 100 %"


def commit(document):
    return (document["commit"] or "unknown")[:12] + (" with changes" if document["dirty"] else "")


def write(path, document):
    """Write JSON atomically, lists of numbers on one line."""
    content = json.dumps(document, indent=1) + "\n"
    write_text(path, re.sub(r"\[\n[-+.\deE,\s]*\]", lambda match: " ".join(match[0].split()), content))


def write_text(path, content):
    """Replace a file atomically."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def time(seconds):
    """Three digits and a unit."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:#.3g}".rstrip(".") + f" {unit}"


def quantity(value, unit):
    """Three digits with a decimal prefix."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)):
        if value >= scale or not prefix:
            return f"{value / scale:.3g} {prefix}{unit}"


def percent(share):
    """Two digits, more above 100 %."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def speed(ratio):
    """A ratio to a baseline, as a speed-up or a slow-down."""
    if not ratio:
        return "-"
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def entries(document):
    """(case, entry) of every implementation in every case."""
    return [(case, entry) for case in document["cases"] for entry in case["implementations"]]


def _ratios(entry):
    return entry.get("ratios", {})
