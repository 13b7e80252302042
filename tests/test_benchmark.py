"""The benchmark: it compares like with like, its sums are right, its numbers reach the table and the file."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cli import BadInput
from model import shared_prompt_logps
from tools import benchmark

TINY = (2, 2, (3, 5))  # G, seconds of audio, fewest and most completion tokens


@pytest.fixture(scope="module")
def small():
    return benchmark.make_model("small")


@pytest.fixture(scope="module")
def measured(small):
    return benchmark.compare(small, *TINY, repeats=1)


def test_sharing_the_prompt_needs_less_memory(measured):
    assert measured["ratio"].keys() == {"prefill", "sample", "score", "update", "memory"}
    assert measured["ratio"]["memory"] > 4


def test_ways_that_disagree_are_not_compared():
    logps = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    off_by_rounding = logps.bfloat16().float()
    benchmark.check_agreement(logps, off_by_rounding, torch.bfloat16)
    with pytest.raises(RuntimeError, match="the two ways differ by"):
        benchmark.check_agreement(logps, off_by_rounding, torch.float32)
    with pytest.raises(RuntimeError, match="the two ways differ by"):
        benchmark.check_agreement(logps, logps / 0.9, torch.bfloat16)


def test_counted_operations_are_those_that_torch_counts(small):
    """torch's counter sees every matrix product except those inside attention."""
    G, clip_seconds, T = 4, 10, 64
    inputs, ids, mask = benchmark.make_group(small, 1, G, clip_seconds, (T, T))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shared_prompt_logps(small, inputs, ids, mask, 1.0)
    encoder_attention = 4 * 500**2 * 256 * 2
    lm_attention = 4 * 512 * 8 * (310**2 / 2 + G * T * (310 + T / 2))
    ours = sum(benchmark.needed_flops(small, G, clip_seconds, T).values())
    # ours leave out the convolutions and the projector
    assert ours - encoder_attention - lm_attention == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_small_model_splits_its_cost_like_the_real_one(small):
    shares = []
    for model in (small, benchmark.make_model("7b", "meta")):
        flops = benchmark.needed_flops(model, 8, 10, 13, frames=1500)
        shares.append([part / sum(flops.values()) for part in flops.values()])
    assert shares[0] == pytest.approx(shares[1], abs=0.03)


def test_numbers_reach_the_table_and_the_file(measured, tmp_path, monkeypatch, capsys):
    step = {"sample": 1.0, "score": 1.25, "update": 2.0, "tokens": 16, "memory_gb": 0.0}
    step |= {"micro_batch": 4, "prompt": "answer"}
    monkeypatch.setattr(benchmark, "SETTINGS", [TINY])
    monkeypatch.setattr(benchmark, "compare", lambda model, *setting: measured)
    monkeypatch.setattr(benchmark, "measure_step", lambda *args: step)
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--json", str(tmp_path / "found.json")])
    benchmark.main()
    found = json.loads((tmp_path / "found.json").read_text())
    (row,) = found["settings"]
    assert (row["group_size"], row["clip_seconds"], row["completion_tokens"]) == (2, 2, [3, 5])
    assert found["steps"] == [step]
    out = capsys.readouterr().out
    times = row["seconds"]["update"]
    cells = f"update | {times['shared']:.3f} s | {times['repeated']:.3f} s | {row['ratio']['update']:.1f} |"
    assert f"| 2 | 2 s | 3 to 5 tokens | {cells}" in out
    assert "micro_batch 4: 4.25 s (sample 1.00, score 1.25, update 2.00)" in out
    assert f"decoding: {found['seconds_a_token']:.4f} s per token" in out


def test_what_was_measured_before_a_failure_is_written(measured, tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError("a training step does not fit")

    monkeypatch.setattr(benchmark, "SETTINGS", [TINY, TINY])
    monkeypatch.setattr(benchmark, "compare", lambda model, *setting: measured)
    monkeypatch.setattr(benchmark, "measure_step", fail)
    with pytest.raises(MemoryError):
        benchmark.measure(benchmark.Config(json=str(tmp_path / "found.json")))
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["settings"]) == 2 and found["seconds_a_token"] > 0 and "steps" not in found


def test_freed_weights_are_gone():
    model = benchmark.make_model("small")
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    benchmark.free(model)
    assert all(p.is_meta and p.grad is None for p in model.parameters())


def test_arithmetic_gives_the_sums_made_by_hand(monkeypatch, capsys):
    """For n parameters, which take 2 bytes each in bf16."""
    n = sum(p.numel() for p in benchmark.make_model("7b", "meta").parameters())
    costs = {(cost.method, cost.gpus): cost for cost in benchmark.arithmetic()}
    one_node = costs["all weights, FSDP2", 8]
    assert one_node.memory == 18 * n / 8 + 2 * n
    assert one_node.decoding == 13 * 2 * n / 3.35e12
    assert one_node.in_node == 2 * n + 2 * (3 * 2 * n + 4 * n)  # 16 prompts: two per GPU
    assert one_node.across == 0
    assert costs["all weights, FSDP2", 16].across == 2 * n + 10 * n
    assert costs["all weights, FSDP2 in a node, replicas across", 16].across == 2 * 4 * n / 8
    lora = {gpus: costs["LoRA, DDP", gpus].compute for gpus in (1, 16, 64)}
    assert lora[16] == lora[64] == lora[1] / 16  # one prompt per GPU; with more than 16 GPUs, more prompts
    assert costs["LoRA, DDP", 1].in_node == costs["LoRA, DDP", 8].across == 0 < costs["LoRA, DDP", 16].across

    monkeypatch.setattr("sys.argv", ["benchmark.py", "--arithmetic"])
    benchmark.main()
    assert capsys.readouterr().out.count("\n| ") == 1 + 1 + len(costs)  # header, line, rows


@pytest.mark.parametrize(
    "size, message",
    [("7b", "--size 7b needs a CUDA GPU"), ("3b", "--size 3b: unknown, choose small or 7b")],
)
def test_sizes_that_cannot_be_measured_are_refused(monkeypatch, size, message):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--size", size])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=message):
        benchmark.main()


@pytest.mark.slow
def test_a_training_step_is_run_by_train_grpo():
    step = benchmark.measure_step(benchmark.make_model("small"), micro_batch=1, prompts=2)
    assert min(step["sample"], step["score"], step["update"]) > 0
    assert 1 <= step["tokens"] <= 16
