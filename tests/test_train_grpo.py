import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import as_flags, assert_same_run, config, launch, load_examples, metrics, odd_length, run_script
from conftest import training_code, weights
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

import evaluate
import train_grpo
from cli import BadInput, parse
from data import stream_indices
from model import completion_logits, encode_audio, load_model, sample
from train_grpo import Config, completion_mean, compute_rewards, group_advantages, grpo_loss


def train(folder, output, **flags):
    run_script("train_grpo", folder, output, **flags)


# ---------------------------------------------------------------- advantages and the loss


def test_advantages_by_hand():
    A = group_advantages(torch.tensor([[2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    s = math.sqrt(2 / 3) + 1e-4  # deviations 1, -1, 0, 0 over n - 1 = 3
    assert torch.allclose(A, torch.tensor([[1 / s, -1 / s, 0, 0], [0, 0, 0, 0]]))


def test_the_mean_is_over_tokens_and_then_over_completions():
    x = torch.tensor([[[1.0, 3.0, 99.0], [10.0, 99.0, 99.0]], [[2.0, 2.0, 2.0], [0.0, 4.0, 99.0]]])
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]]).bool()
    assert completion_mean(x, mask) == (2 + 10 + 2 + 2) / 4


def test_loss_by_hand_with_clipping():
    """Completions of two tokens and of one; the padding after the second must not count."""
    logps = torch.log(torch.tensor([[[0.6, 0.2], [0.1, 0.9]]])).requires_grad_()
    old = torch.log(torch.tensor([[[0.4, 0.2], [0.2, 0.9]]]))
    ref = torch.log(torch.tensor([[[0.3, 0.2], [0.1, 0.1]]]))
    A, mask = torch.tensor([[1.0, -2.0]]), torch.tensor([[[True, True], [True, False]]])
    loss, tokens = grpo_loss(logps, old, ref, A, mask, epsilon=0.2, beta=0.1)
    # ratio 1.5, A 1: clipped to 1.2. ratio 1, A 1: 1. ratio 0.5, A -2: min(-1, 0.8 x -2) = -1.6, clipped
    k3 = 0.5 - math.log(0.5) - 1  # where ref / pi = 0.5; elsewhere they agree
    first, second = (1.2 - 0.1 * k3 + 1.0) / 2, -1.6
    assert loss.item() == pytest.approx(-(first + second) / 2, abs=1e-6)
    assert tokens["kl"][mask].tolist() == pytest.approx([k3, 0, 0], abs=1e-6)
    assert tokens["clip_fraction_high"][mask].tolist() == [1, 0, 0]
    assert tokens["clip_fraction_low"][mask].tolist() == [0, 0, 1]
    loss.backward()
    # a clipped token has only the KL's gradient: d kl / d logp = 1 - ref / pi
    expected = [[[0.1 * 0.5 / 4, -1.0 / 4], [0.0, 0.0]]]
    assert torch.allclose(logps.grad, torch.tensor(expected), atol=1e-6)


def test_rewards_have_names_and_compare_each_completion_with_its_own_question(examples):
    first, second = examples[:2]
    texts = [
        [f"<answer>{first.answer}</answer>", first.answer, "<answer>something</answer>"],
        [f"<answer>{first.answer}</answer>", "", f"<answer>{second.answer}</answer>"],
    ]
    rewards = compute_rewards([first, second], texts, "answer")
    assert first.answer != second.answer
    assert rewards["accuracy"].tolist() == [[1, 1, 0], [0, 0, 1]]
    assert rewards["format"].tolist() == [[1, 0, 1], [1, 0, 1]]


def test_loss_without_reference_has_no_kl():
    logps = torch.randn(2, 3, 4)
    loss, tokens = grpo_loss(logps, logps, None, torch.ones(2, 3), torch.ones(2, 3, 4).bool(), 0.2, 0.0)
    assert loss == -1 and not any(values.any() for values in tokens.values())


# ---------------------------------------------------------------- whole steps


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4], ids=["all weights", "LoRA"])
def test_bf16_starts_at_the_reference_and_keeps_fp32_masters(folder, tmp_path, lora_rank):
    """The reference's matrices are bf16, and autocast makes the policy's bf16 too: KL starts at exactly 0."""
    settings = config("train_grpo", folder, tmp_path / "run", lr=0.1, max_steps=3, lora_rank=lora_rank)
    launch(training_code("train_grpo"), *as_flags(settings), precision="bf16")
    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] == 0 < lines[-1]["kl"]
    saved = {weight.dtype for weight in weights(tmp_path / "run").values()}
    assert saved == {torch.float32 if lora_rank else torch.bfloat16}
    if not lora_rank:
        model, _ = load_model(str(tmp_path / "run"))
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        saved = json.loads((tmp_path / "run" / "config.json").read_text())
        parts = [saved, saved["text_config"], saved["audio_config"]]
        assert [part["dtype"] for part in parts] == ["bfloat16"] * 3


