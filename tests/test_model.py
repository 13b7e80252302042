import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT, inputs_of, random_completions
from safetensors.torch import load_file, save_file

import model as model_module
from cli import BadInput
from data import decode, select_rows
from model import Policy, additive_mask, check_finite, draw, embed_prompt, encode_audio, end_of_turn
from model import eos_tokens, load_model, repeated_logps, sample, sampling_noise, shared_prompt_logps

GROUPS = {
    "unequal lengths": [[3, 7, 1, 5]],
    "several prompts": [[3, 7, 1, 5], [2, 2, 9, 4], [1, 1, 6, 3]],
    "one token each": [[1, 1, 1], [1, 1, 1]],
    "a group of one": [[6], [2]],
}

# ---------------------------------------------------------------- loading


def test_a_models_class_comes_from_its_config(folder, tmp_path):
    (tmp_path / "any-name").symlink_to(folder / "model")
    assert type(load_model(str(tmp_path / "any-name"))[0]).__name__ == "Qwen2AudioForConditionalGeneration"
    config = json.loads((folder / "model" / "config.json").read_text())
    (tmp_path / "qwen2-audio").mkdir()
    (tmp_path / "qwen2-audio" / "config.json").write_text(json.dumps(config["text_config"]))
    with pytest.raises(BadInput, match="is a qwen2 model"):
        load_model(str(tmp_path / "qwen2-audio"))


