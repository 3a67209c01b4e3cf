"""The demo: geometry of the tiles, the random model, the whole run in small, its errors."""

import io
import itertools
import json
import math
import sys

import pytest
import torch

from pruneops import cli, reference

pytest.importorskip("transformers")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

from pruneops import plots  # noqa: E402
from pruneops.demo import DemoError, methods, model, photo  # noqa: E402
from pruneops.demo import run as demo  # noqa: E402

TINY = model.Shape(56, 14, 64, 3, 4, width=64, layers=2, heads=2, inner=128, dtype=torch.float32)  # 5 x 16 tokens


@pytest.fixture(scope="module")
def picture():
    """Left half flat, right half noise."""
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    noise[:, :60] = 120
    return Image.fromarray(noise)


@pytest.fixture
def tiny(monkeypatch, picture, tmp_path):
    """A folder with picture.png in it; the command line builds the tiny model."""
    monkeypatch.setattr(model, "shape_for", lambda device: TINY)
    monkeypatch.chdir(tmp_path)
    picture.save("picture.png")
    return tmp_path


def command(capsys, *argv):
    status = cli.main(["demo", "--device", "cpu", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def shown(tiles, tiling):
    """Mean brightness [5, side, side] of each token's patch."""
    side, patch = tiling.side, tiling.patch
    return tiles.mean(-1).reshape(photo.TILES, side, patch, side, patch).mean((2, 4))


@pytest.mark.parametrize("size", [(112, 112), (112, 56), (56, 112), (224, 100), (37, 61)])
def test_every_token_shows_its_box_of_the_photograph(size):
    tiling = photo.Tiling(*size, crop=56)
    assert tiling.tokens == 80
    for token in range(tiling.tokens):
        left, top, right, bottom = tiling.box(token)
        tile, row, column = tiling.place(token)
        assert token == (tile * tiling.side + row) * tiling.side + column
        inside = [max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])]
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            assert tile > 0 and min(size) < max(size)  # in the black bars
            continue
        if (inside[2] - inside[0]) * (inside[3] - inside[1]) < 0.5 * (right - left) * (bottom - top):
            continue
        canvas = np.zeros((size[1], size[0], 3), np.uint8)
        x0, y0, x1, y1 = (round(edge) for edge in inside)
        canvas[y0:y1, x0:x1] = 255
        brightness = shown(photo.tile(Image.fromarray(canvas), tiling), tiling)[tile]
        assert brightness.argmax() == row * tiling.side + column


def test_sizes_of_llava_next():
    tiling = photo.Tiling(1200, 800)
    assert (tiling.side, tiling.tokens) == (24, 2880)
    assert (tiling.scaled, tiling.offset) == ((672, 448), (0, 112))
    assert tiling.box(0) == (0, 0, 50, 800 / 24)
    assert tiling.box(576) == (0, -200, 25, -175)  # above the photograph
    assert tiling.box(2879) == (1175, 975, 1200, 1000)


