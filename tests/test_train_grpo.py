import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from launch import as_flags, launch
from oracle import inputs_of, logps_one_by_one, logps_repeated, pad, prompt_alone

import train_grpo
from data import BadInput, decode, eos_tokens, take
from model import encode_audio, load_model
from train_grpo import Config, Policy, draw, group_advantages, grpo_loss, sample, shared_prompt_logps, train
from training import parse


def random_completions(model, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(10, 300, (n,), generator=generator) for n in group] for group in lengths]


GROUPS = {
    "unequal lengths": [[3, 7, 1, 5]],
    "several prompts": [[3, 7, 1, 5], [2, 2, 9, 4], [1, 1, 6, 3]],
    "one token each": [[1, 1, 1], [1, 1, 1]],
    "a group of one": [[6], [2]],
}

# ------------------------------------------------------------------------------------------------------ log-probs


@pytest.mark.parametrize("lengths", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shared_prompt_logps_equal_the_repeated_forward(toy_model, examples, lengths, temperature):
    model, processor = toy_model
    examples = examples[4 : 4 + len(lengths)]  # the first two are shorter than the window
    completions = random_completions(model, lengths)
    inputs = inputs_of(processor, examples, "answer")
    assert not inputs["feature_attention_mask"][0].all()
    if len(lengths) == 3:
        assert not inputs["attention_mask"].all()  # the case is meant to have padded prompts
    ids, mask = pad(completions)
    ours = shared_prompt_logps(model, inputs, ids, mask, temperature)
    plain = logps_repeated(model, processor, examples, completions, temperature)
    for b, group in enumerate(plain):
        for g, logp in enumerate(group):
            assert torch.allclose(ours[b, g, : len(logp)], logp, atol=1e-5)
            assert (ours[b, g, len(logp) :] == 0).all()


@pytest.mark.parametrize("lengths", GROUPS.values(), ids=GROUPS)
def test_shared_prompt_gradients_equal_the_repeated_forward(toy_model, examples, lengths):
    model, processor = toy_model
    examples = examples[4 : 4 + len(lengths)]
    completions = random_completions(model, lengths)
    inputs = inputs_of(processor, examples, "answer")
    ids, mask = pad(completions)
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1)) * mask

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients((shared_prompt_logps(model, inputs, ids, mask, 1.0) * weight).sum())
    plain = logps_repeated(model, processor, examples, completions)
    plain = gradients(sum((logp * weight[b, g, : len(logp)]).sum() for b, group in enumerate(plain) for g, logp in enumerate(group)))
    assert ours.keys() == plain.keys() and any("audio_tower" in name for name in ours)
    for name, grad in plain.items():
        assert torch.allclose(ours[name], grad, rtol=1e-4, atol=1e-5 * max(1, grad.abs().max())), name


def test_a_placeholder_in_a_completion_is_a_plain_token(toy_model, examples):
    model, processor = toy_model
    completions = random_completions(model, [[4, 5], [3, 6]])
    completions[0][1][2] = completions[1][0][0] = model.config.audio_token_id
    inputs = inputs_of(processor, examples[4:6], "answer")
    ours = shared_prompt_logps(model, inputs, *pad(completions), 1.0)
    for b, group in enumerate(completions):
        for g, tokens in enumerate(group):
            plain = logps_one_by_one(model, processor, examples[4 + b], tokens)
            assert torch.allclose(ours[b, g, : len(tokens)], plain, atol=1e-5)


def test_padding_and_batch_do_not_matter(toy_model, examples):
    model, processor = toy_model
    completions = random_completions(model, GROUPS["several prompts"])
    inputs = inputs_of(processor, examples[4:7], "answer")
    ids, mask = pad(completions)
    together = shared_prompt_logps(model, inputs, ids, mask, 1.0)
    for b in range(3):
        rows = slice(b, b + 1)
        part = take(inputs, rows)
        assert part["attention_mask"][:, 0].any()  # the padding of the others is gone
        assert torch.allclose(shared_prompt_logps(model, part, ids[rows], mask[rows], 1.0), together[rows], atol=1e-5)