def test_the_hubs_own_layout_loads(folder, toy_model, examples, tmp_path):
    """Five shards with legacy names, an index, legacy keys, and a sampling configuration to be ignored."""
    model, processor = toy_model
    hub, weights = tmp_path / "hub", load_file(folder / "model" / "model.safetensors")
    shutil.copytree(folder / "model", hub)
    (hub / "model.safetensors").unlink()
    legacy = ("audio_tower.", "language_model.", "multi_modal_projector.")
    assert all(name.startswith(legacy) for name in weights)
    index, names = {}, sorted(weights)
    for n in range(5):
        file = f"model-0000{n + 1}-of-00005.safetensors"
        save_file({name: weights[name] for name in names[n::5]}, hub / file, {"format": "pt"})
        index |= dict.fromkeys(names[n::5], file)
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": index}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((hub / "config.json").read_text())
    placeholder = config.pop("audio_token_id", None) or config["audio_token_index"]
    config |= {"audio_token_index": placeholder, "ignore_index": -100}
    (hub / "config.json").write_text(json.dumps(config))
    # the template in the tokenizer's configuration, the feature extractor's configuration in its own file
    template = (hub / "chat_template.jinja").read_text()
    (hub / "chat_template.jinja").unlink()
    tokenizer = json.loads((hub / "tokenizer_config.json").read_text())
    (hub / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": template}))
    settings = json.loads((hub / "processor_config.json").read_text())
    (hub / "preprocessor_config.json").write_text(json.dumps(settings.pop("feature_extractor")))
    (hub / "processor_config.json").unlink()
    loaded, own = load_model(str(hub), torch.float32)
    assert loaded.generation_config.top_k == 20 and loaded.generation_config.repetition_penalty == 1.1
    inputs, plain = inputs_of(own, examples[:2]), inputs_of(processor, examples[:2])
    assert all(torch.equal(inputs[name], plain[name]) for name in plain)
    ids, mask = random_completions([[3, 2], [4, 1]])
    one, two = (shared_prompt_logps(m.eval(), inputs, ids, mask, 1.0) for m in (model, loaded))
    assert torch.equal(one, two)
    assert torch.equal(sample(model, inputs, [0], 8)[0], sample(loaded, inputs, [0], 8)[0])


# ---------------------------------------------------------------- log-probs


def prompt_alone(inputs, b):
    """One prompt of a batch, which then has no padding."""
    alone = select_rows(inputs, slice(b, b + 1))
    assert alone["attention_mask"].all()
    return alone


def plain_logps(model, inputs, ids, mask, temperature):
    """`repeated_logps` for one prompt at a time, so that no prompt is padded."""
    rows = []
    for b in range(len(ids)):
        alone = prompt_alone(inputs, b)
        rows.append(repeated_logps(model, alone, ids[b : b + 1], mask[b : b + 1], temperature))
    return torch.cat(rows)


def test_the_plain_way_is_the_models_own_forward(toy_model, examples):
    """Against a row without any padding and without position ids, which is as plain as it gets."""
    model, processor = toy_model
    inputs = inputs_of(processor, examples[4:5])
    ids, mask = random_completions([[3, 7]])
    logps = repeated_logps(model, inputs, ids, mask, 0.7)
    for g, length in enumerate((3, 7)):
        tokens = ids[0, g, :length]
        row = torch.cat([inputs["input_ids"], tokens[None]], 1)
        logits = model(**inputs | {"input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0]
        own = (logits[-length - 1 : -1] / 0.7).log_softmax(-1)[range(length), tokens]
        assert torch.allclose(logps[0, g, :length], own, atol=1e-5) and not logps[0, g, length:].any()


@pytest.mark.parametrize("lengths", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shared_prompt_logps_equal_the_repeated_forward(toy_model, examples, lengths, temperature):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[4 : 4 + len(lengths)])  # the first two are shorter than the window
    assert not inputs["feature_attention_mask"][0].all()
    assert len(lengths) < 3 or not inputs["attention_mask"].all()  # three prompts: some are padded
    ids, mask = random_completions(lengths)
    shared = shared_prompt_logps(model, inputs, ids, mask, temperature)
    assert (shared[~mask] == 0).all() and (shared[mask] < 0).all()
    assert torch.allclose(shared, plain_logps(model, inputs, ids, mask, temperature), atol=1e-5)
    assert torch.allclose(shared, repeated_logps(model, inputs, ids, mask, temperature), atol=1e-5)


@pytest.mark.parametrize("lengths", GROUPS.values(), ids=GROUPS)
def test_shared_prompt_gradients_equal_the_repeated_forward(toy_model, examples, lengths):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[4 : 4 + len(lengths)])
    ids, mask = random_completions(lengths)
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))

    def gradients(logps):
        model.zero_grad()
        (logps * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    shared = gradients(shared_prompt_logps(model, inputs, ids, mask, 1.0))
    plain = gradients(plain_logps(model, inputs, ids, mask, 1.0))
    assert shared.keys() == plain.keys() and any("audio_tower" in name for name in shared)
    for name, grad in plain.items():
        assert torch.allclose(shared[name], grad, rtol=1e-4, atol=1e-5 * max(1, grad.abs().max())), name


def test_a_placeholder_in_a_completion_is_a_plain_token(toy_model, examples):
    """Two tokens with the same embedding and the same row of the head are the same to the model."""
    model, processor = toy_model
    placeholder, twin = model.config.audio_token_id, 11
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.lm_head.weight):
            table[placeholder] = table[twin]
    inputs = inputs_of(processor, examples[4:6])
    ids, mask = random_completions([[4, 5], [3, 6]])
    ids[0, 1, 2] = ids[1, 0, 0] = twin
    expected = repeated_logps(model, inputs, ids, mask, 1.0)
    ids[0, 1, 2] = ids[1, 0, 0] = placeholder
    assert torch.allclose(shared_prompt_logps(model, inputs, ids, mask, 1.0), expected, atol=1e-5)


def test_padding_and_batch_do_not_matter(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[4:7])
    ids, mask = random_completions(GROUPS["several prompts"])
    together = shared_prompt_logps(model, inputs, ids, mask, 1.0)
    for b in range(3):
        rows = slice(b, b + 1)
        alone = shared_prompt_logps(model, prompt_alone(inputs, b), ids[rows], mask[rows], 1.0)
        assert torch.allclose(alone, together[rows], atol=1e-5)


def test_the_policy_hears_the_audio(toy_model, examples):
    model, processor = toy_model
    inputs, other = inputs_of(processor, examples[:1]), inputs_of(processor, examples[1:2])
    ids, mask = random_completions([[4]])
    logps = shared_prompt_logps(model, inputs, ids, mask, 1.0)
    of_other_audio = inputs | {"input_features": other["input_features"]}
    assert (logps - shared_prompt_logps(model, of_other_audio, ids, mask, 1.0)).abs().max() > 1e-3


