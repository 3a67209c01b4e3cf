"""`python -m benchmarks.quality.search`: seconds of DTR's ranked-list search on the embedded model, by its form.

Naive: a forward pass per candidate. Batched: `rows` candidates a pass, each with the whole prompt. Ours: those of a
pass share their prefix. All forms search each question in turn and must find lists of the same losses.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from pruneops.demo import model as embedded
from pruneops.training import search
from pruneops.training.data import decoder_inputs, encode

from .. import machine, report
from .__main__ import RESULTS, checksum
from .examples import Questions

NAIVE, BATCHED, OURS = "naive", "batched", "ours"


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.search", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="length of the lists")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--rows", default="32,64,128,256", help="comma-separated candidates of a pass")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for quality-search.json")
    options = parser.parse_args(argv)
    try:
        options.rows = [int(rows) for rows in options.rows.split(",")]
    except ValueError:
        parser.error(f"--rows {options.rows}: comma-separated numbers, such as 32,64")
    if min(options.ranks, options.questions, options.threads, *options.rows) < 1:
        parser.error("--ranks, --questions, --threads, --rows: 1 or more")
    if not options.out.is_dir():
        parser.error(f"--out {options.out}: no such folder")
    return options


@torch.no_grad()
def batched(model, batch, ranks, rows):
    """The search by passes of `rows` candidates that share nothing."""
    sample = search._Sample(model, batch)

    def losses(kept, candidates):
        whole = torch.cat([candidates[:, None], kept.expand(len(candidates), -1)], 1).sort(1).values
        return torch.cat([sample.loss(part, None) for part in whole.split(rows)])

    return search._greedy(sample, ranks, losses)


def measure(model, examples, ranks, rows, device):
    """A row for each form: form, rows; for each question seconds, seconds of the CPUs, tokens through the decoder.

    Parameters
    ----------
    model : PreTrainedModel
    examples : sequence of Example
    ranks : int
    rows : sequence of int
    device : str

    Returns
    -------
    list of dict
    """
    forms = [(NAIVE, 1, lambda batch: search.reference_ranked_list(model, batch, ranks))]
    for count in rows:
        forms.append((BATCHED, count, lambda batch, count=count: batched(model, batch, ranks, count)))
        forms.append((OURS, count, lambda batch, count=count: search.ranked_list(model, batch, ranks, rows=count)))
    results = [
        {"form": form, "rows": count, "seconds": [], "cpu_seconds": [], "tokens": []} for form, count, _ in forms
    ]
    computed = []
    processor = embedded.processor()
    batches = [decoder_inputs(model, encode(processor, [example])) for example in examples]
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, given: computed.append(given["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    for number, batch in enumerate([batches[0], *tqdm(batches, "search", disable=None)]):
        losses = []
        for result, (_, _, call) in zip(results, forms):
            computed.clear()
            start, busy = time.perf_counter(), time.process_time()
            losses.append(call(batch)[1])
            if device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first is a warm-up
                result["seconds"].append(round(time.perf_counter() - start, 4))
                result["cpu_seconds"].append(round(time.process_time() - busy, 4))
                result["tokens"].append(sum(computed))
        for other in losses:
            torch.testing.assert_close(other, losses[0], rtol=1e-4, atol=1e-6)
    hook.remove()
    return results


def text(results):
    """The table: medians over the questions, and of their ratios of CPU seconds to the naive form's."""
    lines = [f"{'form':10}{'rows':>6}{'seconds':>10}{'of CPUs':>10}{'tokens':>10}{'vs naive':>15}"]
    for row in results:
        ratio = statistics.median(a / b for a, b in zip(results[0]["cpu_seconds"], row["cpu_seconds"]))
        seconds, busy, tokens = (statistics.median(row[name]) for name in ("seconds", "cpu_seconds", "tokens"))
        speed = "-" if row is results[0] else report.speed(ratio)
        lines.append(f"{row['form']:10}{row['rows']:6}{seconds:10.3f}{busy:10.3f}{tokens:10.0f}{speed:>15}")
    return "\n".join(lines)


def main(argv=None):
    options = parse(argv)
    torch.set_num_threads(options.threads)
    load, model = machine.BackgroundLoad(), embedded.load(options.device)
    dataset = Questions(options.questions, split="test")
    examples = [dataset[number] for number in range(len(dataset))]
    try:
        results = measure(model, examples, options.ranks, options.rows, options.device)
    except KeyboardInterrupt:
        print("benchmarks.quality.search: interrupted", file=sys.stderr)
        return 130
    document = machine.facts(torch.device(options.device)) | {
        "weights": checksum(embedded.WEIGHTS), "ranks": options.ranks, "questions": options.questions,
        "others_share": load.share(), "rows": results,
    }  # fmt: skip
    report.write(options.out / "quality-search.json", document)
    print(text(results))
    print(f"{options.ranks} ranks of 256 visual tokens, {options.threads} threads, {document['others_share']} of the "
          f"processors taken by others; written: {options.out}/quality-search.json")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