def test_the_policy_hears_the_audio(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:1], "answer")
    other = inputs_of(processor, examples[1:2], "answer")
    ids, mask = pad(random_completions(model, [[4]]))
    logp = shared_prompt_logps(model, inputs, ids, mask, 1.0)
    heard_otherwise = shared_prompt_logps(model, inputs | {"input_features": other["input_features"]}, ids, mask, 1.0)
    assert (logp - heard_otherwise).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------- sampling


def test_the_cache_lies_in_the_type_that_attention_computes_in(toy_model, examples, monkeypatch):
    """Under bf16 a cache as transformers fills it is in fp32 and twice the size, to no effect on the samples."""
    model, processor = toy_model
    inputs = inputs_of(processor, examples[3:7], "answer")
    noise, caches, ids = 1 - torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(0)), [], []
    for kind in (train_grpo.SamplingCache, train_grpo.DynamicCache):
        monkeypatch.setattr(train_grpo, "SamplingCache", lambda config, kind=kind: caches.append(kind(config=config)) or caches[-1])
        with torch.autocast("cpu", torch.bfloat16):
            ids.append(sample(model, inputs, [0], 6, 1.0, noise)[0])
    assert [cache.layers[0].keys.dtype for cache in caches] == [torch.bfloat16, torch.float32]
    assert caches[0].layers[1].values.dtype == torch.bfloat16 and torch.equal(*ids)
    (B, G, T), P = ids[0].shape, inputs["input_ids"].shape[1]
    assert caches[0].layers[0].keys.shape[::2] == (B, P + G * (T - 1))  # the prompt is there once, not G times


def test_first_tokens_follow_the_softmax(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:1], "answer")
    N, T = 20_000, 0.5
    noise = 1 - torch.rand(1, N, 1, generator=torch.Generator().manual_seed(0))
    ids, _ = sample(model, inputs, [0], 1, T, noise)
    p = torch.softmax(model(**inputs).logits[0, -1] / T, -1)
    seen = torch.bincount(ids.flatten(), minlength=len(p)) / N
    assert p.max() > 3 / len(p)  # a distribution with something to get wrong
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / N).sqrt() + 1e-9).all()


def test_draw_inverts_the_cumulative_probability():
    logits = torch.log(torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]]))
    u = torch.tensor([1e-8, 0.2, 0.26, 0.74, 0.76, 1.0])
    assert draw(logits.expand(6, -1), u, 1.0).tolist() == [1, 1, 2, 2, 4, 4]  # never a token of probability 0
    cold = draw(logits.expand(6, -1), u, 0.5)  # 1/6, 4/6, 1/6
    assert cold.tolist() == [1, 2, 2, 2, 2, 4]


def test_the_policy_that_samples_is_the_policy_that_is_scored(toy_model, examples):
    """Each token is what its uniform number picks from the plain model's distribution, padded prompts or not."""
    model, processor = toy_model
    inputs = inputs_of(processor, examples[4:7], "answer")
    assert not inputs["attention_mask"].all()
    noise = 1 - torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(0))
    ids, mask = sample(model, inputs, [0], 6, 0.8, noise)
    for b, g in np.ndindex(3, 2):
        alone = prompt_alone(processor, examples[4 + b])
        tokens = ids[b, g][mask[b, g]]
        for t, token in enumerate(tokens):
            row = torch.cat([alone["input_ids"], tokens[None, :t]], 1)
            logits = model(**alone | {"input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0, -1]
            cdf = torch.softmax(logits.double() / 0.8, -1).cumsum(-1)
            low, high = cdf[token] - torch.softmax(logits.double() / 0.8, -1)[token], cdf[token]
            assert low - 1e-5 <= noise[b, g, t] <= high + 1e-5


def test_greedy_equals_the_models_own_generate(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[3:7], "answer")
    assert not inputs["attention_mask"].all()
    ids, _ = sample(model, inputs, [0], 12)
    plain = dict(do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0)
    theirs = model.generate(**inputs, max_new_tokens=12, eos_token_id=[0], pad_token_id=0, **plain)
    assert len(ids.unique()) > 3  # not the same token over and over
    assert torch.equal(ids[:, 0], theirs[:, inputs["input_ids"].shape[1] :])


def test_a_completion_ends_at_its_first_eos_whichever_it_is(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:2], "answer")
    noise = 1 - torch.rand(2, 8, 30, generator=torch.Generator().manual_seed(0))
    eos = list(range(0, 600, 20))
    ids, mask = sample(model, inputs, eos, 30, 1.0, noise)
    lengths = set()
    for o, m in zip(ids.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist()):
        ends = [t for t, token in enumerate(o) if token in eos]
        length = ends[0] + 1 if ends else len(o)
        assert m == [t < length for t in range(len(o))]
        lengths.add(length)
    assert len(lengths) > 3
    texts = decode(processor, eos, ids, mask)
    assert texts[0][0] == processor.tokenizer.decode([t for t in ids[0, 0][mask[0, 0]].tolist() if t not in eos])


def test_sampling_stops_when_all_have_ended(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:1], "answer")
    ids, mask = sample(model, inputs, list(range(len(processor.tokenizer))), 30)
    assert ids.shape == (1, 1, 1) and mask.all()


