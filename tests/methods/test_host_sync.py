"""Methods whose budgets depend on sizes only cause no host synchronisation; ToDRE's stage 2 causes one."""

import pytest
import torch

from pruneops import methods
from pruneops.methods import Image, ToDRE, todre
from tests.contract import assert_same_bits
from tests.host_sync import host_syncs, no_host_sync
from tests.methods.cases import LAYERS, METHODS, SIZES, STAGE_2, images, rows
from tests.methods.weights import rate_classifier

HERE = "pruneops/methods"


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_images(method, sizes):
    request = images(sizes)
    with no_host_sync(HERE):
        chosen = method.select_each(request)
    expected = method.budget if method.after_projector else int
    assert [len(indices) for indices in chosen] == [expected(size) for size in sizes]
    assert_same_bits(chosen, [method.select(image) for image in request])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_batches_and_videos(method):
    [image] = images([60])
    batch = Image(image.features.unflatten(0, (3, 20)), image.cls_attention.unflatten(0, (3, 20)))
    with no_host_sync(HERE):
        for one in (batch, image._replace(frames=4), image._replace(thumbnail=(20, 40)), batch._replace(frames=2)):
            method.select(one)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("row", rows().values(), ids=rows())
@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.layers(LAYERS)], ids=lambda m: m.name)
def test_prompts(method, row):
    """Of every shape: without text, without images, with images of which nothing is left."""
    with no_host_sync(HERE):
        kept = method.at_layer(method.layers(LAYERS)[0], row, LAYERS)
    left = [end - start for start, end in row.images]
    expected = [min(method.budget(size), count) for size, count in zip(row.sizes, left)]
    if expected == left:
        assert kept is None
    else:
        ranks = kept.tolist()
        assert ranks == sorted(ranks)
        assert [sum(start <= rank < end for rank in ranks) for start, end in row.images] == expected


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("row", rows().values(), ids=rows())
def test_stage_2(row):
    """Only its decision is read, at its layers and if the prompt has visual tokens."""
    for tau in (0.0, 1.5):
        method = ToDRE(keep=1.0, depths=STAGE_2.depths, tau=tau)
        for layer, expected in ((1, 0), (2, 1 if len(row.visual) else 0)):
            with host_syncs(HERE) as places:
                method.at_layer(layer, row, LAYERS)
            assert len(places) == expected and all("todre.py" in place for place in places), places
    assert method.layers(LAYERS) == (2,)


FUNCTIONS = {
    "cls_attention": lambda x, y: methods.cls_attention(x, x, cls=3),
    "mean_attention": lambda x, y: methods.mean_attention(x, x),
    "fastv_scores": lambda x, y: methods.fastv_scores(x, x),
    "dart_select": lambda x, y: methods.dart_select(x, y, 5, text=x[:, :3], text_norms=y[:, :3]),
    "dart_select without text": lambda x, y: methods.dart_select(x, y, 5),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions(function):
    """Functions that adapters call directly."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, 16, generator=generator), torch.rand(2, 12, generator=generator)
    with no_host_sync(HERE):
        function(x, y)


@pytest.mark.usefixtures("backend")
def test_dyrate():
    """In the prompt its rate is read; steps of generation read nothing (test_dyrate.py)."""
    method = methods.DyRate(weights=rate_classifier(), keep=0.25)
    with host_syncs(HERE) as places:
        method.at_layer(2, rows()["two images"], LAYERS)
    assert len(places) == 1 and "dyrate.py" in places[0], places


@pytest.mark.parametrize(
    "sizes, calls",
    [
        ((), []),
        ((1, 0), []),
        ((40,), ["kcenter [40, 32]"]),
        ((1, 40, 0), ["kcenter [40, 32]"]),
        ((40, 1, 40), ["kcenter [2, 40, 32]"]),
        ((40, 7, 1, 40), ["kcenter_varlen [87, 32]"]),
    ],
)
def test_operators_of_todre(sizes, calls, monkeypatch):
    """One call for all images, and starts of images go to the device only where images differ."""
    called = []

    def recorded(name, original):
        def call(x, *args, **kwargs):
            called.append(f"{name} {list(x.shape)}")
            return original(x, *args, **kwargs)

        return call

    for name in ("kcenter", "kcenter_varlen"):
        monkeypatch.setattr(todre, name, recorded(name, getattr(todre, name)))
    METHODS["todre"].select_each(images(sizes))
    assert called == calls


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_cuda(method):
    """By CUDA's own detection of synchronisations."""

    def run():
        for request in requests:
            method.select_each(request)
        for row in prompts:
            for layer in method.layers(LAYERS):
                method.at_layer(layer, row, LAYERS)

    requests = [
        [x._replace(features=x.features.cuda(), cls_attention=x.cls_attention.cuda()) for x in images(sizes)]
        for sizes in SIZES.values()
    ]
    tensors = ("hidden", "query", "key", "visual")
    prompts = [
        row._replace(
            **{name: getattr(row, name).cuda() for name in tensors}, rotary=tuple(part.cuda() for part in row.rotary)
        )
        for row in rows().values()
    ]
    if "norm" in method.needs:
        prompts = [row._replace(norm=lambda hidden: hidden * 2) for row in prompts]
    run()  # loads kernels, allocates pinned memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
