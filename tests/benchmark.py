"""What sharing the prompt is worth, and where the time goes: shared against repeated on the same weights and completions.

    python tests/benchmark.py                                # a small Qwen2-Audio on a CPU, a quarter of an hour on two cores
    python tests/benchmark.py --size 7b --json 7b.json       # the real configuration, random weights, bf16, on a CUDA GPU

"Repeated" is upstream's way: prompt and audio G times through the encoder and the language model (`generate` with
num_return_sequences), padded rows, full-vocabulary logits of every position. The small model is scaled down so that its
cost is split between encoder, prompt and completions as at full size; the first line says how.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import take  # noqa: E402
from model import add_lora, encode_audio  # noqa: E402
from train_grpo import group_advantages, grpo_loss, now, sample, shared_prompt_logps  # noqa: E402

TEXT_TOKENS, PLACEHOLDER = 60, 5
SETTINGS = [(8, 10, (10, 16)), (16, 10, (10, 16)), (8, 30, (10, 16)), (8, 10, (64, 128))]  # G, seconds of sound, tokens


def make_model(size: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Random weights: the real configuration, or one of its proportions."""
    if size == "7b":
        audio, vocabulary = Qwen2AudioEncoderConfig(), 156_032
        lm = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    else:
        audio, vocabulary = Qwen2AudioEncoderConfig(encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=1024, d_model=256), 8_000
        lm = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
    text = Qwen2Config(vocab_size=vocabulary, num_key_value_heads=lm["num_attention_heads"], **lm)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=PLACEHOLDER))
    return model.to(dtype).eval()


def make_group(model, B: int, G: int, clip_seconds: int, completion_tokens: tuple[int, int]):
    """Model inputs for B prompts, completions of so many tokens and their mask (B, G, T)."""
    vocabulary, mels = model.config.text_config.vocab_size, model.config.audio_config.num_mel_bins
    window, audio_tokens = 2 * model.config.audio_config.max_source_positions, 25 * clip_seconds  # 100 frames a second, halved twice
    prompt = torch.randint(10, vocabulary, (B, audio_tokens + TEXT_TOKENS))
    prompt[:, 20 : 20 + audio_tokens] = PLACEHOLDER
    heard = (torch.arange(window) < 100 * clip_seconds).long().expand(B, -1)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    inputs |= {"input_features": torch.randn(B, mels, window), "feature_attention_mask": heard}
    least, most = completion_tokens
    ids = torch.randint(10, vocabulary, (B, G, most))
    mask = torch.arange(most) < torch.randint(least, most + 1, (B, G, 1))
    mask[0, 0] = True
    return {name: value.to(model.device) for name, value in inputs.items()}, ids.to(model.device), mask.to(model.device)


# --------------------------------------------------------------------------------------------------- the two ways


def shared_logps(model, inputs, ids, mask):
    return shared_prompt_logps(model, inputs, ids, mask, 1.0)


def repeated_logps(model, inputs, ids, mask):
    """Log-probs (B, G, T) with everything repeated G times, as upstream."""
    (B, G, T), P = ids.shape, inputs["input_ids"].shape[1]
    inputs = {name: value.repeat_interleave(G, 0) for name, value in inputs.items()}
    row = torch.cat([inputs["input_ids"], ids.flatten(0, 1)], 1)
    seen = torch.cat([inputs["attention_mask"], mask.flatten(0, 1).long()], 1)
    logits = model(**inputs | {"input_ids": row, "attention_mask": seen}).logits[:, P - 1 : -1].float()
    logp = torch.log_softmax(logits, -1).gather(2, row[:, P:, None])[..., 0]
    return (logp * mask.flatten(0, 1)).view(B, G, T)


def shared_sample(model, inputs, G: int, T: int):
    sample(model, inputs, [-1], T, 1.0, torch.rand(1, G, T, device=model.device))


def repeated_sample(model, inputs, G: int, T: int):
    model.generate(
        **inputs, num_return_sequences=G, max_new_tokens=T, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0
    )


# ----------------------------------------------------------------------------------------------------- measuring


def seconds(run) -> float:
    began = now()
    run()
    return now() - began


def memory(model, run) -> int:
    """Bytes for the backward pass: peak allocated on a GPU, elsewhere what autograd keeps, each storage once."""
    if model.device.type == "cuda":
        model.zero_grad(set_to_none=False)  # gradients are there before and after
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run().sum().backward()
        return torch.cuda.max_memory_allocated() - before
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for place, size in kept.items() if place not in weights)


