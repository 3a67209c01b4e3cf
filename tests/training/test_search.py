"""The ranked-list search: the naive one's lists for any chunks and families; files that resume, shard and refuse."""

import json
import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
np = pytest.importorskip("numpy")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from benchmarks.quality import search as benchmark  # noqa: E402
from pruneops.demo import model as embedded  # noqa: E402
from pruneops.demo import scenes  # noqa: E402
from pruneops.training import search as search_module  # noqa: E402
from pruneops.training.data import IGNORED, Example, decoder_inputs, encode  # noqa: E402
from pruneops.training.search import PADDING, load_lists, ranked_list, reference_ranked_list, search  # noqa: E402

from ..adapters import tiny  # noqa: E402

COUNT, SEARCHED, SHARD = 30, range(7), 3  # examples of the dataset; those searched, in three files


def example(number, kind=None):
    scene = scenes.scene("test", 0, number)
    asked = scenes.questions(scene.objects, np.random.default_rng(number))
    question = next(question for question in asked if kind in (None, question.kind))
    return Example(Image.fromarray(scene.pixels), question.text, question.answer)


class Examples:
    """A dataset; asks for an example of `broken` raise."""

    def __init__(self, count=COUNT, kind=None, broken=()):
        self.count, self.kind, self.broken, self.asked = count, kind, broken, []

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        self.asked.append(number)
        if number in self.broken:
            raise InterruptedError
        return example(number, self.kind)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return embedded.load()


@pytest.fixture(scope="module")
def processor():
    return embedded.processor()


@pytest.fixture
def start(model, processor, tmp_path):
    """`search` with small settings; into the same folder but for `folder`."""

    def start(dataset=None, folder=tmp_path / "lists", model=model, **changes):
        of = dict(ranks=1, rows=256, shard=SHARD, numbers=SEARCHED) | changes
        search(model, processor, dataset or Examples(), folder, **of)
        return folder

    return start


def tiny_inputs(family, pieces, answer=3):
    model, image = tiny.model_of(family)
    inputs = tiny.prompts(image, [pieces])
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = IGNORED
    return model, {**inputs, "labels": labels}


def compare(found, expected):
    assert found[0].dtype == torch.int64 and found[1].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


# Lists


@pytest.mark.parametrize("number, kind, ranks", [(3, "list", 3), (1, "count", 2), (0, "compare", 1), (1, "digit", 1)])
def test_same_lists_as_the_naive_search(model, processor, number, kind, ranks):
    batch = decoder_inputs(model, encode(processor, [example(number, kind)]))
    found = ranked_list(model, batch, ranks)
    assert found[0].shape == found[1].shape == (ranks,)
    compare(found, reference_ranked_list(model, batch, ranks))


@pytest.mark.parametrize(
    "family, pieces",
    [
        ("llava", [3, "image", 6]),
        ("llava", ["image", 6]),  # no prefix
        ("llava", [3, "image", 3]),  # a visual token predicts the answer's first
        ("internvl", [2, ("image", 1, 1), 3, "image", 5]),  # two images
        ("pixtral", [3, ("image", 3, 4), 6]),  # breaks between rows of tokens
        ("qwen2_5_vl", [3, "image", 6]),  # mRoPE
    ],
)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_whole_lists_of_tiny_models(family, pieces, rows):
    model, inputs = tiny_inputs(family, pieces)
    batch = decoder_inputs(model, inputs)
    count = int(batch.visual.sum())
    found = ranked_list(model, batch, count + 3, rows=rows)
    compare(found, reference_ranked_list(model, batch, count))
    assert found[0].sort().values.tolist() == list(range(count))
    with torch.no_grad():
        torch.testing.assert_close(found[1][-1], model(**inputs).loss, rtol=1e-5, atol=1e-5)  # of all tokens


def test_the_lowest_index_of_equal_losses():
    model, inputs = tiny_inputs("llava", [3, "image", 6])
    batch = decoder_inputs(model, inputs)
    same = torch.where(batch.visual, batch.positions[batch.visual].min(), batch.positions)
    embeds = torch.where(batch.visual[..., None], batch.embeds[batch.visual][0], batch.embeds)
    ranked, _ = ranked_list(model, batch._replace(embeds=embeds, positions=same), 1)
    assert ranked.tolist() == [0]


def test_bad_arguments_of_a_list():
    model, inputs = tiny_inputs("llava", [3, "image", 6])
    batch = decoder_inputs(model, inputs)
    with pytest.raises(ValueError, match="ranks: expected at least 1, got 0"):
        ranked_list(model, batch, 0)
    with pytest.raises(ValueError, match="rows: expected at least 1"):
        ranked_list(model, batch, 1, rows=0)
    for changes in (
        {"labels": batch.labels * 0 + IGNORED},
        {"visual": batch.visual & False},
        {"labels": batch.labels * 0},
    ):
        with pytest.raises(ValueError, match="expected visual tokens, and labels"):
            ranked_list(model, batch._replace(**changes), 1)
    with pytest.raises(ValueError, match="expected one example, got 2"):
        ranked_list(model, batch._replace(embeds=batch.embeds.repeat(2, 1, 1)), 1)
    with pytest.raises(ValueError, match="not finite"):
        ranked_list(model, batch._replace(embeds=batch.embeds * torch.nan), 1)
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        ranked_list(model.train(), batch, 1)


