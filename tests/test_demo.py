"""The demo: questions, answers, kept tokens, counts; the picture; errors."""

import io
import json
import subprocess
import sys

import pytest
import torch

from pruneops import cli, methods

pytest.importorskip("transformers")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
for extra in ("matplotlib", "skimage", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(extra)

from pruneops import plots  # noqa: E402
from pruneops.demo import DemoError, model, photo, scenes  # noqa: E402
from pruneops.demo import run as demo  # noqa: E402

TOKENS, LAYERS = 256, 8
QUESTION = "how many digits ?"
NAMES = ("dart", "divprune", "dtr", "dyrate", "fastervlm", "fastv", "random", "selector", "todre", "uniform", "vtw")
FIRST = {"dart": 2, "dyrate": 2, "fastv": 2, "vtw": 3}  # layer before which tokens first go; 0 after the projector


@pytest.fixture(scope="module")
def llava():
    return demo._load(torch.device("cpu"))


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))


@pytest.fixture
def folder(monkeypatch, llava, picture, tmp_path):
    """A folder with picture.png in it; the model is there already."""
    monkeypatch.setattr(model, "load", lambda device: llava.to(device))
    monkeypatch.chdir(tmp_path)
    picture.save("picture.png")
    return tmp_path


def command(capsys, *argv):
    status = cli.main(["demo", "--device", "cpu", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def measured(**options):
    return demo.run(**{"question": QUESTION, "device": "cpu", "runs": 1} | options)


def timeless(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def prompt_tokens(question):
    return 1 + TOKENS + len(question.split())


def kv_bytes(llava, counts, question):
    """Of keys and values, float32, by the shapes in the configuration."""
    config = llava.config.text_config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return sum(2 * 4 * width * (prompt_tokens(question) - TOKENS + count) for count in counts)


def test_whole_run(folder, capsys, llava):
    status, out, err = command(capsys, "--save", "record.json", "--out", "shown.png")
    assert (status, err) == (0, "")
    record = json.loads((folder / "record.json").read_text())
    scene = scenes.scene("test", 0, 0)
    truths = {asked.text: asked for asked in scenes.questions(scene.objects, np.random.default_rng(0), pairs=100)}
    assert record["image"]["objects"] == [{"digit": o.digit, "colour": o.colour} for o in scene.objects]
    assert [asked["kind"] for asked in record["questions"]] == list(scenes.KINDS)
    for asked in record["questions"]:
        assert (asked["kind"], asked["question"], asked["truth"]) == truths[asked["question"]]
        pixels = torch.tensor(scene.pixels)[None]
        assert asked["unpruned"]["answer"] == model.ask(llava, pixels, [asked["question"]])[0]
        for way in ("unpruned", "pruned"):
            assert asked[way]["right"] == (asked[way]["answer"] == asked["truth"])
            assert asked[way]["kv_bytes"] == kv_bytes(llava, asked[way]["visual_tokens"], asked["question"])
            assert asked["question"] in out and asked["truth"] in out
        assert asked["unpruned"]["visual_tokens"] == [TOKENS] * LAYERS
    assert len(record["kept"]["tokens"]) == 26 and "26 of 256" in out and "shown.png" in out
    seconds = record["seconds"]
    assert seconds["unpruned"].pop("selection") is None
    assert min([*seconds["unpruned"].values(), *seconds["pruned"].values(), seconds["model"]]) > 0
    assert "python -m benchmarks end_to_end" in out
    with Image.open("shown.png") as drawn:
        drawn.load()
        assert drawn.size == (1200, 575)
    assert sorted(path.name for path in folder.iterdir()) == ["picture.png", "record.json", "shown.png"]


@pytest.mark.parametrize("name", NAMES)
def test_each_method(folder, llava, name):
    record = measured(method=name, keep=None if name == "vtw" else 0.25)
    (asked,) = record["questions"]
    counts, first = asked["pruned"]["visual_tokens"], FIRST.get(name, 0)
    left = {"vtw": 0, "dyrate": counts[first]}.get(name, 64)  # DyRate keeps a quarter on average
    assert left < TOKENS // 2
    assert counts[:first] == [TOKENS] * first and counts[first] == left
    assert counts == sorted(counts, reverse=True) and set(counts[first:]) <= {left, 0}
    assert asked["pruned"]["kv_bytes"] == kv_bytes(llava, counts, QUESTION)
    held = TOKENS
    for layer, count in enumerate(counts):  # the recorded tokens agree with the counts, layer by layer
        held = next((len(kept["tokens"]) for kept in asked["pruned"]["kept"] if kept["from_layer"] == layer), held)
        assert held == count
    kept = asked["pruned"]["kept"][0]
    assert (kept["from_layer"], kept["tokens"]) == (first, sorted(set(kept["tokens"])))
    assert record["kept"] == kept | {"questions": 1}
    assert record["method"]["method"] == name and f"{left} of 256" in demo.report(record)


def test_methods_are_all_there_are():
    classes = [cls for cls in vars(methods).values() if isinstance(cls, type) and issubclass(cls, methods.Method)]
    assert set(NAMES) == {cls.name for cls in classes if hasattr(cls, "name")}


def test_kept_tokens_are_the_choice_of_the_method(folder, llava):
    assert measured(method="uniform", keep=26)["kept"]["tokens"] == methods.uniform_select(TOKENS, 26).tolist()
    drawn = measured(method="random", keep=0.5, seed=7)["kept"]["tokens"]
    assert drawn == methods.random_select(TOKENS, 128, seed=7).tolist()
    scene = torch.tensor(scenes.scene("test", 3, 0).pixels)[None]
    with torch.inference_mode():
        seen = llava.model.vision_tower(model.normalised(scene), output_hidden_states=True).hidden_states[-2][:, 1:]
        features = llava.model.multi_modal_projector(seen)[0]
    assert (
        measured(method="divprune", keep=9, seed=3)["kept"]["tokens"] == methods.divprune_select(features, 9).tolist()
    )


def test_successive_choices_are_recorded_as_ranks_of_the_picture():
    class Twice:
        def select_each(self, images):
            return [torch.tensor([1, 4, 5, 9])]

        def at_layer(self, layer, row, count):
            return {1: None, 2: torch.tensor([0, 1, 3]), 3: torch.tensor([0, 1, 2]), 4: torch.tensor([2])}[layer]

    recorder = demo.KeptRecorder(Twice())
    recorder.select_each([methods.Image(torch.zeros(10, 2))])
    for layer in (1, 2, 3, 4):
        recorder.at_layer(layer, None, 8)
    assert {layer: ranks.tolist() for layer, ranks in recorder.kept.items()} == {0: [1, 4, 5, 9], 2: [1, 4, 9], 4: [9]}


@pytest.mark.parametrize("keep, kept", [(1, 1), (26, 26), (256, 256), (1.0, 256), (1e-9, 1)])
def test_budgets(folder, keep, kept):
    record = measured(method="divprune", keep=keep)
    assert len(record["kept"]["tokens"]) == kept
    assert record["questions"][0]["pruned"]["visual_tokens"] == [kept] * LAYERS
    if kept == TOKENS:
        (asked,) = record["questions"]
        assert asked["pruned"]["answer"] == asked["unpruned"]["answer"] and asked["pruned"]["kept"] == []


def test_questions_in_any_spelling():
    objects = scenes.scene("test", 0, 0).objects
    a, b = objects[:2]
    larger = max(a, b, key=lambda o: o.digit)
    for text, truth in [
        (f"Which digit is {a.colour.upper()}?", str(a.digit)),
        (f"what   colour is the {a.digit} ?", a.colour),
        (f"Which is larger, {a.colour} or {b.colour}?", larger.colour),
        (f"which is larger , {b.colour} or {a.colour} ?", larger.colour),
        ("List all digits.", " ".join(map(str, sorted(o.digit for o in objects)))),
        ("what digits", None),
    ]:
        (asked,) = demo._scene(demo._normalised_question(text), 0).questions
        assert asked.answer == truth and asked.text == model.words(model.tokens(text.replace(".", "")))


def test_a_question_with_an_unknown_answer(folder):
    (asked,) = measured(question="what digits")["questions"]
    assert asked["truth"] is asked["kind"] is asked["unpruned"]["right"] is asked["pruned"]["right"] is None


def test_photograph(folder, capsys):
    status, out, err = command(capsys, "--image", "picture.png", "--json")
    record = json.loads(out)
    assert (status, err) == (0, "") and record["picture"] == "pruneops-demo.png"
    assert record["image"] == {"path": "picture.png", "seed": None, "width": 120, "height": 80, "objects": None}
    assert [asked["question"] for asked in record["questions"]] == ["list all digits", QUESTION]
    assert all(asked["truth"] is asked["pruned"]["right"] is None for asked in record["questions"])
    assert "squeezed" in demo.report(record) and "coloured digits only" in demo.report(record)


def test_a_photograph_of_a_scene_is_answered_like_the_scene(folder):
    Image.fromarray(scenes.scene("test", 5, 0).pixels).save("scene.png")
    ours, theirs = (measured(**options)["questions"][0] for options in ({"seed": 5}, {"image": "scene.png"}))
    for way in ("unpruned", "pruned"):
        assert ours[way] | {"right": None} == theirs[way]


def test_squeezed():
    wide = photo.squeezed(Image.new("RGB", (300, 10), "red"), 128)
    assert wide.shape == (128, 128, 3) and (wide == (255, 0, 0)).all()


def test_seed_decides_everything(folder):
    records, drawings = [], []
    for seed in (3, 3, 4):
        records.append(timeless(measured(method="random", question=None, seed=seed)))
        drawings.append((folder / "pruneops-demo.png").read_bytes())
    assert records[0] == records[1] and drawings[0] == drawings[1]
    for key in ("image", "questions", "kept"):
        assert records[0][key] != records[2][key]
    assert drawings[0] != drawings[2]


def test_report_marks_right_and_wrong(folder):
    record = measured(question=None)
    for asked in record["questions"]:
        asked["unpruned"] |= {"answer": asked["truth"], "right": True}
        asked["pruned"] |= {"answer": "", "right": False}
    record["questions"][0]["pruned"] |= {"answer": "4", "right": True}
    out = demo.report(record)
    assert out.count(" right  ") == 5 and out.count("(nothing) WRONG") == 4 and "5 of 5" in out and "1 of 5" in out


def test_counts_that_depend_on_the_question(folder):
    record = measured(question=None)
    for asked in record["questions"]:
        asked["pruned"]["visual_tokens"] = [26] * LAYERS
    record["questions"][1]["pruned"]["visual_tokens"] = [26] * 4 + [0] * 4
    assert demo.report(record).count("0-26") == 4
    plots.answers(scenes.scene("test", 0, 0).pixels, record)


def test_an_answer_of_one_token_has_no_decoding_to_time(folder, monkeypatch):
    monkeypatch.setattr(model, "ANSWER", 1)
    record = measured()
    assert [record["seconds"][way]["decode, per token"] for way in ("unpruned", "pruned")] == [None, None]
    assert "decode, per token" in demo.report(record)


def test_model_is_left_as_it_was(folder, llava):
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llava.modules()]
    measured(method="fastv")
    assert not hasattr(llava, "_pruneops")
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in llava.modules()] == before


def test_picture_shows_every_token_in_its_place(folder):
    """On a white picture those kept are bright and the others are not."""
    record = measured(method="uniform")
    record["kept"]["tokens"] = kept = [0, 15, 17, 40, 100, 240, 255]
    file = plots.answers(np.full((128, 128, 3), 255, np.uint8), record)
    drawn = np.asarray(Image.open(io.BytesIO(file)).convert("L"))
    for column, bright in ((0, range(TOKENS)), (1, kept)):
        left, side = plots._left(column), plots.SQUARE / scenes.ROW
        for token in range(TOKENS):
            row, across = divmod(token, scenes.ROW)
            y, x = (plots.DPI * (edge + (n + 0.5) * side) for edge, n in ((plots.TOP, row), (left, across)))
            assert (drawn[int(y), int(x)] > 200) == (token in bright), token


@pytest.mark.parametrize("form", ["jpg", "webp", "pdf", "svg"])
def test_other_forms_of_picture(folder, form):
    measured(out=f"picture.{form}")
    assert (folder / f"picture.{form}").stat().st_size > 1000


def test_folder_for_the_picture_and_backend(folder, capsys):
    (folder / "out").mkdir()
    status, out, _ = command(capsys, "--json", "--out", "out", "--backend", "reference", "--question", QUESTION)
    record = json.loads(out)
    assert status == 0 and record["backend"] == "reference" and (folder / "out" / "pruneops-demo.png").exists()
    fused = measured()
    assert record["kept"] == fused["kept"]


def test_loading_is_quiet_and_leaves_the_settings_of_transformers(capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    demo._load(torch.device("cpu"))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_weights_that_are_not_there(monkeypatch, tmp_path):
    load = model.load
    monkeypatch.setattr(model, "load", lambda device: load(device, tmp_path))
    with pytest.raises(DemoError, match="install pruneops again"):
        demo._load(torch.device("cpu"))


def test_modes_and_orientation(tmp_path):
    path = tmp_path / "image.png"
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(ramp).save(path)
    grey = np.asarray(photo.load(path))[0, :, 0].astype(int)
    assert abs(grey - np.arange(256)).max() <= 1
    for mode, colour, expected in [
        ("L", 9, (9, 9, 9)),
        ("RGBA", (9, 8, 7, 0), (255, 255, 255)),
        ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
        ("LA", (9, 255), (9, 9, 9)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
    ]:
        Image.new(mode, (4, 4), colour).save(path)
        assert photo.load(path).getpixel((0, 0)) == expected, mode
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # shot with the camera on its side
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert photo.load(tmp_path / "turned.jpg").size == (4, 8)


BAD_IMAGES = {
    "missing.png": None,
    "folder": "folder",
    "empty.png": b"",
    "text.png": b"this is no image\n" * 40,
    "truncated.png": "truncated",
    "truncated.jpg": "truncated",
    "header.png": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_gives_one_line_and_writes_nothing(folder, capsys, picture, name):
    content = BAD_IMAGES[name]
    if content == "folder":
        (folder / name).mkdir()
    elif content == "truncated":
        picture.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2])
    elif content is not None:
        (folder / name).write_bytes(content)
    before = sorted(folder.rglob("*"))
    status, out, err = command(capsys, "--image", name, "--save", "record.json")
    assert (status, out) == (2, "")
    assert err.startswith("pruneops: error: --image ") and name in err and err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--image", ""], "is a directory"),
        (["--keep", "257"], "256 visual tokens"),
        (["--keep", "0.1", "--method", "vtw"], "leave --keep out"),
        (["--out", "missing/a.png"], "no such directory"),
        (["--out", "picture.txt"], ".png"),
        (["--save", "."], "is a directory"),
        (["--backend", "cuda"], "backend 'cuda' cannot run here"),
        (["--question", "which cat is red ?"], "does not know 'cat'"),
        (["--question", "which digit is red or <image>"], "does not know '<image>'"),
        (["--question", "which\ndog"], '"list all digits"'),
        (["--question", " . "], "is empty"),
    ],
)
def test_errors_are_one_line(folder, capsys, argv, message):
    before = sorted(folder.rglob("*"))
    status, out, err = command(capsys, "--image", "picture.png", *argv)
    assert (status, out) == (2, "") and err.count("\n") == 1 and message in err
    assert argv[0].strip("-") in err and sorted(folder.rglob("*")) == before


