"""The embedded model, its scenes, short trainings; accuracy of pruned answers within the recorded intervals."""

import csv
import dataclasses
import itertools
import json
import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
np = pytest.importorskip("numpy")

from benchmarks.quality import __main__ as command  # noqa: E402
from benchmarks.quality import cost, examples, learned  # noqa: E402
from benchmarks.quality import run as quality  # noqa: E402
from benchmarks.quality import train as training  # noqa: E402
from pruneops import networks  # noqa: E402
from pruneops.demo import model as embedded  # noqa: E402
from pruneops.demo import scenes  # noqa: E402

RECORD = json.loads((command.RESULTS / "quality.json").read_text())
TINY = {"tower": 3, "questions": 3}


@pytest.fixture(scope="module")
def model():
    return embedded.load()


# Scenes


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_a_scene_is_a_function_of_its_numbers(split):
    one, again, *others = (scenes.scene(split, *numbers) for numbers in [(3, 5), (3, 5), (4, 5), (3, 6)])
    assert (one.pixels == again.pixels).all() and one.objects == again.objects
    assert all((one.pixels != other.pixels).any() for other in others)
    assert one.pixels.shape == (scenes.SIDE, scenes.SIDE, 3) and one.pixels.dtype == np.uint8


def test_training_and_test_share_no_digit_and_no_photograph():
    assert not set(scenes.SPLITS["train"]) & set(scenes.SPLITS["test"])
    drawn = {split: {glyph.tobytes() for glyph in scenes._digits(split)[1][:, 0]} for split in scenes.SPLITS}
    assert drawn["train"] and drawn["test"] and not drawn["train"] & drawn["test"]
    assert sum(map(len, drawn.values())) > 1750  # of 1797, some of which look alike


@pytest.mark.parametrize("crowd", [False, True])
def test_objects_lie_where_the_scene_says(crowd):
    counts = set()
    for number in range(60):
        scene = scenes.scene("test", 0, number, crowd)
        counts.add(len(scene.objects))
        for i, o in enumerate(scene.objects):
            rows, columns = np.nonzero(scene.owner == i)
            assert len(rows) >= 1
            for token, edge in ((rows, o.top), (columns, o.left)):
                assert (token * 8 + 8 > edge).all() and (token * 8 < edge + o.size).all()
            inside = scene.pixels[o.top : o.top + o.size, o.left : o.left + o.size].reshape(-1, 3).astype(int)
            off = abs(inside - scenes.COLOURS[o.colour]).max(1)
            assert (off < 60).sum() > 10, "its colour is seen"
        for a, b in itertools.combinations(scene.objects, 2):
            apart = (a.left + a.size - b.left, b.left + b.size - a.left, a.top + a.size - b.top, b.top + b.size - a.top)
            assert min(apart) <= 2 * scenes.OFF + scenes.SIZES[1] - 8 * scenes.CELL  # cells do not overlap
        if not crowd:
            assert len({o.digit for o in scene.objects}) == len({o.colour for o in scene.objects}) == len(scene.objects)
    assert counts == {2, 3, 4, 5} if not crowd else max(counts) > 10


def test_questions_have_their_answers():
    for number in range(40):
        objects = scenes.scene("test", 1, number).objects
        by_colour, by_digit = {o.colour: o.digit for o in objects}, {str(o.digit): o.colour for o in objects}
        asked = scenes.questions(objects, np.random.default_rng(number))
        assert {question.kind for question in asked} == set(scenes.KINDS)
        for kind, text, answer in asked:
            words = text.split()
            if kind == "digit":
                assert answer == str(by_colour[words[3]])
            elif kind == "colour":
                assert answer == by_digit[words[4]]
            elif kind == "list":
                assert answer.split() == sorted(by_digit)
            elif kind == "count":
                assert answer == str(len(by_digit))
            else:
                pair = words[4], words[6]
                assert answer == max(pair, key=by_colour.get) and pair[0] != pair[1]


# The model


def test_every_word_is_known():
    for number in range(100):
        for _, text, answer in scenes.questions(scenes.scene("test", 2, number).objects, np.random.default_rng(0)):
            assert embedded.words(embedded.tokens(text)) == text
            assert len(embedded.tokens(answer)) < embedded.ANSWER
    assert embedded.tokens("Which is larger, red or blue?") == embedded.tokens("which is larger , red or blue ?")
    assert embedded.words([*embedded.tokens("1 2"), embedded.EOS, 7]) == "1 2"
    with pytest.raises(KeyError):
        embedded.tokens("which dog is red ?")