# Files


def test_files_hold_the_lists(model, processor, start):
    folder = start(Examples(kind="list"), ranks=2, numbers=[5, 1, 3, 6])
    assert sorted(os.listdir(folder)) == ["lists-00000.safetensors", "lists-00001.safetensors"]
    lists = load_lists(folder)
    assert lists.number.tolist() == [1, 3, 5, 6]
    batch = decoder_inputs(model, encode(processor, [example(3, "list")]))
    compare((lists.ranked[1], lists.loss[1]), ranked_list(model, batch, 2, rows=256))


def test_images_of_fewer_tokens_are_padded(start, monkeypatch):
    whole = search_module.ranked_list
    monkeypatch.setattr(search_module, "ranked_list", lambda *given, **rest: [x[:1] for x in whole(*given, **rest)])
    lists = load_lists(start(ranks=2, numbers=[0]))
    assert lists.ranked[0, 0] >= 0 and lists.ranked[0, 1] == PADDING
    assert lists.loss[0, 0].isfinite() and lists.loss[0, 1].isnan()


def test_an_interrupted_search_resumes(start, tmp_path):
    whole = start(folder=tmp_path / "whole")
    with pytest.raises(InterruptedError):
        start(Examples(broken=[4]))
    assert os.listdir(tmp_path / "lists") == ["lists-00000.safetensors"]
    with pytest.raises(ValueError, match="1 of 3 files are there"):
        load_lists(tmp_path / "lists")
    assert load_lists(tmp_path / "lists", partial=True).number.tolist() == [0, 1, 2]
    folder = start()
    for name in os.listdir(whole):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert len(os.listdir(folder)) == len(os.listdir(whole)) == 3


def test_a_finished_search_computes_nothing(start, monkeypatch):
    start()
    monkeypatch.delattr(search_module, "ranked_list")
    start()


def test_a_file_is_written_whole_or_not_at_all(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            start()
    with pytest.raises(ValueError, match=r"no lists-\*.safetensors"):
        load_lists(tmp_path / "lists")
    assert load_lists(start()).number.tolist() == list(SEARCHED)


def test_processes_share_the_files(start, tmp_path, monkeypatch):
    whole = load_lists(start(folder=tmp_path / "whole"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = [f"lists-0000{i}.safetensors" for i in range(3)]
    for rank, there in (("1", names[1:2]), ("0", names)):
        monkeypatch.setenv("RANK", rank)
        assert sorted(os.listdir(start())) == there
    for found, expected in zip(load_lists(tmp_path / "lists"), whole):
        assert torch.equal(found, expected)


def test_other_settings_are_refused(model, start):
    start()
    other = embedded.load()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    for changes, named in (
        ({"ranks": 2}, "ranks"),
        ({"shard": 4}, "shard"),
        ({"numbers": [0, 1, 2]}, "numbers"),
        ({"dataset": Examples(kind="list")}, "dataset"),
        ({"model": other}, "model"),
    ):
        with pytest.raises(ValueError, match=f"differs in .*{named}.*choose an empty folder"):
            start(**changes)


def test_broken_and_foreign_files_are_refused(start, tmp_path):
    path = start() / "lists-00001.safetensors"
    content = path.read_bytes()
    foreign = tmp_path / "foreign.safetensors"
    for settings in (None, {"settings": "5"}, {"settings": "{"}, {"settings": json.dumps({"schema": 0})}):
        save_file(load_file(path), foreign, settings)
        refused(start, path, foreign.read_bytes())
    for broken in (content[:-9], content[:40], b"", b"text"):
        refused(start, path, broken)


def refused(start, path, content):
    path.write_bytes(content)
    for call in (start, lambda: load_lists(path.parent)):
        with pytest.raises(ValueError, match=r"lists-00001.* no whole file of .*; delete it and search again"):
            call()


def test_numbers_outside_the_dataset_are_refused(start):
    for numbers in ([], [COUNT], [-1, 0]):
        with pytest.raises(ValueError, match=r"numbers: expected some of 0\.\.29"):
            start(numbers=numbers)


# Benchmark


def test_the_benchmark_measures_every_form(tmp_path, capsys):
    assert benchmark.main(f"--ranks 1 --questions 1 --rows 256 --out {tmp_path}".split()) == 0
    rows = json.loads((tmp_path / "quality-search.json").read_text())["rows"]
    assert [row["form"] for row in rows] == ["naive", "batched", "ours"]
    assert rows[0]["tokens"] == rows[1]["tokens"] > rows[2]["tokens"]
    assert all(len(row["seconds"]) == 1 for row in rows) and "vs naive" in capsys.readouterr().out
