"""What sharing the prompt is worth: scoring and update, shared against repeated, same weights and completions.

    python tests/benchmark.py        # a small Qwen2-Audio on a CPU, about two minutes

The model is scaled down so that its cost is split between encoder, prompt and completions as at full size: a window of 30 s
(3000 frames), a 10 s clip (250 audio tokens), about 60 tokens of text, G completions of 10 to 16 tokens. "Repeated" is
upstream's way: prompt and audio G times, padded, full-vocabulary logits of every position.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))

from train_grpo import sample, shared_prompt_logps  # noqa: E402

G, AUDIO_TOKENS, TEXT_TOKENS, VOCABULARY, PLACEHOLDER = 8, 250, 60, 8_000, 5


def small_model():
    audio = Qwen2AudioEncoderConfig(num_mel_bins=128, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=1024, d_model=256)
    text = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=6, num_key_value_heads=6,
    )  # fmt: skip
    return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=PLACEHOLDER))


def repeated_logps(model, inputs, ids, mask):
    """Log-probs (B, G, T) with everything repeated G times, as upstream."""
    (B, G, T), P = ids.shape, inputs["input_ids"].shape[1]
    inputs = {name: value.repeat_interleave(G, 0) for name, value in inputs.items()}
    row = torch.cat([inputs["input_ids"], ids.flatten(0, 1)], 1)
    seen = torch.cat([inputs["attention_mask"], mask.flatten(0, 1).long()], 1)
    logits = model(**inputs | {"input_ids": row, "attention_mask": seen}).logits[:, P - 1 : -1]
    logp = torch.log_softmax(logits, -1).gather(2, row[:, P:, None])[..., 0]
    return (logp * mask.flatten(0, 1)).view(B, G, T)


def kept_bytes(run):
    """Bytes that autograd keeps for the backward pass, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main():
    torch.manual_seed(0)
    model = small_model()
    prompt = torch.randint(10, VOCABULARY, (1, AUDIO_TOKENS + TEXT_TOKENS))
    prompt[:, 20 : 20 + AUDIO_TOKENS] = PLACEHOLDER
    heard = (torch.arange(3000) < 1000).long()[None]  # 1000 frames, halved twice: 250 tokens
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    inputs |= {"input_features": torch.randn(1, 128, 3000), "feature_attention_mask": heard}
    ids = torch.randint(10, VOCABULARY, (1, G, 16))
    mask = torch.arange(16) < torch.randint(10, 17, (1, G, 1))
    noise = torch.rand(1, G, 1)
    repeated = {name: value.repeat_interleave(G, 0) for name, value in inputs.items()}

    def shared(model, inputs, ids, mask):
        return shared_prompt_logps(model, inputs, ids, mask, 1.0)

    with torch.no_grad():
        gap = (shared(model, inputs, ids, mask) - repeated_logps(model, inputs, ids, mask)).abs().max()
    assert gap < 1e-4, gap  # the same numbers, or the comparison means nothing
    ways = {"shared": (shared, inputs, noise), "repeated": (repeated_logps, repeated, noise.transpose(0, 1))}

    def score(way):
        with torch.no_grad():
            ways[way][0](model, inputs, ids, mask)

    def update(way):
        model.zero_grad()
        ways[way][0](model, inputs, ids, mask).sum().backward()

    def first_token(way):
        sample(model, ways[way][1], [0], 1, 1.0, ways[way][2])

    print(f"G {G}, 10 s clip, {prompt.shape[1]} prompt tokens, 10 to 16 completion tokens; medians of 5")
    print(f"{'':<24}{'shared':>10}{'repeated':>10}{'ratio':>8}")
    for name, run in (("first token", first_token), ("score", score), ("update", update)):
        times = {way: [] for way in ways}
        for _ in range(6):  # in turn, so that a noisy neighbour disturbs both; the first is warm-up
            for way in ways:
                times[way].append(seconds(lambda: run(way)))
        fast, slow = (statistics.median(times[way][1:]) for way in ways)
        print(f"{name + ', seconds':<24}{fast:>10.3f}{slow:>10.3f}{slow / fast:>8.1f}")
    fast, slow = (kept_bytes(lambda: ways[way][0](model, inputs, ids, mask)) / 2**20 for way in ways)
    print(f"{'kept for backward, MiB':<24}{fast:>10.0f}{slow:>10.0f}{slow / fast:>8.1f}")


if __name__ == "__main__":
    main()
