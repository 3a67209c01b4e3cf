"""VTW: from one layer on, nothing visual."""

import pytest
import torch

from pruneops.methods import VTW, Image, vtw_layer
from tests.methods.oracles import prompt


def test_layers():
    assert VTW().layers(32) == (15,)
    assert [vtw_layer(count) for count in (1, 2, 28, 40)] == [0, 0, 13, 18]
    assert VTW(layer=0.5).layers(28) == (14,) and VTW(layer=0).layers(1) == (0,)
    assert VTW(layer=0.999).layers(2) == (1,)
    with pytest.raises(ValueError, match=r"VTW: layer must be one of the decoder's layers, 0 to 14, got 15"):
        VTW(layer=15).layers(15)


def test_removal():
    kept = VTW().at_layer(15, prompt([3, 4]), 32)
    assert kept.shape == (0,) and kept.dtype == torch.int64
    assert VTW().at_layer(16, prompt([3, 4]), 32) is None
    assert VTW().at_layer(15, prompt([]), 32) is None


def test_elsewhere():
    assert VTW().budget(5) == 0 and not VTW().after_projector and VTW().needs == frozenset()
    assert VTW().select(Image(torch.ones(3, 2))).tolist() == [0, 1, 2]
    assert VTW().layers(15) == (7,)
    with pytest.raises(ValueError, match="tokens must be an int of at least 0, got -1"):
        VTW().budget(-1)
