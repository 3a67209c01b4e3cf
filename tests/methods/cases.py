"""Methods, images and prompts shared by the tests of all methods."""

import torch

from pruneops.methods import DART, DTR, VTW, DivPrune, FasterVLM, FastV, Image, Random, Selector, ToDRE, Uniform
from tests.inputs import clustered
from tests.methods.oracles import prompt
from tests.methods.weights import ranking_model, selector

LAYERS = 4  # of the decoder

METHODS = {
    "dart": DART(keep=0.4, layer=2),
    "dart, official": DART(keep=0.4, layer=2, compat="official"),
    "divprune": DivPrune(keep=0.3),
    "dtr": DTR(keep=0.4, weights=ranking_model()),
    "fastervlm": FasterVLM(keep=0.3),
    "fastv": FastV(keep=0.4, layer=2),
    "fastv, last row": FastV(keep=0.4, layer=2, rows="last"),
    "random": Random(keep=0.3),
    "selector": Selector(keep=0.3, weights=selector()),
    "todre": ToDRE(keep=0.3, depths=()),
    "todre, pivots by norm": ToDRE(keep=5, pivot="norm", depths=()),
    "uniform": Uniform(keep=0.3),
    "vtw": VTW(layer=2),
}
STAGE_2 = ToDRE(keep=1.0, depths=(0.5,))


def images(sizes, seed=0):
    """Images with [CLS] attention; tokens of one image are close to a common vector, as real features are."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for i, size in enumerate(sizes):
        x = torch.randn(size, 32, generator=generator) + 2 * torch.randn(1, 32, generator=generator)
        images.append(Image(x, torch.rand(size, generator=generator), index=i))
    return images


SIZES = {
    "one": (40,),
    "alike": (40, 40, 40),
    "different": (40, 7, 64, 40),
    "empty ones": (0, 40, 0, 1),
    "one that loses tokens": (1, 0, 40),
    "none": (),
    "nothing but empty ones": (0, 0),
}


def norm(hidden):
    """A decoder's final norm with a projection, so that autocast would change its result."""
    weight = clustered((hidden.shape[-1], hidden.shape[-1]), seed=5)
    return torch.nn.functional.rms_norm(hidden @ weight.to(hidden), hidden.shape[-1:])


def rotary(length, width=8):
    """Cos and sin [S, Dr]."""
    angle = torch.arange(length)[:, None] / torch.arange(1, width + 1)
    return angle.cos(), angle.sin()


def rows():
    """{description: Row}"""
    prompts = {
        "one image": prompt([40]),
        "two images": prompt([40, 12], between=3),
        "an empty image": prompt([0, 40, 0], sizes=[0, 60, 9], between=0),
        "nothing but empty images": prompt([0, 0], sizes=[4, 0], between=0),
        "no text": prompt([20, 20], before=0, between=0, after=0),
        "no text after": prompt([30], after=0),
        "no image": prompt([]),
    }
    return {name: row._replace(norm=norm, rotary=rotary(len(row.hidden))) for name, row in prompts.items()}