def compare(model, G: int, clip_seconds: int, completion_tokens: tuple[int, int], repeats: int = 3) -> dict:
    """Seconds and MiB of both ways, and their ratios, medians over paired repeats."""
    inputs, ids, mask = make_group(model, 1, G, clip_seconds, completion_tokens)
    with torch.no_grad():
        gap = (shared_logps(model, inputs, ids, mask) - repeated_logps(model, inputs, ids, mask)).abs()
    assert gap.max() < 1e-4 if model.dtype == torch.float32 else gap.mean() < 0.05, gap  # else the comparison means nothing
    ways = {"shared": (shared_sample, shared_logps), "repeated": (repeated_sample, repeated_logps)}

    def score(way):
        with torch.no_grad():
            ways[way][1](model, inputs, ids, mask)

    def update(way):
        model.zero_grad()
        ways[way][1](model, inputs, ids, mask).sum().backward()

    runs = {
        "prefill": lambda way: ways[way][0](model, inputs, G, 1),  # to the first token
        "sample": lambda way: ways[way][0](model, inputs, G, completion_tokens[1]),
        "score": score,
        "update": update,
    }
    found = {"group_size": G, "clip_seconds": clip_seconds, "prompt_tokens": inputs["input_ids"].shape[1]}
    found |= {"completion_tokens": list(completion_tokens), "repeats": repeats, "seconds": {}, "ratio": {}}
    for name, run in runs.items():
        times = []
        for _ in range(repeats + 1):  # in turn, so that a noisy neighbour disturbs both; the first is warm-up
            times.append({way: seconds(lambda: run(way)) for way in ways})
        found["seconds"][name] = {way: statistics.median(pair[way] for pair in times[1:]) for way in ways}
        found["ratio"][name] = statistics.median(pair["repeated"] / pair["shared"] for pair in times[1:])
    found["MiB"] = {way: memory(model, lambda: ways[way][1](model, inputs, ids, mask)) / 2**20 for way in ways}
    found["ratio"]["memory"] = found["MiB"]["repeated"] / found["MiB"]["shared"]
    model.zero_grad()
    return found


def update_seconds(model, G: int, completion_tokens: tuple[int, int], repeats: int = 3) -> float:
    """Shared forward and backward of one group with a 10 s clip."""
    inputs, ids, mask = make_group(model, 1, G, 10, completion_tokens)

    def update():
        model.zero_grad()
        shared_logps(model, inputs, ids, mask).sum().backward()

    return statistics.median([seconds(update) for _ in range(repeats + 1)][1:])