def test_the_policy_returns_log_probs_and_entropies(toy_model, examples):
    """Against a plain softmax of the model's own forward, gradients included."""
    model, processor = toy_model
    inputs = inputs_of(processor, examples[4:6])
    ids, mask = random_completions([[3, 7], [5, 2]])
    logps, entropy = Policy(model, 0.7)(inputs, ids, mask)
    assert torch.equal(logps, shared_prompt_logps(model, inputs, ids, mask, 0.7))
    assert not entropy[~mask].any()
    expected = torch.zeros_like(entropy)
    for b, g in np.ndindex(2, 2):
        alone, tokens = prompt_alone(inputs, b), ids[b, g][mask[b, g]]
        row = torch.cat([alone["input_ids"], tokens[None]], 1)
        logits = model(**alone | {"input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0]
        p = torch.softmax(logits[-len(tokens) - 1 : -1] / 0.7, -1)
        expected[b, g, : len(tokens)] = -(p * p.log()).sum(-1)
    assert torch.allclose(entropy, expected, atol=1e-5) and entropy[mask].min() > 1
    gradients = []
    for total in (entropy.sum(), expected.sum()):
        gradients.append(torch.autograd.grad(total, model.lm_head.weight)[0])
    assert torch.allclose(*gradients, atol=1e-4) and gradients[0].abs().max() > 1e-3


def test_policy_scores_at_its_temperature(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:1])
    ids, mask = random_completions([[3, 2]])
    logps, _ = Policy(model, 0.5)(inputs, ids, mask)
    assert torch.equal(logps, shared_prompt_logps(model, inputs, ids, mask, 0.5))


@pytest.mark.parametrize("frames", [[199], [200], [150, 61], [60, 61, 62, 63], [5, 12]], ids=str)
def test_the_encoder_skips_silent_padding_without_changing_its_output(toy_model, frames):
    model, _ = toy_model
    tower, audible = model.model.audio_tower, torch.tensor(frames)
    features = torch.randn(len(frames), 64, 200, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": features}
    inputs["feature_attention_mask"] = (torch.arange(200) < audible[:, None]).long()
    convolved, pooled = tower._get_feat_extract_output_lengths(audible)
    mask = torch.arange(100) < convolved[:, None]
    whole = tower(features, attention_mask=mask[:, None, None]).last_hidden_state  # the whole window
    ours = encode_audio(model, inputs)
    assert ours.shape[1] == max(pooled)
    for b, n in enumerate(pooled):
        assert n > 0 and torch.allclose(ours[b, :n], whole[b, :n], atol=1e-5)


# ---------------------------------------------------------------- sampling


def uniform(*shape):
    return 1 - torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_the_cache_has_the_type_that_attention_computes_in(toy_model, examples, monkeypatch):
    """Under bf16 transformers' own cache would be fp32 and twice the size, with the same samples."""
    model, processor = toy_model
    inputs = inputs_of(processor, examples[3:7])
    noise, caches, ids = uniform(4, 3, 6), [], []
    for kind in (model_module.SamplingCache, model_module.DynamicCache):

        def make_cache(config, kind=kind):
            caches.append(kind(config=config))
            return caches[-1]

        monkeypatch.setattr(model_module, "SamplingCache", make_cache)
        with torch.autocast("cpu", torch.bfloat16):
            ids.append(sample(model, inputs, [0], 6, 1.0, noise)[0])
    assert [cache.layers[0].keys.dtype for cache in caches] == [torch.bfloat16, torch.float32]
    assert caches[0].layers[1].values.dtype == torch.bfloat16 and torch.equal(*ids)
    (B, G, T), P = ids[0].shape, inputs["input_ids"].shape[1]
    assert caches[0].layers[0].keys.shape[::2] == (B, P + G * (T - 1))  # the prompt once, not G times


def test_first_tokens_follow_the_softmax(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:1])
    N, T = 20_000, 0.5
    ids, _ = sample(model, inputs, [0], 1, T, uniform(1, N, 1))
    p = torch.softmax(model(**inputs).logits[0, -1] / T, -1)
    frequencies = torch.bincount(ids.flatten(), minlength=len(p)) / N
    assert p.max() > 3 / len(p)  # a distribution with something to get wrong
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / N).sqrt() + 1e-9).all()