def test_policy_and_reference_agree_at_first_and_then_part(folder, tmp_path, reward_odd_lengths, plain_sgd):
    train(folder, tmp_path / "run", micro_batch=2, lr=1.0)
    first, second = metrics(tmp_path / "run")
    assert abs(first["kl"]) < 1e-6 < 1e-5 < second["kl"]


def test_the_second_update_of_a_rollout_is_off_policy(folder, tmp_path, reward_odd_lengths, plain_sgd):
    """With num_iterations 2 the ratio leaves 1, old_logps stay the sampler's, and clipping sets in."""
    train(folder, tmp_path / "one", micro_batch=4, lr=3.0, max_steps=1)
    train(folder, tmp_path / "two", micro_batch=4, lr=3.0, max_steps=1, num_iterations=2)
    one, two = (metrics(tmp_path / name)[0] for name in ("one", "two"))
    assert one["clip_fraction_low"] == one["clip_fraction_high"] == 0
    assert two["clip_fraction_low"] > 0 and two["clip_fraction_high"] > 0


def no_reference(*_):
    pytest.fail("loaded a reference")


def test_no_kl_loads_no_reference(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("training.load_reference", no_reference)
    train(folder, tmp_path / "run", beta=0.0, max_steps=1)
    assert metrics(tmp_path / "run")[0]["kl"] == 0


def test_under_lora_the_reference_is_the_policy_with_its_adapters_off(
    folder, tmp_path, monkeypatch, reward_odd_lengths, plain_sgd
):
    """The same log-probs as from a model loaded separately, and the policy scored with its adapters on."""
    calls = []

    def spy(model, *args):
        logits = completion_logits(model, *args)
        calls.append((logits.detach(), torch.is_grad_enabled(), args))
        return logits

    monkeypatch.setattr("training.load_reference", no_reference)
    monkeypatch.setattr("model.completion_logits", spy)
    train(folder, tmp_path / "run", lora_rank=4, lr=1.0, max_steps=3, micro_batch=4)
    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] == 0 and lines[2]["kl"] > 1e-4
    base, _ = load_model(str(folder / "model"), torch.float32)
    assert [with_gradient for _, with_gradient, _ in calls] == [False, True] * 3
    for reference, _, args in calls[::2]:
        assert torch.equal(reference, completion_logits(base, *args).detach())
    assert not torch.equal(calls[4][0], calls[5][0])


def test_metrics_tell_thinking_from_answering(folder, tmp_path, monkeypatch):
    """What comes before the answer block is thinking; the rest, with the end of the turn, is the answer."""
    _, processor = load_model(str(folder / "model"))
    texts = ["<think>up down</think><answer>up</answer>", "<think>up</think>", "<answer>up</answer>", "up"]
    thoughts = ["<think>up down</think>", "<think>up</think>", "", "up"]
    lengths = [len(ids) for ids in processor.tokenizer(thoughts)["input_ids"]]
    monkeypatch.setattr("train_grpo.decode", lambda *_: [texts] * 4)
    train(folder, tmp_path / "run", prompt="think", max_steps=1)
    (line,) = metrics(tmp_path / "run")
    assert line["thinking_tokens"] == pytest.approx(np.mean(lengths), rel=1e-5)
    assert lengths[2] == 0 < lengths[1] < lengths[0]
    total = line["thinking_tokens"] + line["answer_tokens"]
    assert total == pytest.approx(line["completion_tokens"], rel=1e-5)