def test_weights_are_small_and_as_transformers_saves_them(model):
    assert sum(file.stat().st_size for file in embedded.WEIGHTS.iterdir()) < 8e6
    processor = pytest.importorskip("transformers").AutoProcessor.from_pretrained(embedded.WEIGHTS)
    from PIL import Image

    scene = scenes.scene("test", 0, 0)
    mine = embedded.inputs(torch.from_numpy(scene.pixels)[None], ["which digit is red ?"])
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is red?"}]}]
    text = processor.apply_chat_template(talk)
    theirs = processor(images=[Image.fromarray(scene.pixels)], text=[text], return_tensors="pt")
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor)
    config, shipped = embedded.configuration(), model.config
    for part in ("vision_config", "text_config"):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            assert getattr(getattr(config, part), name) == getattr(getattr(shipped, part), name)
    assert shipped.text_config.num_key_value_heads < shipped.text_config.num_attention_heads  # GQA
    assert shipped.text_config.num_hidden_layers >= 8


def test_packed_questions_are_those_that_are_asked(model):
    """The packed sequence of all questions of a scene gives each the logits of a separate request."""
    for number in range(4):
        scene = scenes.scene("test", 3, number)
        text = training.packed(scene, np.random.default_rng(number))[None]
        pixels = torch.from_numpy(scene.pixels)[None]
        with torch.inference_mode():
            features = model.model.get_image_features(embedded.normalised(pixels), return_dict=True).pooler_output
            keep = torch.arange(training.TOKENS)[None]
            logits, labels, there = training.answered(model, torch.stack(list(features)), keep, text)
        question = text[0, 2][there[0]]
        assert len(question.unique()) >= 8
        for each in question.unique():
            ids, answer = text[0, 0][text[0, 2] == each], labels[question == each]
            asked = embedded.words(ids[: len(ids) - len(answer) + 1].tolist())
            given = embedded.inputs(pixels, [asked])
            prompt = torch.cat([given["input_ids"], answer[None, :-1]], 1)
            with torch.inference_mode():
                alone = model(input_ids=prompt, pixel_values=given["pixel_values"]).logits[0, -len(answer) :]
            torch.testing.assert_close(alone, logits[question == each], rtol=1e-3, atol=1e-3)


# Short trainings


def test_heads_start_at_the_neighbours():
    from transformers import CLIPVisionModel

    torch.manual_seed(0)
    config = embedded.configuration().vision_config
    config._attn_implementation = "eager"
    tower = CLIPVisionModel(config)
    training.attend_to_neighbours(tower)
    with torch.inference_mode():
        attention = tower(torch.zeros(1, 3, scenes.SIDE, scenes.SIDE), output_attentions=True).attentions
    inner = [row * scenes.ROW + column for row in range(3, 13) for column in range(3, 13)]
    for layer, offsets in ((0, [(0, 1), (0, -1), (1, 0), (-1, 0)]), (1, [(1, 1), (1, -1), (-1, 1), (-1, -1)])):
        for head, (down, right) in enumerate(offsets):
            most = attention[layer][0, head, 1:, 1:].argmax(-1)
            assert [int(most[token]) - token for token in inner] == [down * scenes.ROW + right] * len(inner)