def test_draw_inverts_the_cumulative_probability():
    logits = torch.log(torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]]))
    u = torch.tensor([1e-8, 0.2, 0.26, 0.74, 0.76, 1.0])
    assert draw(logits.expand(6, -1), u, 1.0).tolist() == [1, 1, 2, 2, 4, 4]  # never a token of probability 0
    cold = draw(logits.expand(6, -1), u, 0.5)  # 1/6, 4/6, 1/6
    assert cold.tolist() == [1, 2, 2, 2, 2, 4]


def test_the_policy_that_samples_is_the_policy_that_is_scored(toy_model, examples):
    """Each token is what its uniform number picks from the plain model's distribution."""
    model, processor = toy_model
    inputs = inputs_of(processor, examples[4:7])
    assert not inputs["attention_mask"].all()
    noise = uniform(3, 2, 6)
    ids, mask = sample(model, inputs, [0], 6, 0.8, noise)
    for b, g in np.ndindex(3, 2):
        alone = prompt_alone(inputs, b)
        tokens = ids[b, g][mask[b, g]]
        for t, token in enumerate(tokens):
            row = torch.cat([alone["input_ids"], tokens[None, :t]], 1)
            logits = model(**alone | {"input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0, -1]
            p = torch.softmax(logits.double() / 0.8, -1)
            high = p.cumsum(-1)[token]
            assert high - p[token] - 1e-5 <= noise[b, g, t] <= high + 1e-5


def test_greedy_equals_the_models_own_generate(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[3:7])
    assert not inputs["attention_mask"].all()
    ids, _ = sample(model, inputs, [0], 12)
    plain = dict(do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0)
    theirs = model.generate(**inputs, max_new_tokens=12, eos_token_id=[0], pad_token_id=0, **plain)
    assert len(ids.unique()) > 3  # not the same token over and over
    assert torch.equal(ids[:, 0], theirs[:, inputs["input_ids"].shape[1] :])


def test_a_completion_ends_at_its_first_eos_whichever_it_is(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:2])
    eos = list(range(0, 600, 20))
    ids, mask = sample(model, inputs, eos, 30, 1.0, uniform(2, 8, 30))
    lengths = set()
    for o, m in zip(ids.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist()):
        ends = [t for t, token in enumerate(o) if token in eos]
        length = ends[0] + 1 if ends else len(o)
        assert m == [t < length for t in range(len(o))]
        lengths.add(length)
    assert len(lengths) > 3
    texts = decode(processor, eos, ids, mask)
    tokens = [t for t in ids[0, 0][mask[0, 0]].tolist() if t not in eos]
    assert texts[0][0] == processor.tokenizer.decode(tokens)


def test_sampling_stops_when_all_have_ended(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:1])
    ids, mask = sample(model, inputs, list(range(len(processor.tokenizer))), 30)
    assert ids.shape == (1, 1, 1) and mask.all()


def test_every_eos_of_the_generation_config_counts(toy_model):
    model, processor = toy_model
    names = processor.tokenizer.convert_ids_to_tokens(eos_tokens(model, processor))
    assert set(names) == {"<|endoftext|>", "<|im_end|>"}


def test_logits_that_are_nan_are_refused(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[4:7])
    inputs["input_features"][1] = torch.nan
    for noise in (None, uniform(3, 2, 4)):
        with pytest.raises(BadInput, match="nan or inf for prompt 2 of 3 in the batch"):
            sample(model, inputs, [0], 4, 1.0, noise)


def test_placeholders_and_audio_must_match(toy_model, examples):
    model, processor = toy_model
    inputs = inputs_of(processor, examples[:2])
    place = (inputs["input_ids"][0] == model.config.audio_token_id).nonzero()[0]
    inputs["input_ids"][0, place] = 7
    with pytest.raises(BadInput, match="audio placeholders for"):
        embed_prompt(model, inputs)