def test_token_metrics_are_means_over_all_tokens_of_the_step(
    folder, tmp_path, monkeypatch, reward_odd_lengths, plain_sgd
):
    """Over all updates, whatever the micro-batches, and however the loss averages."""
    plain, seen = train_grpo.grpo_loss, []

    def grpo_loss(logps, old_logps, ref_logps, advantages, mask, epsilon, beta):
        ratio = torch.exp(logps - old_logps)[mask].detach()
        r = torch.exp(ref_logps - logps)[mask].detach()
        A = advantages[..., None].expand(mask.shape)[mask]
        high, low = (A > 0) & (ratio > 1 + epsilon), (A < 0) & (ratio < 1 - epsilon)
        seen.append(torch.stack([r - r.log() - 1, low.float(), high.float()]))
        return plain(logps, old_logps, ref_logps, advantages, mask, epsilon, beta)

    monkeypatch.setattr(train_grpo, "grpo_loss", grpo_loss)
    flags = dict(micro_batch=1, num_iterations=2, lr=3.0, max_steps=1)
    train(folder, tmp_path / "run", **flags)
    (line,) = metrics(tmp_path / "run")
    expected = torch.cat(seen, 1).mean(1).tolist()  # over 2 x 4 micro-batches with unequal numbers of tokens
    found = [line[name] for name in ("kl", "clip_fraction_low", "clip_fraction_high")]
    assert found == pytest.approx(expected, rel=1e-4) and min(found) > 0
    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "completion_mean", lambda x, mask: (x * mask).sum(-1).mean() / 256)
        train(folder, tmp_path / "dr", **flags | dict(lr=0.0))
    train(folder, tmp_path / "same", **flags | dict(lr=0.0))
    dr, same = (metrics(tmp_path / name)[0] for name in ("dr", "same"))
    assert dr["entropy"] == same["entropy"] > 0 and dr["grad_norm"] < same["grad_norm"]


def test_every_part_of_the_reward_is_a_metric(folder, tmp_path, monkeypatch):
    """A fork's own part shows up without further work, and may replace the others."""

    def rewards(examples, texts, prompt):
        lengths = torch.tensor([[float(len(text)) for text in group] for group in texts])
        return {"length": lengths, "constant": torch.ones_like(lengths)}

    monkeypatch.setattr("train_grpo.compute_rewards", rewards)
    train(folder, tmp_path / "run", max_steps=1)
    (line,) = metrics(tmp_path / "run")
    assert line["reward_constant"] == 1 < line["reward_length"] and "reward_accuracy" not in line
    assert line["reward"] == pytest.approx(1 + line["reward_length"], rel=1e-5)


def test_every_weight_moves_but_the_encoders_sinusoids(folder, tmp_path, reward_odd_lengths, plain_sgd):
    train(folder, tmp_path / "run", lr=1.0, max_steps=2)
    before, after = weights(folder / "model"), weights(tmp_path / "run")
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in stayed} == {"embed_positions"}


