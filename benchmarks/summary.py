"""The summary of a run on a GPU, at most 60 lines: stages, operators with the host time of a call, cases."""

from . import report
from .registry import LOWER_BOUND
from .stages import BAD, TOOLS

MAX_LINES, MAX_TESTS, WIDTH = 60, 2, 200
SANITIZERS = ("small shapes", *TOOLS)


def host_limit(operator, case, backend):
    """Microseconds that one call may cost the host."""
    if operator == "attention_mass" and case.startswith("decode"):
        return 40
    if backend == "triton":
        return 60
    return 45 if operator == "kcenter" else 30


def lines(document, path):
    """Title, stages, operators and their cases, tests that failed, where the record is."""
    found = {stage["name"]: stage for stage in document["stages"]}
    title = f"{document['device']}, {document['date'][:10]}, commit {report.commit(document)}"
    head = [f"{title}, {document['seconds']:.0f} s", *_stages(document["stages"])]
    tail = _tests(document["stages"])
    if not document["complete"]:
        tail.append("INCOMPLETE: the run did not end")
    tail.append(f"record: {path} and {path.with_suffix('.md').name}")
    heads, cases = [], []
    for name, expected in document["expected"].items():
        record = document["operators"].get(name, {"cases": []})
        known = {case["name"]: case for case in record["cases"]}
        heads.append(_operator(name, record, found.get(f"benchmark {name}"), found.get(f"baselines {name}")))
        cases.append([_case(known[case]) if case in known else f"  {case}: not reached" for case in expected])
    room, total = MAX_LINES - len(head) - len(tail) - len(heads), sum(map(len, cases))
    if total > room:
        room = max(room - 1, 0)
        tail.insert(0, f"... and {total - room} more cases, in the record")
    body = []
    for line, rest in zip(heads, cases):
        body += [line, *rest[:room]]
        room -= len(rest[:room])
    return [_shortened(line) for line in [*head, *body, *tail]]


def _shortened(line):
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def _stage(stage):
    return f"{stage['name']}: {stage['status']}{', ' * bool(stage['message'])}{stage['message']} ({stage['seconds']} s)"


def _stages(stages):
    """One line per stage; the sanitizers share one."""
    others = [stage for stage in stages if not stage["name"].startswith(("benchmark ", "baselines "))]
    tools = [stage for stage in others if stage["name"] in SANITIZERS]
    found = [_stage(stage) for stage in others if stage not in tools]
    if len(tools) == len(SANITIZERS) and len({(stage["status"], stage["message"]) for stage in tools[1:]}) == 1:
        tools = [tools[0], tools[1] | {"name": "the four tools"}]
    return [*found, *([_sanitizers(tools)] if tools else [])]


def _sanitizers(tools):
    """All on one line; messages are shortened rather than left out."""
    heads = [f"{tool['name']} {tool['status']}" for tool in tools]
    room = (WIDTH - len("sanitize: ") - sum(len(head) + len(" ; ") for head in heads)) // len(tools)
    whole = "; ".join(f"{head} {tool['message']}" for head, tool in zip(heads, tools))
    if len(whole) <= WIDTH - len("sanitize: "):
        return f"sanitize: {whole}"
    return "sanitize: " + "; ".join(f"{head} {tool['message'][:room]}" for head, tool in zip(heads, tools))


def _tests(stages):
    bad = [name for stage in stages for name in stage.get("bad", [])]
    rest = [f"failed: {len(bad) - MAX_TESTS} more, in the record"] if len(bad) > MAX_TESTS else []
    return [f"failed: {name}" for name in bad[:MAX_TESTS]] + rest


def _operator(name, record, stage, baselines):
    """How its benchmark ended, and the longest host time of a backend's call, against its limit."""
    ended = _stage(stage) if stage else f"benchmark {name}: not reached"
    if baselines:
        ended += f"; baselines {baselines['status']} ({baselines['seconds']} s)"
    worst = {}  # backend -> (share of the limit, seconds, limit)
    for case, entry in report.entries(record):
        backend = entry["name"]
        if backend in ("triton", "cuda") and "host_s" in entry:
            limit = host_limit(name, case["name"], backend)
            over = 1e6 * entry["host_s"] / limit, entry["host_s"], limit
            worst[backend] = max(worst.get(backend, over), over)
    hosts = [
        f"{backend} {report.time(seconds)} (limit {limit} us {'met' if share <= 1 else 'MISSED'})"
        for backend, (share, seconds, limit) in worst.items()
    ]
    return f"{ended}{'; host at most: ' if hosts else ''}{', '.join(hosts)}"


def _case(case):
    """The fastest right backend beside the fastest right baseline, and what is not right."""
    entries = case["implementations"]
    wrong = [f"{e['name']} {e['status']}: {e['reason'][:70]}" for e in entries if e["status"] in BAD]
    unreached = sum(entry["kind"] == "backend" and entry["status"] == "skipped" for entry in entries)
    rest = wrong[:2] + [f"{len(wrong) - 2} more not right"] * (len(wrong) > 2)
    rest += [f"{unreached} backends skipped"] * bool(unreached)
    return "; ".join([f"  {case['name']}: {_fastest(entries)}", *rest])


def _fastest(entries):
    right = [e for e in entries if e["kind"] == "backend" and e["status"] == "ok" and "median_s" in e]
    if not right:
        return "no backend has a time"
    best = min(right, key=lambda entry: (entry["name"].startswith("reference"), entry["median_s"]))
    parts = [f"{best['name']} {report.time(best['median_s'])}", f"{report.percent(best['of_roofline'])} of roofline"]
    bounds = {entry["name"] for entry in entries if entry["reason"] == LOWER_BOUND}
    ratios = {name: ratio for name, ratio in best.get("ratios", {}).items() if name not in bounds}
    if ratios:
        baseline = min(ratios, key=ratios.get)
        parts.append(f"{report.speed(ratios[baseline])} than {baseline}")
    eager = next((entry for entry in entries if entry["name"] == best["name"].removesuffix(" graph")), best)
    if "host_s" in eager:
        parts.append(f"host {report.time(eager['host_s'])}")
    return ", ".join(parts)