def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    full, _ = training.train(tmp_path / "full", steps=TINY, workers=0)
    assert (tmp_path / "full" / "loss.png").stat().st_size > 1000
    gradients, steps = training.gradients, itertools.count()

    def interrupted(*arguments):
        if next(steps) == 4:
            raise KeyboardInterrupt
        gradients(*arguments)

    monkeypatch.setattr(training, "gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(tmp_path / "parts", steps=TINY, workers=0)
    assert "goes on from" in capsys.readouterr().out
    monkeypatch.setattr(training, "gradients", gradients)
    parts, seconds = training.train(tmp_path / "parts", steps=TINY, workers=0)
    assert (full / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert seconds > 0 and embedded.load(path=parts).dtype == torch.float32
    with pytest.raises(SystemExit, match="--seed 0"):
        training.train(tmp_path / "parts", steps=TINY, seed=1, workers=0)


def test_losses_fall_on_few_scenes(tmp_path):
    run = training.Run(tmp_path, {"tower": 60, "questions": 60}, 0, "cpu", 0)
    data = [torch.stack(column) for column in zip(*(training.Scenes(0, 0, 4, False)[i] for i in range(4)))]
    for stage, step in (("tower", run.tower_loss), ("questions", run.questions_loss)):
        losses = []
        for i in range(40):
            training.rate(run.optimizers[stage], i, 60)
            losses.append(step(*data)[0])
            training.gradients(run.optimizers[stage], losses[-1])
            for optimizer in run.optimizers[stage]:
                optimizer.step()
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), stage


# The learned methods


def test_examples_are_of_every_kind_and_split():
    train, test = examples.Questions(10), examples.Questions(10, split="test")
    assert [train[i] for i in (3, 7)] == [train[i] for i in (3, 7)] and len(train) == 10
    assert train[0].image.tobytes() != test[0].image.tobytes()
    kinds = "which digit", "what colour", "list all", "which is larger", "how many"
    assert all(train[i].question.startswith(kinds[i % 5]) for i in range(10))


@pytest.mark.parametrize("method", learned.RECIPES)
def test_a_recipe_trains(method, tmp_path, monkeypatch, capsys):
    config, _ = learned.RECIPES[method]
    short = dataclasses.replace(config, steps=2, batch=2, held_out=2)
    monkeypatch.setitem(learned.RECIPES, method, learned.Recipe(short, 4))
    if method == "dtr":
        monkeypatch.setitem(learned.RECIPES, method, learned.Recipe(dataclasses.replace(short, ranks=1), 4))
    assert command.main(["train", "--method", method, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / method / "training.json").read_text())
    assert record["commit"] and record["settings"]["steps"] == 2 and "parameters" in capsys.readouterr().out
    assert (tmp_path / method / "weights.safetensors").is_file()


def test_shipped_weights_are_those_of_the_records():
    assert sum(file.stat().st_size for file in embedded.LEARNED.iterdir()) < 4e6
    for method, recipe in learned.RECIPES.items():
        record = json.loads((command.RESULTS / f"quality-{method}-training.json").read_text())
        network = networks.load(networks.NETWORKS[method], embedded.LEARNED / f"{method}.safetensors")
        assert network.config == record["config"]
        assert record["settings"] == json.loads(json.dumps(dataclasses.asdict(recipe.config)))
        assert record["seconds"] < 30 * 60


# The benchmark


def test_intervals():
    flags = np.array([[True] * 8 + [False] * 2])
    assert quality.wilson(flags) == [0.8, 0.4902, 0.9433]  # as tables of Wilson's interval have it
    assert quality.around(np.array([0.0, 1.0, 1.0, 1.0]))[:2] == [0.75, 0.26]
    rows = quality.summary(np.ones((2, 3, len(scenes.KINDS)), bool))
    assert [row["kind"] for row in rows] == [*scenes.KINDS, "all"]
    assert rows[0]["accuracy"] == 1 and rows[0]["asked"] == 6 and rows[-1]["asked"] == 30


def test_one_question_of_every_kind_per_scene():
    seen, asked = quality.questions_of(5, 6)
    again = quality.questions_of(5, 6)[1]
    assert asked == again and len(seen) == 6
    assert [question.kind for _, question in asked] == [*scenes.KINDS] * 6


def test_foreground_keeps_digits_first():
    owner = np.full((16, 16), -1)
    owner[:3, :3], owner[8:10, 8:10] = 0, 1
    for keep, first in ((0.02, 5), (0.05, 13), (0.1, 13)):
        (kept,) = quality.Foreground(keep=keep, owners=(owner,)).select_each([None])
        assert len(kept) == max(1, round(keep * 256)) and (kept.diff() > 0).all()
        owners = owner.ravel()[kept.numpy()]
        assert (owners >= 0).sum() == first
        if keep == 0.02:
            assert sorted(owners) == [0, 0, 0, 1, 1]  # in turn


def test_searched_lists_answer(model, monkeypatch):
    """DTR's upper bound: two tokens that the search finds answer what two tokens at random do not."""
    monkeypatch.setattr(quality, "model", model, raising=False)
    seen, asked = quality.questions_of(3, 2)
    asked = [each for each in asked if each[1].kind in ("digit", "colour")]
    lists = quality.searched(seen, asked, 2)
    assert [len(ranked) for ranked in lists] == [2] * 4
    flags, tokens = quality.right(model, seen, asked, lambda *_: quality.Searched(keep=2, lists=lists))
    assert all(flags) and tokens == 2
    flags, _ = quality.right(model, seen, asked, lambda *_: quality.methods.Random(keep=2, seed=1))
    assert not all(flags)


def test_the_cost_of_selection(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "SCENES", 1)
    assert command.main(["cost", "--out", str(tmp_path), "--device", "cpu"]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "quality-cost.json").read_text())["rows"]}
    assert rows["dtr"]["parameters"] > 100_000 and rows["todre"]["parameters"] == 0
    assert all(0 < row["selection_ms"] < row["prefill_ms"] for name, row in rows.items() if name != "vtw")
    assert "unpruned prefill" in capsys.readouterr().out