def test_frozen_encoder_stays_and_the_rest_moves(folder, tmp_path, reward_odd_lengths, plain_sgd):
    train(folder, tmp_path / "run", train=["projector", "language"], gradient_checkpointing=True)
    before, after = weights(folder / "model"), weights(tmp_path / "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("audio_tower" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)


ENCODINGS = {  # flags, and how often the encoder runs in a step of 4 prompts
    "frozen encoder": (dict(train=["projector", "language"]), 1),
    "LoRA": (dict(lora_rank=4), 1),
    "adapters in the encoder": (dict(lora_rank=4, train=["encoder", "language"]), 1 + 4 + 4),
}


@pytest.mark.parametrize("flags, times", ENCODINGS.values(), ids=ENCODINGS)
def test_a_frozen_encoder_runs_once_a_step(folder, tmp_path, monkeypatch, reward_odd_lengths, flags, times):
    calls = []
    for module in ("train_grpo", "model"):
        monkeypatch.setattr(f"{module}.encode_audio", lambda *args: calls.append(1) or encode_audio(*args))
    train(folder, tmp_path / "run", max_steps=1, samples_every=0, **flags)
    assert len(calls) == times


def test_metrics_checkpoints_and_evaluation(folder, tmp_path):
    flags = dict(max_steps=3, save_every=2, eval_data=str(folder / "test.jsonl"), eval_every=2)
    train(folder, tmp_path / "run", prompt="think", **flags)
    lines = metrics(tmp_path / "run")
    evaluations = [line for line in lines if "eval_accuracy" in line]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 3]  # the last is the final model's
    assert all(line.keys() == {"step", "eval_accuracy", "eval_accuracy_silent"} for line in evaluations)
    keys = """step reward reward_accuracy reward_format reward_std zero_std_groups kl entropy
        clip_fraction_low clip_fraction_high loss
        grad_norm lr completion_tokens truncated unique_completions clips_cut clips_silent clips_skipped
        thinking_tokens answer_tokens seconds_sample seconds_score seconds_update"""
    assert [line["step"] for line in steps] == [0, 1, 2]
    assert all(line.keys() == set(keys.split()) for line in steps)
    assert [line["lr"] for line in steps] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3], rel=1e-4)
    assert all(line["truncated"] > 0.5 for line in steps)  # an untrained model rarely ends within 5 tokens
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        Qwen2AudioForConditionalGeneration.from_pretrained(path)
        AutoProcessor.from_pretrained(path)
        assert json.load(open(path / "run.json"))["prompt"] == "think"
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize("eval_silence", [True, False])
def test_held_out_questions_are_answered_in_silence_too(folder, tmp_path, capsys, monkeypatch, eval_silence):
    """With the clips these answers are right more often; evaluate.py measures the same."""
    monkeypatch.setattr("evaluate.mmau_match", lambda text, *_: len(text) % 2 == 1)
    monkeypatch.setattr("rewards.mmau_match", lambda text, *_: len(text) % 2 == 1)
    data = str(folder / "train.jsonl")
    train(folder, tmp_path / "run", eval_data=data, eval_silence=eval_silence, max_steps=1, lr=0.0)
    printed = capsys.readouterr().out
    expected = {"step": 0}
    for name, silence in (("eval_accuracy", []), ("eval_accuracy_silent", ["--silence"])):
        output = tmp_path / name
        flags = ["--model", folder / "model", "--data", data, "--output", output, "--max_new_tokens", 5]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), *silence])
        evaluate.main()
        expected[name] = json.loads((output / "results.json").read_text())["accuracy"]
    text = f"step 0: held-out accuracy {expected['eval_accuracy']:.1%}"
    if eval_silence:
        assert expected["eval_accuracy"] != expected["eval_accuracy_silent"]
        text += f", with silence {expected['eval_accuracy_silent']:.1%}"
    else:
        del expected["eval_accuracy_silent"]
    assert text in printed.splitlines()
    first = next(line for line in metrics(tmp_path / "run") if "eval_accuracy" in line)
    assert first == pytest.approx(expected, abs=1e-6)


def samples(output):
    return [json.loads(line) for line in open(output / "samples.jsonl", encoding="utf-8")]