def test_every_eos_of_the_generation_config_counts(toy_model):
    model, processor = toy_model
    names = processor.tokenizer.convert_ids_to_tokens(eos_tokens(model, processor))
    assert set(names) == {"<|endoftext|>", "<|im_end|>"}
    model.generation_config.eos_token_id = None
    assert eos_tokens(model, processor) == [processor.tokenizer.eos_token_id]


# ----------------------------------------------------------------------------------------- advantages and the loss


def test_advantages_by_hand():
    A = group_advantages(torch.tensor([[2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    s = math.sqrt(2 / 3) + 1e-4  # deviations 1, -1, 0, 0 over n - 1 = 3
    assert torch.allclose(A, torch.tensor([[1 / s, -1 / s, 0, 0], [0, 0, 0, 0]]))


def test_loss_by_hand_with_clipping():
    """Two completions of two tokens and one; the second, padded token of the second must count for nothing."""
    logp = torch.log(torch.tensor([[[0.6, 0.2], [0.1, 0.9]]])).requires_grad_()
    old = torch.log(torch.tensor([[[0.4, 0.2], [0.2, 0.9]]]))
    ref = torch.log(torch.tensor([[[0.3, 0.2], [0.1, 0.1]]]))
    A, mask = torch.tensor([[1.0, -2.0]]), torch.tensor([[[True, True], [True, False]]])
    loss, kl, clipped = grpo_loss(logp, old, ref, A, mask, epsilon=0.2, beta=0.1)
    # rho 1.5, A 1: clipped to 1.2. rho 1, A 1: 1. rho 0.5, A -2: min(-1, 0.8 x -2) = -1.6, clipped
    k3 = 0.5 - math.log(0.5) - 1  # where ref / pi = 0.5; elsewhere they agree
    first, second = (1.2 - 0.1 * k3 + 1.0) / 2, -1.6
    assert loss.item() == pytest.approx(-(first + second) / 2, abs=1e-6)
    assert kl.item() == pytest.approx(k3 / 4, abs=1e-6)
    assert clipped.item() == pytest.approx((0.5 + 1) / 2)
    loss.backward()
    # a clipped token has no gradient but the KL's: d kl / d logp = 1 - ref / pi
    expected = [[[0.1 * 0.5 / 4, -1.0 / 4], [0.0, 0.0]]]
    assert torch.allclose(logp.grad, torch.tensor(expected), atol=1e-6)


def test_loss_without_reference_has_no_kl():
    logp = torch.randn(2, 3, 4)
    loss, kl, clipped = grpo_loss(logp, logp, None, torch.ones(2, 3), torch.ones(2, 3, 4).bool(), 0.2, 0.0)
    assert (loss.item(), kl.item(), clipped.item()) == (-1.0, 0.0, 0.0)


# ----------------------------------------------------------------------------------------------------- whole steps


def config(folder, output, **flags):
    settings = dict(model=str(folder / "model"), data=str(folder / "train.jsonl"), output=str(output))
    return Config(**settings | dict(prompts_per_step=4, group_size=4, max_new_tokens=5, max_steps=2, lr=1e-2) | flags)


def metrics(output):
    return [json.loads(line) for line in open(output / "metrics.jsonl")]


def weights(output):
    from safetensors.torch import load_file

    return load_file(output / ("adapter_model.safetensors" if (output / "adapter_config.json").exists() else "model.safetensors"))


def assert_same_metrics(one, two):
    for a, b in zip(one, two, strict=True):
        for name in a:  # the weights hardly tell a gradient of another size, for it is clipped; grad_norm does
            assert "seconds" in name or b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name


@pytest.fixture
def reward_by_length(monkeypatch):
    """An untrained model is never right; rewarding even lengths gives a step something to learn."""
    monkeypatch.setattr("train_grpo.accuracy_reward", lambda o, answer, prompt: float(len(o) % 2))
    monkeypatch.setattr("evaluate.mmau_match", lambda prediction, answer, choices: len(prediction) % 2)
    # SGD: Adam would turn the rounding of near-zero gradients into steps of full size
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, weight_decay: torch.optim.SGD(p, lr))


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_micro_batch_changes_nothing(folder, tmp_path, reward_by_length, num_iterations):
    runs = []
    for micro_batch in (1, 2, 4):
        output = tmp_path / str(micro_batch)
        train(config(folder, output, micro_batch=micro_batch, num_iterations=num_iterations, lr=0.1))
        runs.append((metrics(output), weights(output)))
    before = weights(folder / "model")
    for lines, after in runs[1:]:
        assert_same_metrics(runs[0][0], lines)
        for name, weight in after.items():
            assert torch.allclose(weight, runs[0][1][name], atol=1e-6), name
    assert max((runs[0][1][name] - before[name]).abs().max() for name in before) > 1e-3  # and yet it moved


def launch_training(settings, **options):
    """The same run in two processes."""
    launch(
        "import evaluate, torch, train_grpo\n"
        "from training import parse\n"
        "train_grpo.accuracy_reward = lambda o, answer, prompt: float(len(o) % 2)\n"
        "evaluate.mmau_match = lambda prediction, answer, choices: len(prediction) % 2\n"
        "torch.optim.AdamW = lambda p, lr, weight_decay: torch.optim.SGD(p, lr)\n"
        "train_grpo.train(parse(train_grpo.Config, ''))\n",
        *as_flags(settings),
        **options,
    )


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["all weights", "LoRA"])
def test_two_processes_make_the_same_update(folder, tmp_path, reward_by_length, lora_rank):
    (tmp_path / "odd.jsonl").write_text("".join(open(folder / "test.jsonl").readlines()[:11]))  # divides by no two
    settings = dict(lr=0.1, lora_rank=lora_rank, eval_data=str(tmp_path / "odd.jsonl"), audio_dir=str(folder), eval_every=1)
    train(config(folder, tmp_path / "one", **settings))
    launch_training(config(folder, tmp_path / "two", **settings))
    assert all(0 < line["eval_accuracy"] < 1 for line in metrics(tmp_path / "one"))
    assert_same_metrics(metrics(tmp_path / "one"), metrics(tmp_path / "two"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_bf16_computes_in_bf16_keeps_fp32_masters_and_starts_at_the_reference(folder, tmp_path, reward_by_length):
    """The reference's matrices lie in bf16, the policy's are cast on the way: the same numbers, so KL is 0 at first."""
    launch_training(config(folder, tmp_path / "bf16", lr=0.1, max_steps=3), precision="bf16")
    lines = metrics(tmp_path / "bf16")
    assert lines[0]["kl"] == 0 < lines[-1]["kl"]
    assert {weight.dtype for weight in weights(tmp_path / "bf16").values()} == {torch.bfloat16}
    model, _ = load_model(str(tmp_path / "bf16"))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_policy_and_reference_agree_at_first_and_then_part(folder, tmp_path, reward_by_length):
    train(config(folder, tmp_path / "run", micro_batch=2, lr=1.0))
    first, second = metrics(tmp_path / "run")
    assert abs(first["kl"]) < 1e-6 < 1e-5 < second["kl"]


def test_the_second_update_of_a_rollout_is_off_policy(folder, tmp_path, reward_by_length):
    """At num_iterations 2 rho leaves 1, the old log-probs stay those of the sampler, and clipping sets in."""
    train(config(folder, tmp_path / "one", micro_batch=4, lr=3.0, max_steps=1))
    train(config(folder, tmp_path / "two", micro_batch=4, lr=3.0, max_steps=1, num_iterations=2))
    assert metrics(tmp_path / "one")[0]["clip_fraction"] == 0 < metrics(tmp_path / "two")[0]["clip_fraction"]


def test_no_kl_loads_no_reference(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("train_grpo.load_frozen", lambda *_: pytest.fail("loaded a reference"))
    train(config(folder, tmp_path / "run", beta=0.0, max_steps=1))
    assert metrics(tmp_path / "run")[0]["kl"] == 0


def test_under_lora_the_reference_is_the_policy_with_its_adapters_off(folder, tmp_path, monkeypatch, reward_by_length):
    """The same KL as against a model loaded apart, and the policy scored with its adapters on."""
    seen, plain = [], shared_prompt_logps

    def spy(model, inputs, ids, mask, temperature):
        logp = plain(model, inputs, ids, mask, temperature)
        seen.append((logp.detach(), torch.is_grad_enabled(), (inputs, ids, mask, temperature)))
        return logp

    monkeypatch.setattr("train_grpo.load_frozen", lambda *_: pytest.fail("loaded a reference"))
    monkeypatch.setattr("train_grpo.shared_prompt_logps", spy)
    train(config(folder, tmp_path / "run", lora_rank=4, lr=1.0, max_steps=3, micro_batch=4))
    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] == 0 and lines[2]["kl"] > 1e-4
    base, _ = load_model(str(folder / "model"), torch.float32)
    assert [graded for _, graded, _ in seen] == [False, True] * 3
    for reference, policy in zip(seen[::2], seen[1::2]):
        assert torch.equal(reference[0], plain(base, *reference[2]).detach())
    assert not torch.equal(seen[4][0], seen[5][0])


def test_lora_under_bf16_starts_at_the_reference_and_keeps_fp32_adapters(folder, tmp_path, reward_by_length):
    launch_training(config(folder, tmp_path / "run", lora_rank=4, lr=1.0, max_steps=3), precision="bf16")
    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] == 0 < lines[-1]["kl"]
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}


def test_metrics_tell_thinking_from_answering(folder, tmp_path, monkeypatch):
    """By text: what comes before the answer block is thinking, the rest (and the end of the turn) is the answer."""
    _, processor = load_model(str(folder / "model"))
    texts = ["<think>up down</think><answer>up</answer>", "<think>up</think>", "<answer>up</answer>", "up"]
    lengths = [len(ids) for ids in processor.tokenizer(["<think>up down</think>", "<think>up</think>", "", "up"])["input_ids"]]
    monkeypatch.setattr("train_grpo.decode", lambda *_: [texts] * 4)
    train(config(folder, tmp_path / "run", prompt="think", max_steps=1))
    (line,) = metrics(tmp_path / "run")
    assert line["thinking_tokens"] == pytest.approx(np.mean(lengths), rel=1e-5) and lengths[2] == 0 < lengths[1] < lengths[0]
    assert line["thinking_tokens"] + line["answer_tokens"] == pytest.approx(line["completion_tokens"], rel=1e-5)


def test_every_weight_moves_but_the_encoders_sinusoids(folder, tmp_path, reward_by_length):
    train(config(folder, tmp_path / "run", lr=1.0, max_steps=2))
    before, after = weights(folder / "model"), weights(tmp_path / "run")
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in stayed} == {"embed_positions"}


def test_frozen_encoder_stays_and_the_rest_moves(folder, tmp_path, reward_by_length):
    train(config(folder, tmp_path / "run", freeze_audio_encoder=True, gradient_checkpointing=True))
    before, after = weights(folder / "model"), weights(tmp_path / "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("audio_tower" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)


@pytest.mark.parametrize("flags", [dict(freeze_audio_encoder=True), dict(lora_rank=4)], ids=["frozen encoder", "LoRA"])
def test_a_frozen_encoder_runs_once_a_step_and_nothing_changes(folder, tmp_path, monkeypatch, reward_by_length, flags):
    calls, plain_take = [], train_grpo.take
    for module in ("train_grpo", "model"):
        monkeypatch.setattr(f"{module}.encode_audio", lambda *args: calls.append(1) or encode_audio(*args))
    train(config(folder, tmp_path / "once", lr=0.1, **flags))
    assert len(calls) == 2  # steps
    forget = lambda inputs, rows: {name: value for name, value in plain_take(inputs, rows).items() if name != "encoded_audio"}  # noqa: E731
    monkeypatch.setattr("train_grpo.take", forget)
    train(config(folder, tmp_path / "each time", lr=0.1, **flags))
    assert len(calls) == 2 + 2 * (1 + 4 + 4)  # sampling, and reference and policy in micro-batches of 1
    assert_same_metrics(metrics(tmp_path / "once"), metrics(tmp_path / "each time"))
    once, each_time = weights(tmp_path / "once"), weights(tmp_path / "each time")
    assert all(torch.allclose(once[name], each_time[name], atol=1e-6) for name in once)


def test_an_encoder_that_learns_runs_every_time(folder, tmp_path, monkeypatch, reward_by_length):
    calls = []
    for module in ("train_grpo", "model"):
        monkeypatch.setattr(f"{module}.encode_audio", lambda *args: calls.append(1) or encode_audio(*args))
    train(config(folder, tmp_path / "run", lora_rank=4, lora_target="all", max_steps=1))
    assert len(calls) == 1 + 4 + 4


def test_gradient_checkpointing_changes_nothing(folder, tmp_path, reward_by_length):
    train(config(folder, tmp_path / "kept", max_steps=1, lr=0.1))
    train(config(folder, tmp_path / "recomputed", max_steps=1, lr=0.1, gradient_checkpointing=True))
    kept, recomputed = weights(tmp_path / "kept"), weights(tmp_path / "recomputed")
    assert all(torch.allclose(kept[name], recomputed[name], atol=1e-6) for name in kept)


def test_metrics_checkpoints_and_evaluation(folder, tmp_path):
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    flags = dict(max_steps=3, save_every=2, eval_data=str(folder / "test.jsonl"), eval_every=2, prompt="think")
    train(config(folder, tmp_path / "run", **flags))
    lines = metrics(tmp_path / "run")
    keys = "step reward reward_accuracy reward_format reward_std zero_std_groups kl clip_fraction loss grad_norm lr"
    keys += " completion_tokens truncated unique_completions seconds_sample seconds_score seconds_update seconds_other"
    assert lines.pop().keys() == {"step", "eval_accuracy"}  # of the final model
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(set(keys.split()) <= set(line) for line in lines)
    assert ["eval_accuracy" in line for line in lines] == [True, False, True]
    assert [line["lr"] for line in lines] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3], rel=1e-4)
    assert all(line["truncated"] > 0.5 for line in lines)  # an untrained model rarely ends within 5 tokens
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        Qwen2AudioForConditionalGeneration.from_pretrained(path)
        AutoProcessor.from_pretrained(path)
        assert json.load(open(path / "run.json"))["prompt"] == "think"
    assert not (tmp_path / "run" / "partial").exists()