def test_a_small_run_writes_everything(tmp_path, capsys):
    arguments = [
        "run",
        "--methods",
        "uniform,vtw,foreground,dtr_ub",
        "--keep",
        "0.25,1",
        "--scenes",
        "2",
        "--device",
        "cpu",
    ]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "quality.json").read_text())
    rows = list(csv.DictReader((tmp_path / "quality.csv").read_text().splitlines()))
    assert len(rows) == len(record["rows"]) == (1 + 3 * 2 + 1) * 6
    assert record["commit"] and record["versions"]["torch"] == torch.__version__
    tokens = {(row["method"], row["keep"]): row["tokens"] for row in record["rows"]}
    assert tokens["uniform", 1] == tokens["dtr_ub", 1] == 1 and ("dtr_ub", 0.25) not in tokens
    assert tokens["uniform", 0.25] == 64 and tokens["vtw", 0.25] == 64 and tokens["unpruned", 1.0] == 256
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert "right answers, compare" in out and "foreground" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--methods", "magic"], "'magic'; there is: todre"),
        (["run", "--keep", "half"], "shares and counts, such as"),
        (["run", "--keep", "1.5"], "(0, 1]"),
        (["run", "--keep", "0"], "counts begin at 1"),
        (["train", "--method", "magic"], "'magic'"),
        (["run", "--out", "nowhere/at/all"], "no such folder"),
    ],
)
def test_bad_requests(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_interruption_is_one_line(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "measure", interrupted)
    assert command.main(["run", "--out", str(tmp_path), "--device", "cpu"]) == 130
    assert capsys.readouterr().err.strip() == "benchmarks.quality: interrupted" and not os.listdir(tmp_path)


# The record


def test_the_record_is_of_these_weights_and_reaches_the_bars():
    training = json.loads((command.RESULTS / "quality-training.json").read_text())
    by_kind = {row["kind"]: row for row in training["rows"]}
    for kind, bar in command.BARS.items():
        assert by_kind[kind]["asked"] >= 2000 and by_kind[kind]["accuracy"] >= bar
    assert RECORD["weights"] == command.checksum(embedded.WEIGHTS)


@pytest.mark.parametrize("name", [quality.UNPRUNED, *(name for name in quality.METHODS if name != quality.SEARCHED)])
def test_answers_at_a_quarter_of_the_tokens(name):
    """On 200 scenes of the record: the same answers up to rounding, so within the interval of each hundred."""
    seeds, count = RECORD["seeds"][:2], RECORD["scenes"]
    assert len(seeds) * count >= 200
    keep = 1.0 if name == quality.UNPRUNED else 0.25
    rows = [row for row in RECORD["rows"] if (row["method"], row["keep"]) == (name, keep)]
    assert [row["kind"] for row in rows] == [*scenes.KINDS, "all"]
    quality.start(embedded.WEIGHTS, "cpu")
    for i, seed in enumerate(seeds):
        flags, _ = quality.answer((name, keep, seed, count))
        for row, measured in zip(rows, quality.summary(np.array(flags).reshape(1, count, -1))):
            _, low, high = row["by_seed"][i]
            assert low <= measured["accuracy"] <= high, (row, measured)