def test_the_same_prompts_are_shown_with_the_same_random_numbers(folder, tmp_path, capsys, monkeypatch):
    """At step 0 they are the groups that the step trains on; with lr 0 they stay the same."""
    trained = []

    def spy(*args):
        trained.append((args[1], compute_rewards(*args)))
        return trained[-1][1]

    monkeypatch.setattr("train_grpo.compute_rewards", spy)
    monkeypatch.setattr("train_grpo.accuracy_reward", lambda *args: 0.46 * odd_length(*args))
    train(folder, tmp_path / "run", prompts_per_step=6, max_steps=3, samples_every=2, lr=0.0)
    rows, rest = samples(tmp_path / "run")[:5], samples(tmp_path / "run")[5:]
    texts, rewards = trained[1]  # those of the step; the first call was for samples.jsonl
    total = sum(rewards.values())
    asked = load_examples(str(folder / "train.jsonl"))
    for b, (row, k) in enumerate(zip(rows, stream_indices(24, 42, 0, 5), strict=True)):
        assert list(row) == "step audio question choices answer completions rewards advantages".split()
        assert (row["audio"], row["question"]) == (asked[k].audio, asked[k].question)
        assert (row["choices"], row["answer"]) == (asked[k].choices, asked[k].answer)
        assert row["completions"] == texts[b] and row["rewards"] == total[b].tolist()
        mean, std = np.mean(row["rewards"]), np.std(row["rewards"], ddof=1)
        assert row["advantages"] == pytest.approx((row["rewards"] - mean) / (std + 1e-4), abs=1e-4)
    assert [row["step"] for row in rest] == [2] * 5 + [3] * 5  # the last are the final model's
    assert [row | {"step": 0} for row in rest] == rows * 2
    out = capsys.readouterr().out
    assert "step 0: " in out and "step 1: " not in out and "step 2: " in out
    assert out.count("advantage") == 3 * 4 and "reward 0.46  advantage" in out


@pytest.mark.parametrize(
    "flags", [dict(), dict(lora_rank=2, lora_dropout=0.5)], ids=["all weights", "encoder frozen"]
)
def test_samples_do_not_depend_on_how_many_prompts_are_sampled_together(
    folder, tmp_path, monkeypatch, reward_odd_lengths, flags
):
    """Nor does training; 6 prompts in parts of 4 are uneven, and the parts end at different lengths."""
    flags |= dict(prompts_per_step=6, samples_every=1, max_new_tokens=12, temperature=0.7)
    lengths = []

    def spy(model, inputs, *args):
        ids, mask = sample(model, inputs, *args)
        lengths.append((len(ids), ids.shape[2]))
        return ids, mask

    monkeypatch.setattr("train_grpo.sample", spy)
    # this model rarely ends by itself
    monkeypatch.setattr("training.eos_tokens", lambda *args: list(range(0, 500, 4)))
    for n in (0, 1, 4):
        train(folder, tmp_path / f"{n}", sample_batch=n, **flags)
    sizes = [size for size, _ in lengths]
    assert sizes[:2] == [5, 6] and sizes.count(4) == 5 and sizes.count(1) > 2 * 11
    assert len({length for size, length in lengths if size == 1}) > 1
    for n in (1, 4):
        assert samples(tmp_path / "0") == samples(tmp_path / f"{n}")
        assert_same_run(tmp_path / "0", tmp_path / f"{n}")


def test_samples_leave_training_as_it_is(folder, tmp_path, reward_odd_lengths):
    train(folder, tmp_path / "none", samples_every=0, lora_rank=2, lora_dropout=0.5)
    train(folder, tmp_path / "all", samples_every=1, lora_rank=2, lora_dropout=0.5)
    assert_same_run(tmp_path / "none", tmp_path / "all", exact=True)
    assert not (tmp_path / "none" / "samples.jsonl").exists()
    first, *_, last = samples(tmp_path / "all")
    assert (first["step"], last["step"]) == (0, 2) and first["completions"] != last["completions"]


