import json

import benchmark
import pytest
import torch
from data import BadInput
from torch.utils.flop_counter import FlopCounterMode

TINY = (4, 2, (3, 5))  # G, seconds of sound, completion tokens


@pytest.fixture(scope="module")
def small():
    return benchmark.make_model("small")


def test_both_ways_say_the_same_and_sharing_keeps_less(small):
    found = benchmark.compare(small, *TINY, repeats=1)  # which asserts that the log-probs agree
    assert found["ratio"].keys() == {"prefill", "sample", "score", "update", "memory"}
    assert found["ratio"]["memory"] > 4


def test_ways_that_differ_are_not_compared(small, monkeypatch):
    monkeypatch.setattr(benchmark, "shared_logps", lambda *args: benchmark.shared_prompt_logps(*args, 0.9))
    with pytest.raises(AssertionError):
        benchmark.compare(small, *TINY, repeats=1)


def test_the_arithmetic_is_what_is_computed(small):
    """Against torch's own count, which sees all matrix products but those within attention."""
    G, clip_seconds, T = 4, 10, 12
    inputs, ids, mask = benchmark.make_group(small, 1, G, clip_seconds, (T, T))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        benchmark.shared_logps(small, inputs, ids, mask)
    attention = 4 * 500**2 * 256 * 2, 4 * 512 * 8 * (310**2 / 2 + G * T * (310 + T / 2))
    ours = sum(benchmark.needed_flops(small, G, clip_seconds, T).values()) - sum(attention)
    assert ours == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )  # convolutions and projector are left out


def test_the_small_model_splits_its_cost_as_the_real_one(small):
    shares = []
    for model in (small, benchmark.make_model("7b", "meta")):
        split = benchmark.needed_flops(model, 8, 10, 13, frames=1500)
        shares.append([part / sum(split.values()) for part in split.values()])
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


def test_numbers_go_to_a_file(tmp_path, monkeypatch, capsys):
    compare = benchmark.compare
    step = dict(
        sample=1.0, score=1.0, update=1.0, other=0.1, tokens=16, memory_gb=0.0, micro_batch=4, prompt="answer"
    )
    monkeypatch.setattr(benchmark, "SETTINGS", [TINY])
    monkeypatch.setattr(benchmark, "whole_step", lambda *args: step)
    monkeypatch.setattr(benchmark, "compare", lambda model, *args: compare(model, *args, repeats=1))
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--json", str(tmp_path / "found.json")])
    benchmark.main()
    (row,) = json.load(open(tmp_path / "found.json"))["settings"]
    assert (row["group_size"], row["clip_seconds"], row["completion_tokens"]) == (4, 2, [3, 5])
    out = capsys.readouterr().out
    assert (
        f"| {row['ratio']['update']:.1f} |" in out and "s a token" in out and ": 3.10 s (sample 1.00" in out
    )


def test_the_arithmetic_past_one_node(monkeypatch, capsys):
    """Of one GPU: the table's sums by hand, for n parameters of 2 bytes in bf16."""
    n = sum(p.numel() for p in benchmark.make_model("7b", "meta").parameters())
    rows = {row[:2]: row[2:] for row in benchmark.arithmetic()}
    compute, decode, held, moved, across = rows["all weights, FSDP2", 8]
    assert held == 18 * n / 8 + 2 * n and decode == 13 * 2 * n / 3.35e12 and across == 0
    assert moved == 2 * n + 2 * (3 * 2 * n + 4 * n)  # two prompts a GPU
    assert rows["all weights, FSDP2", 16][4] == 2 * n + 10 * n  # crosses nodes whole
    assert rows["all weights, FSDP2 in a node, copies across", 16][4] == 2 * 4 * n / 8
    assert (
        rows["LoRA, DDP", 16][0] == rows["LoRA, DDP", 64][0] == rows["LoRA, DDP", 1][0] / 16
    )  # 16 prompts feed 16
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--arithmetic"])
    benchmark.main()
    assert capsys.readouterr().out.count("\n| ") == 1 + 1 + 12


@pytest.mark.slow
def test_the_step_is_train_grpos():
    step = benchmark.whole_step(benchmark.make_model("small"), micro_batch=1, prompts=2)
    assert min(step["sample"], step["score"], step["update"]) > 0


def test_the_real_size_asks_for_a_gpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--size", "7b"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="--size 7b needs a CUDA GPU"):
        benchmark.main()