def whole_step(model, micro_batch: int, B: int = 16) -> dict:
    """Seconds of a step of the paper's recipe, B prompts x 8 with LoRA, 10 s clips and 16 tokens each: the second of two."""
    G, T = 8, 16
    lora = SimpleNamespace(lora_rank=16, lora_alpha=32, lora_dropout=0.0, lora_target="language", seed=0)
    adapters = add_lora(model.requires_grad_(False), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    inputs, *_ = make_group(model, B, G, 10, (T, T))
    micro_batches = [slice(i, i + micro_batch) for i in range(0, B, micro_batch)]
    for _ in range(2):
        clock = [now()]
        encoded = inputs | {"encoded_audio": encode_audio(model, inputs)}
        ids, mask = sample(model, encoded, [-1], T, 1.0, torch.rand(B, G, T, device=model.device))
        clock.append(now())
        with torch.no_grad(), adapters.disable_adapter():
            ref_logp = [shared_logps(model, take(encoded, rows), ids[rows], mask[rows]) for rows in micro_batches]
        clock.append(now())
        A = group_advantages(torch.rand(B, G, device=model.device))
        for rows, reference in zip(micro_batches, ref_logp):
            logp = shared_logps(model, take(encoded, rows), ids[rows], mask[rows])
            loss, *_ = grpo_loss(logp, logp.detach(), reference, A[rows], mask[rows], 0.2, 0.04)
            (loss / len(micro_batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.append(now())
    names = ("sample", "score", "update")
    return {name: after - before for name, before, after in zip(names, clock, clock[1:])} | {"micro_batch": micro_batch}


# --------------------------------------------------------------------------------------------------- arithmetic


def needed_flops(model, G: int, clip_seconds: int, tokens: float, frames: int | None = None) -> dict[str, float]:
    """Floating-point operations of one shared forward pass over a group, by part; tokens: of a completion, on average."""
    config = model.config
    frames = frames or 50 * clip_seconds
    P, N = 25 * clip_seconds + TEXT_TOKENS, G * tokens

    def matrices(layers):
        return sum(p.numel() for p in layers.parameters() if p.dim() == 2)

    lm, encoder = model.model.language_model.layers, model.model.audio_tower.layers
    pairs = 4 * config.text_config.hidden_size * len(lm)  # two products of queries with keys and of weights with values
    return {
        "encoder": 2 * matrices(encoder) * frames + 4 * frames**2 * config.audio_config.d_model * len(encoder),
        "prompt": 2 * matrices(lm) * P + pairs * P**2 / 2,
        "completions": 2 * (matrices(lm) + model.lm_head.weight.numel()) * N + pairs * N * (P + tokens / 2),
    }


def matrix_rate(device, dtype) -> float:
    """Floating-point operations a second in one large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / statistics.median([seconds(lambda: a @ b) for _ in range(12)][2:])


# ------------------------------------------------------------------------------------------------------- the tables


def show(found: list[dict]) -> None:
    print("\n| G | clip | completion | | shared | repeated | ratio |\n| --- | --- | --- | --- | --- | --- | --- |")
    for row in found:
        place = f"{row['group_size']} | {row['clip_seconds']} s | {row['completion_tokens'][0]} to {row['completion_tokens'][1]} tokens"
        for name, pair in row["seconds"].items():
            print(f"| {place} | {name} | {pair['shared']:.3f} s | {pair['repeated']:.3f} s | {row['ratio'][name]:.1f} |")
        print(f"| {place} | memory | {row['MiB']['shared']:.0f} MiB | {row['MiB']['repeated']:.0f} MiB | {row['ratio']['memory']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "7b"], default="small", help="7b needs a CUDA GPU of 141 GB")
    parser.add_argument("--json", default="", help="also write the numbers to this file")
    parser.add_argument("--micro_batch", type=int, default=4, help="prompts in one forward of the whole step")
    args = parser.parse_args()
    if args.size == "7b" and not torch.cuda.is_available():
        sys.exit("error: --size 7b needs a CUDA GPU, and none is there")
    model = make_model("7b", "cuda", torch.bfloat16) if args.size == "7b" else make_model("small")
    device = torch.cuda.get_device_name() if args.size == "7b" else f"CPU, {torch.get_num_threads()} threads"
    split = needed_flops(model, 8, 10, 13, frames=1500)  # with the whole window, as the model's own forward
    split = ", ".join(f"{part} {flops / sum(split.values()):.0%}" for part, flops in split.items())
    print(f"{args.size} on {device}, torch {torch.__version__}, transformers {transformers.__version__}; one shared pass: {split}")

    found = {"size": args.size, "device": device, "settings": []}
    for setting in SETTINGS:
        found["settings"].append(compare(model, *setting))
    show(found["settings"])

    found["update_by_group_size"] = {G: update_seconds(model, G, (10, 16)) for G in (1, 2, 4, 8, 16, 32, 64)}
    found["update_by_completion_tokens"] = {T: update_seconds(model, 8, (T, T)) for T in (8, 16, 32, 64, 128, 256, 512)}
    for title, table in (("G", found["update_by_group_size"]), ("tokens of each of 8", found["update_by_completion_tokens"])):
        print(f"\n| {title} | {' | '.join(map(str, table))} |\n|{' --- |' * (len(table) + 1)}")
        print(f"| update, s | {' | '.join(f'{value:.3f}' for value in table.values())} |")

    rate, flops = matrix_rate(model.device, model.dtype), 3 * sum(needed_flops(model, 8, 10, 13).values())  # backward is twice forward
    found["matrix_tflops"], found["update_tflop"] = rate / 1e12, flops / 1e12
    found["update_share"] = flops / found["settings"][0]["seconds"]["update"]["shared"] / rate
    print(f"\nupdate: {flops / 1e12:.3g} TFLOP at {found['update_share']:.0%} of the {rate / 1e12:.3g} TFLOP/s of a large matrix product")

    found["step"] = whole_step(model, args.micro_batch)
    step = {name: found["step"][name] for name in ("sample", "score", "update")}
    parts = ", ".join(f"{name} {value:.2f}" for name, value in step.items())
    print(f"\na whole step, 16 prompts x 8 with LoRA, micro_batch {args.micro_batch}: {sum(step.values()):.2f} s ({parts})")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