def test_a_clip_that_cannot_be_read_stops_the_run_or_is_skipped_and_counted(
    folder, tmp_path, capsys, reward_odd_lengths
):
    shutil.copytree(folder / "train", tmp_path / "train")
    rows = [json.loads(line) for line in open(folder / "train.jsonl")][:3]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = tmp_path / rows[1]["audio"]
    bad.write_text("not a sound")
    flags = dict(data=str(tmp_path / "train.jsonl"), prompts_per_step=3, max_steps=1)
    with pytest.raises(BadInput, match=f"train.jsonl:2: {bad}: cannot be read as audio"):
        train(folder, tmp_path / "stops", **flags)
    train(folder, tmp_path / "skips", skip_bad_audio=True, **flags)
    assert metrics(tmp_path / "skips")[0]["clips_skipped"] == pytest.approx(1 / 3, abs=1e-6)
    assert f"skipped: {tmp_path}/train.jsonl:2: {bad}" in capsys.readouterr().out

    # the run equals one on a file in which the next row replaces the bad one
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in (0, 2, 2)))
    train(folder, tmp_path / "other", **flags | dict(data=str(tmp_path / "other.jsonl")))
    (line,) = metrics(tmp_path / "other")
    (tmp_path / "other" / "metrics.jsonl").write_text(json.dumps(line | {"clips_skipped": 0.333333}))
    assert_same_run(tmp_path / "skips", tmp_path / "other")
    for row in rows:
        (tmp_path / row["audio"]).write_text("not a sound")
    with pytest.raises(BadInput, match="cannot be read as audio"):  # no row can be read
        train(folder, tmp_path / "none", skip_bad_audio=True, **flags)


def test_a_held_out_clip_that_cannot_be_read_stops_the_run_or_counts_as_wrong(folder, tmp_path):
    (tmp_path / "bad.wav").write_text("not a sound")
    row = json.loads(open(folder / "test.jsonl").readline()) | {"audio": str(tmp_path / "bad.wav")}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    flags = dict(eval_data=str(tmp_path / "test.jsonl"), max_steps=1)
    with pytest.raises(BadInput, match="test.jsonl:1: .*bad.wav: cannot be read as audio"):
        train(folder, tmp_path / "stops", **flags)
    train(folder, tmp_path / "skips", skip_bad_audio=True, **flags)
    lines = metrics(tmp_path / "skips")
    assert [line["eval_accuracy"] for line in lines if "eval_accuracy" in line] == [0, 0]


BAD = {
    "prompts_per_step that does not divide": (dict(prompts_per_step=4, micro_batch=3), "is not a multiple"),
    "unknown prompt": (dict(prompt="shout"), "plain, answer, think"),
    "negative seed": (dict(seed=-1), "--seed must be at least 0"),
    "no step": (dict(max_steps=0), "--max_steps"),
    "group of one": (dict(group_size=1), "--group_size"),
    "temperature 0": (dict(temperature=0.0), "--temperature"),
    "no data": (dict(data=""), "--data is missing"),
    "sample batch": (dict(sample_batch=-1), "--sample_batch must be at least 0"),
    "no such data": (dict(data="nowhere.jsonl"), "nowhere.jsonl"),
    "no such model": (dict(model="./nowhere"), "./nowhere"),
    "no such audio": (dict(audio_dir="nowhere"), "train.jsonl:1: no audio file"),
    "output below a file": (dict(output=__file__ + "/run"), "--output"),
    "unknown tracker": (dict(log_with="paper"), "paper"),
}


@pytest.mark.parametrize("flags, says", BAD.values(), ids=BAD)
def test_bad_flags_are_refused_in_one_line(folder, tmp_path, flags, says):
    flags = dict(flags)
    with pytest.raises(BadInput) as error:
        train(folder, flags.pop("output", tmp_path / "run"), **flags)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--learning_rate", "1"], "unknown flag or value: --learning_rate 1"),
        (["--group", "4"], "unknown flag or value: --group 4"),
        (["--lr=nan"], "lr must be a finite number, not nan"),
        (["--beta=inf"], "beta must be a finite number, not inf"),
    ],
)
def test_flags_that_cannot_be_parsed_are_refused(words, says):
    with pytest.raises(BadInput, match=says):
        parse(Config, "", words)


def test_a_folder_that_holds_a_run_is_refused(folder, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match="already exists"):
        train(folder, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
