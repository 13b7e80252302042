"""docs/one_step.ipynb: its cells run as they stand, without Jupyter, and it is stored with its outputs."""

import ast
import json
import re
import sys
from types import ModuleType

import matplotlib
import pytest
import torch
from conftest import ROOT, odd_length

NOTEBOOK = json.loads((ROOT / "docs" / "one_step.ipynb").read_text(encoding="utf-8"))
CELLS = NOTEBOOK["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_text_comes_before_each_code_cell_and_there_are_few():
    """Exercises, which have no code, come last."""
    kinds = [cell["cell_type"] for cell in CELLS]
    exercises = kinds[2 * len(CODE) :]
    assert kinds == ["markdown", "code"] * len(CODE) + ["markdown"] * len(exercises)
    assert 8 <= len(CODE) <= 12 and 2 <= len(exercises) <= 3
    for cell in CELLS[-len(exercises) :]:
        text = "".join(cell["source"])
        assert text.startswith("**Your turn") and "*Hint:*" in text and "*Expect" in text


def test_links_lead_to_files_that_have_what_they_name():
    text = "\n".join("".join(cell["source"]) for cell in CELLS)
    links = re.findall(r"\[`(.+?)`\]\((.+?)\)", text)
    assert len(links) >= 4
    for name, target in links:
        path = ROOT / "docs" / target
        assert path.name == name or f"def {name}(" in path.read_text(encoding="utf-8")


def test_cells_define_no_functions_or_classes():
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    assert not any(isinstance(node, kinds) for code in CODE for node in ast.walk(ast.parse(code)))


def test_it_is_stored_with_its_outputs_and_none_is_large():
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(CODE) + 1)) and {o["output_type"] for o in outputs} >= {"display_data"}
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    data = ["".join(value) for output in outputs for value in output.get("data", {}).values()]
    assert sum("<audio" in value for value in data) == 1 and max(map(len, data)) < 100_000
    printed = ["".join(output.get("text", "")) for output in outputs]
    assert any(" clipped\n" in text for text in printed)  # the clip acts in the second update
    assert "/home" not in json.dumps(NOTEBOOK) and "/tmp" not in json.dumps(NOTEBOOK)


@pytest.fixture
def namespace(folder, tmp_path, monkeypatch):
    """The names that the cells define; the base is an untrained model, rewarded for odd lengths."""
    (tmp_path / "runs/toy").mkdir(parents=True)
    (tmp_path / "runs/toy/base").symlink_to(folder / "model")
    for name in ("train", "train.jsonl"):
        (tmp_path / "runs/toy" / name).symlink_to(folder / name)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")  # where Jupyter starts it
    monkeypatch.setattr("rewards.accuracy_reward", odd_length)
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython, ipython.version_info = lambda: None, (9, 0)  # matplotlib asks for these
    played = []
    display.Audio = lambda wave, rate: played.append((wave, rate))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names = {"played": played}
    with matplotlib.rc_context({"backend": "agg"}):
        for code in CODE:
            exec(compile(code, "one_step.ipynb", "exec"), names)
    return names


def test_the_cells_run_and_the_update_goes_the_right_way(namespace):
    n = type("Names", (), namespace)
    ((wave, rate),) = n.played
    assert rate == 16_000 and len(wave) > 1_000
    assert torch.allclose(n.logps, n.plain, atol=1e-5)
    assert n.rewards.std() > 0 and abs(n.advantages.mean()) < 1e-5
    assert abs(n.kl) < 1e-6 and n.clipped == 0  # before the update
    change = ((n.new_logps - n.old_logps) * n.mask).sum(-1)
    assert (change * (n.rewards - n.rewards.mean())).sum() > 0  # better completions became likelier
    is_pulled = n.pull != 0  # second update: all tokens but the clipped ones have a policy gradient
    assert n.is_clipped.any() and torch.equal(is_pulled, n.mask & ~n.is_clipped)
    too_high = (n.ratio > 1.2) & (n.advantages > 0)[..., None]
    too_low = (n.ratio < 0.8) & (n.advantages < 0)[..., None]
    assert torch.equal(n.is_clipped, n.mask & (too_high | too_low))
    assert n.ids.shape == n.mask.shape and not torch.equal(*n.moved)
