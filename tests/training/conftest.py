"""Checkpoints and data for training, on one thread: the models are too small for more."""

import pytest
import torch
import transformers
from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from pruneops.training.__main__ import load_model
from pruneops.training.data import JsonLines
from tests.training import checkpoints


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{family: folder of its checkpoint}"""
    AutoProcessor.register(transformers.Qwen2_5_VLConfig, checkpoints.ImagesOnly, exist_ok=True)
    root = tmp_path_factory.mktemp("models")
    for family in checkpoints.FAMILIES:
        checkpoints.write_checkpoint(family, root / family)
    yield {family: root / family for family in checkpoints.FAMILIES}
    PROCESSOR_MAPPING._extra_content.pop(transformers.Qwen2_5_VLConfig)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of examples."""
    path = tmp_path_factory.mktemp("data") / "examples.jsonl"
    checkpoints.write_data(path)
    return path


@pytest.fixture(scope="session", params=checkpoints.FAMILIES)
def loaded(request, folders):
    """(model, processor) of each family."""
    return load_model(folders[request.param])


@pytest.fixture(scope="session")
def llava(folders):
    """(model, processor)"""
    return load_model(folders["llava"])


@pytest.fixture
def examples(data):
    """Four, of different lengths."""
    return [JsonLines(data)[i] for i in range(4)]
