import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import toy  # noqa: E402
from data import load_examples  # noqa: E402
from model import load_model  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small toy: 24 training and 12 test questions, and a model that has learned nothing yet."""
    path = tmp_path_factory.mktemp("toy")
    toy.make_data(path, "train", 24, seed=1)
    toy.make_data(path, "test", 12, seed=2)
    toy.make_model(path / "model", seed=0)
    return path


@pytest.fixture
def toy_model(folder):
    model, processor = load_model(str(folder / "model"), torch.float32)
    return model.eval(), processor


@pytest.fixture(scope="session")
def examples(folder):
    """Questions of unequal length about clips of unequal length."""
    return load_examples(str(folder / "train.jsonl"))
