"""The lmms-eval recipe with the harness's registry, task, evaluator, metrics and command, on the embedded model."""

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pruneops
from pruneops.demo import model as embedded
from pruneops.demo import scenes

pytest.importorskip("lmms_eval", reason="lmms_eval is not installed here: make test-lmms-eval")

from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model, get_model_manifest
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string
from PIL import Image

from benchmarks.quality import lmms as recipe
from benchmarks.quality.lmms_task import utils as task

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = 4
ALL = scenes.ROW**2  # visual tokens of a scene
MODEL = f"pretrained={embedded.WEIGHTS},dtype=float32,device=cpu"
KEPT = {  # by every layer
    "method=uniform,keep=0.5": [128] * 8,
    "method=random,keep=100": [100] * 8,
    "method=divprune,keep=64": [64] * 8,
    "method=fastervlm,keep=0.1": [26] * 8,
    "method=dart,keep=0.25": [ALL] * 2 + [64] * 6,
    "method=fastv,keep=0.25": [ALL] * 2 + [64] * 6,
    'method={"method": "fastv", "layer": 3, "rows": "last", "keep": 0.75},keep=0.25': [ALL] * 3 + [64] * 5,
    'method={"method": "vtw", "layer": 5}': [ALL] * 5 + [0] * 3,
    'method={"method": "todre", "depths": []},keep=0.25': [64] * 8,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is too small for several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the task and the harness's cache."""
    folder = tmp_path_factory.mktemp("lmms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        task.write(folder / "task", count=2)
        yield folder


@pytest.fixture(scope="module")
def evaluated(folder):
    """Results of the harness for arguments of the model."""

    def run(arguments, **settings):
        manager = TaskManager(include_path=str(folder / "task"), include_defaults=False, model_name=recipe.NAME)
        return evaluator.simple_evaluate(
            model=recipe.NAME, model_args=f"{MODEL},{arguments}", tasks=["pruneops_scenes"], task_manager=manager,
            limit=QUESTIONS, bootstrap_iters=0, process_docs_parallel=1, **settings,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def ours():
    """The model and its processor, without the harness."""
    return embedded.load(), embedded.processor()


def samples(results):
    return results["samples"]["pruneops_scenes"]


def answers(results):
    return [sample["filtered_resps"][0] for sample in samples(results)]


def answered(ours, method=None):
    """(answers to the same questions, visual tokens kept by every layer for each of them)."""
    model, processor = ours
    handle = None if method is None else pruneops.patch(model, method)
    texts = []
    for document in itertools.islice(task.rows(2), QUESTIONS):
        image = Image.open(io.BytesIO(document["image"]["bytes"]))
        inputs = processor(text=f"<image> {document['question']}", images=image, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=embedded.ANSWER, do_sample=False)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if handle is None:
        return texts, None
    handle.remove()
    return texts, [stats.totals for stats in handle.stats]


def request(content, settings, number=0):
    """A request of a made-up task with one document."""
    arguments = "", lambda document: [{"role": "user", "content": content}], settings, number, "none", "test"
    return Instance("generate_until", arguments, 0, {"task": "none", "doc_id": number, "repeats": 1})


def picture(number):
    return {"type": "image", "url": Image.fromarray(scenes.scene("test", 5, number).pixels)}


def question(text="how many digits ?"):
    return {"type": "text", "text": text}


def test_the_harness_finds_the_model_by_its_name():
    assert get_model(recipe.NAME) is recipe.PruneopsHF
    assert get_model_manifest(recipe.NAME).chat_class_path == "benchmarks.quality.lmms.PruneopsHF"


@pytest.mark.parametrize("arguments", KEPT)
def test_it_answers_as_the_patched_model_does(evaluated, ours, arguments):
    results = evaluated(arguments)
    settings = simple_parse_args_string(arguments)
    expected, totals = answered(ours, recipe.method_of(**settings))
    assert answers(results) == expected
    counts = [sample["token_counts"][0] for sample in samples(results)]
    assert [count["visual_tokens"] for count in counts] == [ALL] * QUESTIONS
    assert [count["visual_tokens_kept"] for count in counts] == totals == [KEPT[arguments]] * QUESTIONS
    assert results["throughput"]["avg_visual_tokens_kept"] == sum(KEPT[arguments]) / 8


def test_content_dependent_counts(evaluated, ours):
    results = evaluated("method=todre,keep=0.25")
    expected, totals = answered(ours, pruneops.methods.ToDRE(keep=0.25))
    assert answers(results) == expected
    assert [sample["token_counts"][0]["visual_tokens_kept"] for sample in samples(results)] == totals


def test_unpruned_and_with_everything_kept_it_answers_as_the_model_does(evaluated, ours):
    unpruned, everything = evaluated("method=none"), evaluated("method=uniform,keep=1.0")
    assert answers(unpruned) == answers(everything) == answered(ours)[0]
    assert samples(everything)[0]["token_counts"][0]["visual_tokens_kept"] == [ALL] * 8
    assert "visual_tokens" not in samples(unpruned)[0]["token_counts"][0]


def test_batches_change_nothing(evaluated):
    one, three = (evaluated("method=uniform,keep=0.5", batch_size=size) for size in (1, 3))
    assert answers(one) == answers(three)
    for left, right in zip(samples(one), samples(three)):
        assert left["token_counts"] == right["token_counts"]


def test_the_score_is_the_mean_of_the_answers(evaluated):
    results = evaluated("method=divprune,keep=0.5")
    right = [sample["target"] == answer for sample, answer in zip(samples(results), answers(results))]
    assert results["results"]["pruneops_scenes"]["exact_match,none"] == pytest.approx(sum(right) / QUESTIONS)


def test_requests_of_any_kind_keep_their_order_and_their_counts():
    model = recipe.PruneopsHF(embedded.WEIGHTS, "uniform", "0.25", "cpu", "float32", 2)
    model.task_dict = {"none": {"test": [None] * 5}}
    greedy, beams = {"max_new_tokens": 4}, {"max_new_tokens": 4, "num_beams": 2}
    contents = [
        ([picture(0), question()], greedy),
        ([question()], beams),
        ([picture(1), picture(2), question("list all digits")], greedy),
        ([picture(3), question()], beams),
    ]
    batched = model.generate_until([request(*content, number) for number, content in enumerate(contents)])
    single = [model.generate_until([request(*content)])[0] for content in contents]
    assert batched == single
    assert [answer.token_counts.visual_tokens for answer in batched] == [ALL, None, 2 * ALL, ALL]
    assert [answer.token_counts.visual_tokens_kept for answer in batched] == [[64] * 8, None, [128] * 8, [64] * 8]
    model.clean()
    assert not hasattr(model, "model") and model.handle is None


def test_the_settings_of_a_task_become_those_of_generate():
    greedy = recipe.generation({"until": ["\n\n"], "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16})
    assert greedy["max_new_tokens"] == 16 and not greedy["do_sample"] and greedy["temperature"] is None
    sampled = recipe.generation({"temperature": 0.7, "top_p": 0.9, "num_beams": 2})
    assert sampled == {
        "max_new_tokens": recipe.NEW_TOKENS, "num_beams": 2, "do_sample": True, "temperature": 0.7, "top_p": 0.9,
    }  # fmt: skip
    assert recipe.cut("yes\n\nbecause ASSISTANT: no", {"until": ["\n\n", "ASSISTANT:"]}) == "yes\n\nbecause "


def test_methods_are_named_as_the_operators_of_the_package_name_them(tmp_path):
    (tmp_path / "own.json").write_text(pruneops.methods.FastV(keep=0.5, layer=3).to_json())
    assert recipe.method_of("none") is None
    assert recipe.method_of("dart", "0.25") == recipe.method_of("dart", 0.25) == pruneops.methods.DART(keep=0.25)
    assert recipe.method_of("divprune", "64") == pruneops.methods.DivPrune(keep=64)
    assert recipe.method_of("vtw") == pruneops.methods.VTW()
    assert recipe.method_of(str(tmp_path / "own.json")) == pruneops.methods.FastV(keep=0.5, layer=3)
    assert recipe.method_of(str(tmp_path / "own.json"), 64) == pruneops.methods.FastV(keep=64, layer=3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "none", "keep": 0.5}, "keep=0.5 needs a method"),
        ({"method": "dart"}, "keep"),
        ({"method": "dart", "keep": "half"}, "keep must be .*got 'half'"),
        ({"method": "dart", "keep": 1.5}, "keep must be .*got 1.5"),
        ({"method": "darts", "keep": 0.5}, "method must be one of dart, .*got 'darts'"),
        ({"method": "vtw", "keep": 0.5}, "setting must be one of vtw's: layer, got 'keep'"),
        ({"method": "{dart"}, "method={dart must be none, a name, JSON"),
        ({"method": "dart", "keep": 0.5, "batch_size": "auto"}, "batch_size=auto must be an int"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        recipe.PruneopsHF(embedded.WEIGHTS, **arguments)


def test_tasks_that_do_not_generate_are_refused():
    model = recipe.PruneopsHF(embedded.WEIGHTS, device="cpu")
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until"):
            ask([])


def test_the_command_writes_results_and_samples(folder, tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.quality.lmms", "--model", recipe.NAME, "--include_path", folder / "task",
        "--tasks", "pruneops_scenes", "--model_args", f"{MODEL},method=dart,keep=0.25", "--limit", "2",
        "--output_path", tmp_path, "--log_samples",
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "|exact_match|" in run.stdout.replace(" ", "") and "Traceback" not in run.stderr, run.stdout + run.stderr
    (written,) = tmp_path.rglob("*_samples_pruneops_scenes.jsonl")
    for line in written.read_text().splitlines():
        assert json.loads(line)["token_counts"][0]["visual_tokens_kept"] == KEPT["method=dart,keep=0.25"]
    (written,) = tmp_path.rglob("*_results.json")
    assert json.loads(written.read_text())["throughput"]["avg_visual_tokens"] == ALL