def test_folder_that_is_not_writable(folder, monkeypatch):
    monkeypatch.setattr(demo.os, "access", lambda *_: False)
    with pytest.raises(DemoError, match=r"--out a\.png: directory \. is not writable"):
        measured(out="a.png")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "fastest"}, "one of dart, divprune"),
        ({"keep": 0}, "--method todre: .*keep"),
        ({"keep": 1.5}, "--method todre: .*keep"),
        ({"keep": "0.1"}, "--method todre: .*keep"),
        ({"method": "random", "seed": -1}, "--method random: .*seed"),
    ],
)
def test_settings_that_methods_refuse(folder, options, message):
    with pytest.raises(DemoError, match=message) as caught:
        measured(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_gpu(folder, capsys):
    assert cli.main(["demo", "--device", "cuda", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["device"] == torch.cuda.get_device_name() and len(record["kept"]["tokens"]) == 26


@pytest.mark.parametrize("module", ["PIL", "tqdm", "transformers", "matplotlib", "skimage", "scipy", "sklearn"])
def test_missing_extra_names_the_command_that_installs_it(folder, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    status, out, err = command(capsys)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert module in err and 'pip install "pruneops[demo]"' in err


def test_without_numpy():
    code = "import sys; sys.modules['numpy'] = None; from pruneops import cli; sys.exit(cli.main(['demo']))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'pruneops: error: the demo needs numpy: pip install "pruneops[demo]"\n'


def test_interrupt_gives_one_line_and_leaves_nothing(folder, capsys, monkeypatch, llava):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = sorted(folder.rglob("*"))
    # the file is written but not yet in place; a hook is choosing
    for owner, name in ((demo.os, "replace"), (methods.ToDRE, "select_each")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, interrupt)
            status, out, err = command(capsys, "--question", QUESTION)
        assert (status, out, err) == (130, "", "pruneops: interrupted\n")
        assert sorted(folder.rglob("*")) == before and not hasattr(llava, "_pruneops")


def test_failing_write_keeps_the_old_picture(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (folder / "pruneops-demo.png").write_bytes(b"old")
    monkeypatch.setattr(demo.os, "replace", full)
    with pytest.raises(DemoError, match="No space left"):
        measured()
    assert (folder / "pruneops-demo.png").read_bytes() == b"old"