@pytest.mark.parametrize("eos", [None, 0], ids=["none", "another"])
def test_the_end_of_a_turn_ends_a_completion(folder, toy_model, tmp_path, eos):
    """Whatever generation_config.json says, even if there is none: SFT teaches it at the end of an answer."""
    model, processor = toy_model
    model.generation_config.eos_token_id = eos
    processor.tokenizer.eos_token = "<|endoftext|>"
    im_end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(processor) == im_end and im_end in eos_tokens(model, processor)
    template = processor.chat_template
    processor.chat_template = template.replace("<|im_end|>", "<|audio_eos|>")
    assert end_of_turn(processor) == processor.tokenizer.convert_tokens_to_ids("<|audio_eos|>")
    processor.chat_template = template.replace("<|im_end|>", " END ")
    assert end_of_turn(processor) == processor.tokenizer.eos_token_id


def test_a_tokenizer_without_a_pad_token_is_given_one(folder, tmp_path, examples):
    shutil.copytree(folder / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    _, processor = load_model(str(tmp_path / "model"))
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token
    assert not inputs_of(processor, examples[:4])["attention_mask"].all()


def test_noise_belongs_to_the_prompt():
    together = sampling_noise(42, 5, 4, 3, 7)
    assert together.shape == (4, 3, 7) and 0 < together.min() and together.max() <= 1
    assert torch.equal(together[2:], sampling_noise(42, 7, 2, 3, 7))
    assert len(torch.unique(together)) == together.numel()
    assert not torch.equal(together, sampling_noise(43, 5, 4, 3, 7))


# ---------------------------------------------------------------- for a GPU


def test_cudnn_attention_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    "own", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}]
)
def test_segments_are_expandable_unless_the_user_says_otherwise(own):
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    code = f"import os, model; print([os.environ.get(name) for name in {names}])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=clean | own, capture_output=True, text=True, check=True)
    expected = own or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert done.stdout.strip() == str([expected.get(name) for name in names])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 5000, 9999])
def test_one_bad_weight_is_found_wherever_it_is(dtype, value, place):
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    others = {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.0), "count": torch.tensor([7])}
    check_finite([*others.items(), ("layer", weight), ("transposed", weight.T)])
    weight.view(-1)[place] = value
    with pytest.raises(BadInput, match="^layer has values that are nan or inf$"):
        check_finite([*others.items(), ("layer", weight)])


@pytest.mark.parametrize("keys", [1, 7, 8, 13])
def test_masks_have_attentions_type_and_aligned_rows(keys):
    visible = torch.rand(2, 3, keys) > 0.5
    for dtype, context in (
        (torch.float32, nullcontext()),
        (torch.bfloat16, torch.autocast("cpu", torch.bfloat16)),
    ):
        with context:
            mask = additive_mask(visible, torch.zeros(1))
        assert mask.dtype == dtype and mask.shape == (2, 1, 3, keys) and mask.stride()[2] % 8 == 0
        assert torch.equal(mask[:, 0] == 0, visible) and torch.equal(mask[:, 0] == -torch.inf, ~visible)


def test_every_mask_of_sampling_and_scoring_is_made_once_and_additive(toy_model, examples, monkeypatch):
    model, processor = toy_model
    inputs, made, masks = inputs_of(processor, examples[4:6]), [], []
    monkeypatch.setattr(model_module, "additive_mask", lambda *args: made.append(1) or additive_mask(*args))
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **more):
        if attn_mask is not None and args[0].shape[-1] == 32 and attn_mask.shape[1] == 1:
            masks.append(attn_mask.dtype)
        return attention(*args, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    shared_prompt_logps(model, inputs, *random_completions([[3, 2], [4, 1]]), 1.0)
    assert len(made) == 1 and torch.float32 in masks
    sample(model, inputs, [0], 5, 1.0, uniform(2, 3, 5))
    assert len(made) == 2  # one for all decoding steps