def test_a_clip_that_cannot_be_read_stops_the_run_or_is_skipped_and_counted(folder, tmp_path, capsys, reward_by_length):
    shutil.copytree(folder / "train", tmp_path / "train")
    rows = [json.loads(line) for line in open(folder / "train.jsonl")][:3]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = tmp_path / rows[1]["audio"]
    bad.write_text("not a sound")
    flags = dict(data=str(tmp_path / "train.jsonl"), prompts_per_step=3, max_steps=1)
    with pytest.raises(BadInput, match=f"train.jsonl:2: {bad}: cannot be read as audio"):
        train(config(folder, tmp_path / "stops", **flags))
    train(config(folder, tmp_path / "skips", skip_bad_audio=True, **flags))
    assert metrics(tmp_path / "skips")[0]["clips_skipped"] == pytest.approx(1 / 3, abs=1e-6)
    assert f"skipped: {tmp_path}/train.jsonl:2: {bad}" in capsys.readouterr().out

    # the run is that of a file in which the next row stands where the bad one stood
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in (0, 2, 2)))
    train(config(folder, tmp_path / "other", **flags | dict(data=str(tmp_path / "other.jsonl"))))
    assert_same_metrics(metrics(tmp_path / "skips"), [line | {"clips_skipped": 1 / 3} for line in metrics(tmp_path / "other")])
    for row in rows:
        (tmp_path / row["audio"]).write_text("not a sound")
    with pytest.raises(BadInput, match="cannot be read as audio"):  # none is left to stand in
        train(config(folder, tmp_path / "none", skip_bad_audio=True, **flags))