def test_tile_order_and_bars():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    canvas = np.zeros((112, 112, 3), np.uint8)
    for i, colour in enumerate(colours):
        canvas[56 * (i // 2) :, 56 * (i % 2) :] = colour
    canvas[56:, :56] = colours[2]
    tiles = photo.tile(Image.fromarray(canvas), photo.Tiling(112, 112, 56))
    assert tiles.shape == (5, 56, 56, 3)
    assert [tuple(tile[28, 28]) for tile in tiles[1:]] == colours
    wide = photo.tile(Image.new("RGB", (100, 20), "white"), photo.Tiling(100, 20, 56))
    assert wide[0].min() == 255 and wide[1, 0].max() == 0 and wide[1, -1].min() == 255


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_odd_sizes_tile(size):
    tiles = photo.tile(Image.new("RGB", size, "white"), photo.Tiling(*size, crop=56))
    assert tiles[0].min() == 255 and tiles[1:].max() == 255


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


@torch.inference_mode()
def test_cls_attention_is_that_of_the_last_layer(picture):
    torch.manual_seed(0)
    tower, _, _ = model.build(TINY, "cpu")
    tiling = photo.Tiling(*picture.size, TINY.crop)
    pixels = photo.normalise(photo.tile(picture, tiling), "cpu", torch.float32)
    features, attention = model.see(tower, pixels)
    assert features.shape == (5, 16, 64) and attention.shape == (16,)
    tower.set_attn_implementation("eager")
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(attention, out.attentions[-1][0].mean(0)[0, 1:])
    torch.testing.assert_close(features, out.hidden_states[-2][:, 1:])


@torch.inference_mode()
def test_pruned_prefill_equals_the_whole_one_with_the_dropped_keys_blocked():
    torch.manual_seed(0)
    _, _, decoder = model.build(TINY, "cpu")
    embeddings = torch.randn(1, 60, TINY.width)
    kept = torch.cat([torch.arange(8), torch.tensor([11, 12, 30, 49]), torch.arange(52, 60)])
    hidden, cache = model.prefill(decoder, embeddings[:, kept], kept[None])
    blocked = torch.ones(60, 60).tril() * torch.isin(torch.arange(60), kept)
    mask = torch.where((blocked > 0) | torch.eye(60, dtype=torch.bool), 0.0, -math.inf)[None, None]
    positions = torch.arange(60)[None]
    whole = decoder(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden, whole[:, kept], rtol=1e-4, atol=1e-5)
    assert model.cache_bytes(cache) == 2 * 2 * len(kept) * TINY.width * 4  # K and V, 2 layers, float32


def test_end_to_end(tiny, capsys):
    argv = ("--image", "picture.png", "--keep", "0.25", "--save", "record.json", "--backend", "reference")
    status, out, err = command(capsys, *argv)
    assert (status, err) == (0, "")
    record = json.loads((tiny / "record.json").read_text())
    assert record["tokens"] == {"visual": 80, "per_tile": 16, "text": 64, "kept": 20}
    order = record["order"]
    assert len(set(order)) == 20 and order[0] == record["pivot"] < 16  # the pivot is a thumbnail token
    assert record["radii"][0] is None and sorted(record["radii"][1:], reverse=True) == record["radii"][1:]
    assert record["kv_bytes"] == {"all": 144 * 2 * 2 * 64 * 4, "kept": 84 * 2 * 2 * 64 * 4}
    assert all(value > 0 for value in record["seconds"].values()) and len(record["seconds"]) == demo.STAGES
    assert record["image"] == {"path": "picture.png", "width": 120, "height": 80}
    assert "random" in out and "80 = thumbnail 16 + 4 crops x 16" in out and "pruneops-demo.png" in out
    with Image.open("pruneops-demo.png") as drawn:
        drawn.load()
        assert drawn.width == 1200
    assert sorted(path.name for path in tiny.iterdir()) == ["picture.png", "pruneops-demo.png", "record.json"]


def test_end_to_end_dart(tiny, capsys):
    argv = ("--image", "picture.png", "--method", "dart", "--keep", "21", "--save", "record.json")
    status, out, err = command(capsys, *argv, "--backend", "reference")
    assert (status, err) == (0, "")
    record = json.loads((tiny / "record.json").read_text())
    assert record["method"] == "dart" and record["tokens"]["kept"] == 21 == len(set(record["order"]))
    assert record["quotas"] == [2, 2, 2, 2, 2, 1, 1, 1] and record["order"][:8] == record["pivots"]
    assert record["duplication"][:8] == pytest.approx([1] * 8)
    assert all(-1 <= score <= 1.00001 for score in record["duplication"])
    assert all(value > 0 for value in record["seconds"].values()) and len(record["seconds"]) == demo.STAGES
    assert "least duplication" in out and "tokens taken by each: 1 or 2" in out
    with Image.open("pruneops-demo.png") as drawn:
        assert drawn.size == (1200, 640)


def test_pivots_take_the_least_similar_in_turn():
    x = torch.tensor([[1.0, 0], [0, 2], [-1, 0], [0, -3], [1, 1], [-1, -1]])
    (order,) = methods.METHODS["dart"].choose(reference, x, torch.tensor([0, 1]), 5, "cosine")
    assert order.tolist() == [0, 1, 2, 5, 3]  # the first pivot takes two of the other three


def test_what_repeats_scores_higher(tiny, picture):
    record = demo.run("picture.png", method="dart", keep=80, shape=TINY, device="cpu", runs=1)
    tiling = photo.Tiling(*picture.size, TINY.crop)
    flat, noisy = [], []
    for token, score in zip(record["order"], record["duplication"]):
        left, top, right, bottom = tiling.box(token)
        if top >= 0 and bottom <= 80 and (right <= 60 or left >= 60):  # on the photograph, in one of its halves
            (flat if right <= 60 else noisy).append(score)
    assert len(flat) == len(noisy) > 10 and np.median(flat) > np.median(noisy) + 0.1


def test_duplication_picture_shows_every_token_in_its_place():
    """Each token scores its number; those kept stand out in colour, and nothing else does."""
    tiling = photo.Tiling(112, 112, 56)
    order, quotas, scores = [3, 77, 16, 20, 41], [2, 1], np.arange(80) / 79
    tiles = np.zeros((5, 56, 56, 3), np.uint8)
    file = plots.duplication(tiles, tiling, order, quotas, scores.tolist(), "note", "caption")
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(float)
    tall, high = plots.COLUMN * plots.WIDTH * plots.DPI, plots.HEIGHT * plots.DPI

    def colour(token, column):
        """Of a pixel off the middle of a token's square, where no dot is."""
        tile, row, across = tiling.place(token)
        left, top = plots._left(column) * plots.WIDTH * plots.DPI, high - 0.93 * high
        if tile == 0:
            top = high - plots.MARGIN * plots.WIDTH * plots.DPI - tall / 2
        else:
            left, top = left + (tile - 1) % 2 * tall / 2, top + (tile - 1) // 2 * tall / 2
        return pixels[int(top + (row + 0.2) * tall / 8), int(left + (across + 0.2) * tall / 8)]

    brightness = [colour(token, 1).sum() for token in range(80)]
    assert all(later >= earlier - 6 for earlier, later in itertools.pairwise(brightness))
    assert brightness[-1] > brightness[0] + 300
    assert [token for token in range(80) if np.ptp(colour(token, 2)) > 60] == sorted(order)
    assert (colour(16, 2) == colour(3, 2)).all() and (colour(41, 2) == colour(77, 2)).all()
    assert np.abs(colour(3, 2) - colour(77, 2)).max() > 60


def test_kept_tokens_follow_the_content(tiny, picture):
    order = demo.run("picture.png", keep=16, shape=TINY, device="cpu", runs=1)["order"]
    boxes = [photo.Tiling(*picture.size, TINY.crop).box(token) for token in order]
    assert sum(right > 60 for _, _, right, _ in boxes) >= 12  # the noisy half is half of the tokens


@pytest.mark.parametrize("method, measure", [("todre", "radii"), ("dart", "duplication")])
def test_seed_decides_everything(tiny, method, measure):
    records, drawings = [], []
    for seed in (3, 3, 4):
        records.append(demo.run("picture.png", method=method, seed=seed, shape=TINY, device="cpu", runs=1))
        drawings.append((tiny / "pruneops-demo.png").read_bytes())
    same = [(record["order"], record[measure]) for record in records]
    assert same[0] == same[1] != same[2]
    assert drawings[0] == drawings[1] != drawings[2]


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("keep, kept", [(1, 1), (7, 7), (9, 9), (80, 80), (1.0, 80), (1e-9, 1)])
def test_budgets(tiny, method, keep, kept):
    record = demo.run("picture.png", method=method, keep=keep, shape=TINY, device="cpu", runs=1, out="picture.jpg")
    assert record["tokens"]["kept"] == kept == len(set(record["order"])) == len(record["order"])


def test_default_photograph_json_and_folder(tiny, capsys):
    pytest.importorskip("skimage")
    (tiny / "out").mkdir()
    status, out, _ = command(capsys, "--json", "--out", "out", "--metric", "euclidean", "--backend", "reference")
    record = json.loads(out)
    assert status == 0 and record["image"]["path"] is None and record["backend"] == "reference"
    assert (tiny / "out" / "pruneops-demo.png").exists() and record["metric"] == "euclidean"


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
def test_bad_image_gives_one_line_and_writes_nothing(tiny, capsys, picture, name):
    content = BAD_IMAGES[name]
    if content == "folder":
        (tiny / name).mkdir()
    elif content == "truncated":
        picture.save(tiny / name)
        (tiny / name).write_bytes((tiny / name).read_bytes()[: (tiny / name).stat().st_size // 2])
    elif content is not None:
        (tiny / name).write_bytes(content)
    before = sorted(tiny.rglob("*"))
    status, out, err = command(capsys, "--image", name, "--save", "record.json")
    assert (status, out) == (2, "")
    assert err.startswith("pruneops: error: --image ") and name in err and err.count("\n") == 1
    assert sorted(tiny.rglob("*")) == before


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--image", ""], "is a directory"),
        (["--keep", "81"], "80 visual tokens"),
        (["--out", "missing/a.png"], "no such directory"),
        (["--out", "picture.txt"], ".png"),
        (["--save", "."], "is a directory"),
        (["--backend", "cuda"], "cannot run here"),
        (["--method", "dart", "--metric", "euclidean"], "knows cosine only"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tiny, capsys, argv, words):
    before = sorted(tiny.rglob("*"))
    status, out, err = command(capsys, "--image", "picture.png", *argv)
    assert (status, out) == (2, "") and err.count("\n") == 1 and words in err
    assert sorted(tiny.rglob("*")) == before


def test_unknown_method(tiny):
    with pytest.raises(DemoError, match="one of todre, dart"):
        demo.run("picture.png", method="fastest", shape=TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["transformers", "matplotlib", "skimage"])
def test_missing_extra_names_the_command_that_installs_it(tiny, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    status, out, err = command(capsys)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert module in err and 'pip install "pruneops[demo]"' in err


def test_interrupt_gives_one_line_and_leaves_nothing(tiny, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = sorted(tiny.rglob("*"))
    monkeypatch.setattr(demo.os, "replace", interrupt)  # the last moment: the file is written, not yet in place
    status, out, err = command(capsys, "--image", "picture.png")
    assert (status, out, err) == (130, "", "pruneops: interrupted\n")
    assert sorted(tiny.rglob("*")) == before


def test_failing_write_keeps_the_old_picture(tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tiny / "pruneops-demo.png").write_bytes(b"old")
    monkeypatch.setattr(demo.os, "replace", full)
    with pytest.raises(DemoError, match="No space left"):
        demo.run("picture.png", shape=TINY, device="cpu", runs=1)
    assert (tiny / "pruneops-demo.png").read_bytes() == b"old"
