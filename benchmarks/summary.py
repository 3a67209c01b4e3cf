"""The last words of a run on a card, at most 60 lines: stages, operators with what a call costs the host, cases."""

from . import report

MOST_LINES, MOST_TESTS, WIDTH = 60, 3, 200
TOOLS = ("small shapes", "memcheck", "racecheck", "initcheck", "synccheck")


def host_bar(operator, case, backend):
    """Microseconds that one call may cost the host."""
    if operator == "attention_mass" and case.startswith("decode"):
        return 40
    if backend == "triton":
        return 60
    return 45 if operator == "kcenter" else 30


def title(document):
    commit = (document["commit"] or "unknown")[:12] + (" with changes" if document["dirty"] else "")
    return f"{document['device']}, {document['date'][:10]}, commit {commit}, {document.get('seconds', 0):.0f} s"


def lines(document, path):
    """Title, stages, operators and their cases, tests that failed, where the record is."""
    head = [title(document), *_stages(document["stages"])]
    tail = _tests(document["stages"])
    if not document["complete"]:
        tail.append("INCOMPLETE: the run did not end")
    tail.append(f"record: {path} and {path.with_suffix('.md').name}")
    ended = {stage["name"].removeprefix("benchmark "): stage for stage in document["stages"]}
    body = [_operator(name, known, ended.get(name)) for name, known in document["operators"].items()]
    body += [_stage(s) for s in document["stages"] if _operator_of(s) and _operator_of(s) not in document["operators"]]
    cases = [[_case(name, case) for case in known["cases"]] for name, known in document["operators"].items()]
    room, dropped = MOST_LINES - len(head) - len(tail) - len(body), 0
    if sum(map(len, cases)) > room:
        dropped = sum(map(len, cases)) - room + 1
        tail.insert(0, f"... and {dropped} more cases, in the record")
    shown = []
    for place, words in enumerate(body):
        own = cases[place] if place < len(cases) else []
        kept = own[: max(0, room - bool(dropped))]
        room -= len(kept)
        shown += [words, *kept]
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in [*head, *shown, *tail]]


def _operator_of(stage):
    name = stage["name"]
    return name.removeprefix("benchmark ") if name.startswith("benchmark ") else None


def _stage(stage):
    return f"{stage['name']}: {stage['status']}{', ' * bool(stage['words'])}{stage['words']} ({stage['seconds']} s)"


def _stages(stages):
    """One line a stage; the sanitizers' share one, for there are many."""
    others = [_stage(stage) for stage in stages if stage["name"] not in TOOLS and not _operator_of(stage)]
    tools = [stage for stage in stages if stage["name"] in TOOLS]
    if not tools:
        return others
    same = len({(stage["status"], stage["words"]) for stage in tools[1:]}) == 1
    if same and len(tools) == len(TOOLS):
        tools = [tools[0], tools[1] | {"name": "the four tools"}]
    return [*others, "sanitize: " + "; ".join(_stage(stage) for stage in tools)]


def _tests(stages):
    bad = [name for stage in stages for name in stage.get("bad", [])]
    words = [f"failed: {name}" for name in bad[:MOST_TESTS]]
    return words + ([f"failed: {len(bad) - MOST_TESTS} more, in the record"] if len(bad) > MOST_TESTS else [])


def _operator(name, known, stage):
    """How its benchmark ended, and the most that a call of a backend costs the host, against the bar."""
    ended = _stage(stage) if stage else f"benchmark {name}: running"
    worst = {}  # backend -> (over the bar, seconds, bar)
    for case in known["cases"]:
        for entry in case["contenders"]:
            backend = entry["name"].split(" ")[0]
            if entry["name"] == backend and backend in ("triton", "cuda") and "host_s" in entry:
                bar = host_bar(name, case["name"], backend)
                worst[backend] = max(worst.get(backend, (0, 0, 0)), (1e6 * entry["host_s"] / bar, entry["host_s"], bar))
    hosts = [
        f"{backend} {report.time(seconds)} (bar {bar} us {'met' if over <= 1 else 'MISSED'})"
        for backend, (over, seconds, bar) in worst.items()
    ]
    return f"{ended}{'; host at most: ' if hosts else ''}{', '.join(hosts)}"


def _case(operator, case):
    """The fastest right backend beside the fastest right peer, and what did not come out right."""
    entries = case["contenders"]
    right = [entry for entry in entries if entry["status"] == "ok" and "median_s" in entry]
    own = [entry for entry in right if entry["kind"] == "backend" and not entry["name"].startswith("reference")]
    own = own or [entry for entry in right if entry["kind"] == "backend"]
    words = [f"  {case['name']}:"]
    if own:
        best = min(own, key=lambda entry: entry["median_s"])
        words.append(f"{best['name']} {report.time(best['median_s'])}, {report.percent(best['of_floor'])} of floor")
        peers = {name: ratio for name, ratio in best.get("ratios", {}).items() if not _yardstick(entries, name)}
        if peers:
            peer = min(peers, key=peers.get)
            words.append(f", {report.speed(peers[peer])} than {peer}")
        eager = next((e for e in entries if e["name"] == best["name"].removesuffix(" graph")), best)
        if "host_s" in eager:
            words.append(f", host {report.time(eager['host_s'])}")
    else:
        words.append("no backend has a time")
    wrong = [entry for entry in entries if entry["status"] in ("WRONG", "failed", "crashed", "hung")]
    words += [f"; {entry['name']} {entry['status']}: {entry['reason'][:70]}" for entry in wrong[:2]]
    words += [f"; {len(wrong) - 2} more not right"] * (len(wrong) > 2)
    unreached = sum(entry["kind"] == "backend" and entry["status"] == "skipped" for entry in entries)
    words += [f"; {unreached} backends skipped"] * bool(unreached)
    return " ".join(words).replace(" ,", ",").replace(" ;", ";")


def _yardstick(entries, name):
    """A peer that does less than the operator: its result is not checked."""
    return any(entry["name"] == name and entry["reason"] == "a yardstick" for entry in entries)