def test_a_held_out_clip_that_cannot_be_read_stops_the_run_or_counts_as_wrong(folder, tmp_path):
    (tmp_path / "bad.wav").write_text("not a sound")
    row = json.loads(open(folder / "test.jsonl").readline()) | {"audio": str(tmp_path / "bad.wav")}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    flags = dict(eval_data=str(tmp_path / "test.jsonl"), max_steps=1)
    with pytest.raises(BadInput, match="test.jsonl:1: .*bad.wav: cannot be read as audio"):
        train(config(folder, tmp_path / "stops", **flags))
    train(config(folder, tmp_path / "skips", skip_bad_audio=True, **flags))
    assert [line["eval_accuracy"] for line in metrics(tmp_path / "skips")] == [0, 0]


def test_the_same_seed_gives_the_same_run(folder, tmp_path):
    for name in ("a", "b"):
        train(config(folder, tmp_path / name))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


BAD = {
    "prompts_per_step that does not divide": (dict(prompts_per_step=4, micro_batch=3), "is not a multiple"),
    "unknown prompt": (dict(prompt="shout"), "plain, answer, think"),
    "negative seed": (dict(seed=-1), "--seed must be at least 0"),
    "no step": (dict(max_steps=0), "--max_steps"),
    "group of one": (dict(group_size=1), "--group_size"),
    "temperature 0": (dict(temperature=0.0), "--temperature"),
    "no such data": (dict(data="nowhere.jsonl"), "nowhere.jsonl"),
    "no such model": (dict(model="./nowhere"), "./nowhere"),
    "no such audio": (dict(audio_dir="nowhere"), "train.jsonl:1: no audio file"),
    "output below a file": (dict(output=__file__ + "/run"), "cannot be made"),
    "unknown tracker": (dict(log_with="paper"), "tensorboard or wandb"),
}


@pytest.mark.parametrize("flags, says", BAD.values(), ids=BAD)
def test_bad_flags_are_refused_in_one_line(folder, tmp_path, flags, says):
    settings = dict(data=str(folder / "train.jsonl"), model=str(folder / "model"), output=str(tmp_path / "run")) | flags
    with pytest.raises(BadInput) as error:
        train(Config(**settings))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_flag_is_refused_in_one_line():
    with pytest.raises(BadInput, match="unknown flag or value: --learning_rate 1"):
        parse(Config, "", ["--learning_rate", "1"])


def test_a_damaged_model_is_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 1000)
    with pytest.raises(BadInput, match="model: cannot load the model"):
        train(config(folder, tmp_path / "run", model=str(tmp_path / "model")))


def test_a_folder_that_holds_a_run_is_refused(folder, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match="already holds a run"):
        train(config(folder, tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_policy_scores_at_its_temperature(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:1], "answer")
    ids, mask = pad(random_completions(model, [[3, 2]]))
    assert torch.equal(Policy(model, 0.5)(inputs, ids, mask), shared_prompt_logps(model, inputs, ids, mask, 0.5))
