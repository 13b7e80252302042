"""What sharing the prompt is worth, and where the time goes: shared against repeated, the same tokens.

    python tests/benchmark.py                             # a small Qwen2-Audio on a CPU, five minutes
    python tests/benchmark.py --growth                    # and how an update grows: 15 GB, ten minutes more
    python tests/benchmark.py --size 7b --json 7b.json    # the real configuration, random weights, bf16, GPU
    python tests/benchmark.py --arithmetic                # 1 to 64 GPUs, on paper

"Repeated" is upstream's way: prompt and audio G times through the encoder and the language model (`generate`
with num_return_sequences), padded rows, full-vocabulary logits of every position. The small model is scaled
down so that its cost is split between encoder, prompt and completions as at full size; the output says how.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
)
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import toy  # noqa: E402
from data import BadInput  # noqa: E402
from flags import parse, run_main  # noqa: E402
from model import repeated_logps, sample, shared_prompt_logps  # noqa: E402
from training import now  # noqa: E402

TEXT_TOKENS, PLACEHOLDER = 60, 5
# G, seconds of sound, tokens of a completion
SETTINGS = [(8, 10, (10, 16)), (4, 30, (10, 16)), (8, 10, (64, 128))]
GROWN = (16, 10, (10, 16))


def make_model(size: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Random weights: the real configuration, or one of its proportions."""
    if size == "7b":
        audio, vocabulary = Qwen2AudioEncoderConfig(), 156_032
        lm = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    else:
        audio, vocabulary = (
            Qwen2AudioEncoderConfig(
                encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=1024, d_model=256
            ),
            8_000,
        )
        lm = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
    text = Qwen2Config(vocab_size=vocabulary, num_key_value_heads=lm["num_attention_heads"], **lm)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2AudioForConditionalGeneration(
            Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=PLACEHOLDER)
        )
    return model.to(dtype).eval()


def make_group(model, B: int, G: int, clip_seconds: int, completion_tokens: tuple[int, int]):
    """Model inputs for B prompts, completions of so many tokens and their mask (B, G, T)."""
    vocabulary, mels = model.config.text_config.vocab_size, model.config.audio_config.num_mel_bins
    window, audio_tokens = (
        2 * model.config.audio_config.max_source_positions,
        25 * clip_seconds,
    )  # 100 frames a second, halved twice
    prompt = torch.randint(10, vocabulary, (B, audio_tokens + TEXT_TOKENS))
    prompt[:, 20 : 20 + audio_tokens] = PLACEHOLDER
    heard = (torch.arange(window) < 100 * clip_seconds).long().expand(B, -1)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    inputs |= {"input_features": torch.randn(B, mels, window), "feature_attention_mask": heard}
    least, most = completion_tokens
    ids = torch.randint(10, vocabulary, (B, G, most))
    mask = torch.arange(most) < torch.randint(least, most + 1, (B, G, 1))
    mask[0, 0] = True
    return (
        {name: value.to(model.device) for name, value in inputs.items()},
        ids.to(model.device),
        mask.to(model.device),
    )


# ---------------------------------------------------------------- the two ways


def shared_logps(model, inputs, ids, mask):
    return shared_prompt_logps(model, inputs, ids, mask, 1.0)


def plain_logps(model, inputs, ids, mask):
    return repeated_logps(model, inputs, ids, mask, 1.0)


def shared_sample(model, inputs, G: int, T: int):
    sample(model, inputs, [-1], T, 1.0, torch.rand(1, G, T, device=model.device))


def repeated_sample(model, inputs, G: int, T: int):
    model.generate(
        **inputs,
        num_return_sequences=G,
        max_new_tokens=T,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )


# ---------------------------------------------------------------- measuring


def seconds(run, *args) -> float:
    began = now()
    run(*args)
    return now() - began


def memory(model, logps, *args) -> int:
    """Bytes for the backward pass: peak allocated on a GPU, elsewhere what autograd keeps, each storage
    once.
    """
    if model.device.type == "cuda":
        model.zero_grad(set_to_none=False)  # gradients are there before and after
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps(model, *args).sum().backward()
        return torch.cuda.max_memory_allocated() - before
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps(model, *args)
    return sum(size for place, size in kept.items() if place not in weights)


def compare(model, G: int, clip_seconds: int, completion_tokens: tuple[int, int], repeats: int = 2) -> dict:
    """Seconds and MiB of both ways, and their ratios, medians over paired repeats."""
    inputs, ids, mask = make_group(model, 1, G, clip_seconds, completion_tokens)
    with torch.no_grad():
        gap = (shared_logps(model, inputs, ids, mask) - plain_logps(model, inputs, ids, mask)).abs()
    assert gap.max() < 1e-4 if model.dtype == torch.float32 else gap.mean() < 0.05, (
        gap
    )  # else the comparison means nothing
    ways = {"shared": (shared_sample, shared_logps), "repeated": (repeated_sample, plain_logps)}

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
            times.append({way: seconds(run, way) for way in ways})
        found["seconds"][name] = {way: statistics.median(pair[way] for pair in times[1:]) for way in ways}
        found["ratio"][name] = statistics.median(pair["repeated"] / pair["shared"] for pair in times[1:])
    found["MiB"] = {way: memory(model, logps, inputs, ids, mask) / 2**20 for way, (_, logps) in ways.items()}
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


def whole_step(model, micro_batch: int, prompts: int = 16, prompt="answer", tokens: int = 16) -> dict:
    """The third step of train_grpo.py, LoRA, 8 completions, 10 s clips: seconds by phase, peak GPU memory.

    Frees the model, which train_grpo.py loads from a folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        processor = toy.make_processor(model.config.audio_config.num_mel_bins, seconds=30)
        processor.save_pretrained(f"{folder}/model")
        model.config.audio_token_id = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
        model.save_pretrained(f"{folder}/model")
        precision = "bf16" if model.device.type == "cuda" else "no"
        model.to("meta")
        with open(f"{folder}/train.jsonl", "w") as file:
            for i in range(prompts):
                soundfile.write(
                    f"{folder}/{i}.wav", np.random.default_rng(i).uniform(-0.5, 0.5, 160_000), 16_000
                )
                row, _ = toy.make_question("source", np.random.default_rng(i))
                file.write(json.dumps(row | {"audio": f"{i}.wav"}) + "\n")
        flags = f"--model {folder}/model --data {folder}/train.jsonl --output {folder}/run"
        flags += " --lora_rank 16 --lr 1e-5"
        flags += f" --prompts_per_step {prompts} --micro_batch {micro_batch} --max_steps 3"
        flags += f" --prompt {prompt} --max_new_tokens {tokens}"
        command = [sys.executable, str(ROOT / "train_grpo.py"), *flags.split()]
        subprocess.run(command, env=os.environ | {"ACCELERATE_MIXED_PRECISION": precision}, check=True)
        step = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")][-1]
    phases = {name: step[f"seconds_{name}"] for name in ("sample", "score", "update", "other")}
    more = {"tokens": step["completion_tokens"], "memory_gb": step.get("memory_gb", 0.0)}
    return phases | more | {"micro_batch": micro_batch, "prompt": prompt}


def needed_flops(
    model, G: int, clip_seconds: int, tokens: float, frames: int | None = None
) -> dict[str, float]:
    """Floating-point operations of one shared forward pass over a group, by part; tokens: of a completion,
    on average.
    """
    config = model.config
    frames = frames or 50 * clip_seconds
    P, N = 25 * clip_seconds + TEXT_TOKENS, G * tokens

    def matrices(layers):
        return sum(p.numel() for p in layers.parameters() if p.dim() == 2)

    lm, encoder = model.model.language_model.layers, model.model.audio_tower.layers
    pairs = (
        4 * config.text_config.hidden_size * len(lm)
    )  # two products of queries with keys and of weights with values
    return {
        "encoder": 2 * matrices(encoder) * frames
        + 4 * frames**2 * config.audio_config.d_model * len(encoder),
        "prompt": 2 * matrices(lm) * P + pairs * P**2 / 2,
        "completions": 2 * (matrices(lm) + model.lm_head.weight.numel()) * N + pairs * N * (P + tokens / 2),
    }


def matrix_rate(device, dtype) -> float:
    """Floating-point operations a second in one large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / statistics.median([seconds(lambda: a @ b) for _ in range(12)][2:])


# ---------------------------------------------------------------- the tables


def show(found: list[dict]) -> None:
    print(
        "\n| G | clip | completion | | shared | repeated | ratio |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for row in found:
        least, most = row["completion_tokens"]
        setting = f"{row['group_size']} | {row['clip_seconds']} s | {least} to {most} tokens"
        for name, pair in row["seconds"].items():
            times = f"{pair['shared']:.3f} s | {pair['repeated']:.3f} s"
            print(f"| {setting} | {name} | {times} | {row['ratio'][name]:.1f} |")
        sizes = f"{row['MiB']['shared']:.0f} MiB | {row['MiB']['repeated']:.0f} MiB"
        print(f"| {setting} | memory | {sizes} | {row['ratio']['memory']:.1f} |")


def show_step(found: dict) -> None:
    phases = {name: found[name] for name in ("sample", "score", "update", "other")}
    parts = ", ".join(f"{name} {value:.2f}" for name, value in phases.items())
    setting = f"16 prompts x 8 with LoRA, {found['prompt']}, {found['tokens']:.0f} tokens each"
    memory = f", at most {found['memory_gb']:.1f} GB" if found["memory_gb"] else ""
    seconds = f"{sum(phases.values()):.2f} s ({parts})"
    print(f"\na whole step, {setting}, micro_batch {found['micro_batch']}: {seconds}{memory}")


def show_growth(model) -> dict:
    """How an update grows with the group and with the length of its completions."""
    lengths = (8, 16, 32, 64, 128, 256, 512)
    found = {
        "G, 10 to 16 tokens each": {G: update_seconds(model, G, (10, 16)) for G in (1, 2, 4, 8, 16, 32, 64)},
        "tokens each, G 8": {T: update_seconds(model, 8, (T, T)) for T in lengths},
    }
    for title, table in found.items():
        print(f"\n| {title} | {' | '.join(map(str, table))} |\n|{' --- |' * (len(table) + 1)}")
        print(f"| update, s | {' | '.join(f'{value:.2f}' for value in table.values())} |")
    return found


# ---------------------------------------------------------------- on paper

CARD = {"TFLOP/s": 989, "TB/s": 3.35, "GB/s within a node": 450, "GB/s between nodes": 50}  # H100 SXM, bf16
SHARE = 0.45  # of the card's matrix rate
METHODS = "LoRA, DDP", "all weights, FSDP2", "all weights, FSDP2 in a node, copies across"


def arithmetic(prompts: int = 16, G: int = 8, tokens: int = 13) -> list[tuple]:
    """Rows of (method, GPUs, seconds of compute, of decoding, bytes held, moved in the node, between nodes).

    Of a step and one GPU. Counted: operations (needed_flops; the encoder once under LoRA), weights read once
    for each token decoded, bytes held (see check_memory) and moved. Not: launches, activations, overlap.
    """
    model = make_model("7b", "meta")
    n, adapters = sum(p.numel() for p in model.parameters()), 40e6
    flops = needed_flops(model, G, 10, tokens)
    language = flops["prompt"] + flops["completions"]
    rows = []
    for gpus in (1, 8, 16, 64):
        own, nodes = max(1, prompts // gpus), max(1, gpus // 8)  # prompts of a GPU; past 16 GPUs more prompts
        decode = tokens * 2 * n / (CARD["TB/s"] * 1e12)
        for method in METHODS:
            if method.startswith("LoRA"):
                # prefill, reference, forward, and backward through activations only
                work = own * (flops["encoder"] + flops["prompt"] + 3 * language)
                held = 2 * n + 16 * adapters
                moved = 2 * 4 * adapters * (gpus > 1)
                across = moved * (nodes > 1)
            else:
                # prefill, reference, forward and backward
                work = own * (flops["encoder"] + flops["prompt"] + 4 * sum(flops.values()))
                shards = gpus if method.endswith("FSDP2") else min(gpus, 8)
                held = (16 + 2) * n / shards + 2 * n * (gpus > 1)  # and all in bf16 while it samples
                # gathered for sampling; for each prompt: reference, forward and backward, gradients
                whole = (2 * n + own * (3 * 2 * n + 4 * n)) * (shards > 1)
                copies = 2 * 4 * n / shards * (method.endswith("across") and nodes > 1)
                moved = whole
                across = whole if nodes > 1 and shards > 8 else copies
            rows.append((method, gpus, work / (SHARE * CARD["TFLOP/s"] * 1e12), decode, held, moved, across))
    return rows


def show_arithmetic() -> None:
    card = ", ".join(f"{value} {name}" for name, value in CARD.items())
    print(f"by arithmetic, not measured: {card}; {SHARE:.0%} of the matrix rate; one GPU's part of a step of")
    print("16 prompts x 8, 10 s clips, 13 tokens; past 16 GPUs, of as many prompts as GPUs\n")
    print("| | GPUs | compute, s | decoding, s | held, GB | moved in the node | between nodes | bound by |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for method, gpus, compute, decode, held, moved, across in arithmetic():
        seconds = {
            "compute": compute,
            "decoding": decode,
            "the node's links": moved / CARD["GB/s within a node"] / 1e9,
            "links between nodes": across / CARD["GB/s between nodes"] / 1e9,
        }
        sizes = " | ".join(f"{size / 1e9:.1f}" for size in (held, moved, across))
        slowest = max(seconds, key=seconds.get)
        row = f"{method} | {gpus} | {compute:.2f} | {decode:.2f} | {sizes}"
        print(f"| {row} | {slowest}, {seconds[slowest]:.2f} s |")


@dataclass
class Config:
    size: str = HfArg(default="small", help="small, or 7b: the real configuration, on a GPU")
    growth: bool = HfArg(default=False, help="also how an update grows: 15 GB, ten minutes")
    arithmetic: bool = HfArg(default=False, help="only print what 1 to 64 GPUs would take, on paper")
    json: str = HfArg(default="", help="also write the numbers to this file")
    micro_batch: int = HfArg(default=4, help="prompts in one forward of the whole step")


def main() -> None:
    config = parse(Config, __doc__)
    if config.arithmetic:
        return show_arithmetic()
    real = config.size == "7b"
    if real and not torch.cuda.is_available():
        raise BadInput("--size 7b needs a CUDA GPU, and none is there")
    model = make_model("7b", "cuda", torch.bfloat16) if real else make_model("small")
    device = torch.cuda.get_device_name() if real else f"CPU, {torch.get_num_threads()} threads"
    split = needed_flops(model, 8, 10, 13, frames=1500)  # with the whole window, as the model's own forward
    split = ", ".join(f"{part} {flops / sum(split.values()):.0%}" for part, flops in split.items())
    print(f"{config.size} on {device}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"one shared pass: {split}")

    found = {"size": config.size, "device": device}
    found["settings"] = [compare(model, *setting) for setting in SETTINGS + [GROWN] * config.growth]
    show(found["settings"])
    if config.growth:
        found["growth"] = show_growth(model)

    first = found["settings"][0]
    rate = matrix_rate(model.device, model.dtype)
    flops = 3 * sum(needed_flops(model, 8, 10, 13).values())  # the backward pass is twice the forward pass
    found["matrix_tflops"], found["update_tflop"] = rate / 1e12, flops / 1e12
    found["update_share"] = flops / first["seconds"]["update"]["shared"] / rate
    share = f"{found['update_share']:.0%} of the {rate / 1e12:.3g} TFLOP/s of a large matrix product"
    print(f"\nupdate: {flops / 1e12:.3g} TFLOP at {share}")
    sampling = first["seconds"]["sample"]["shared"] - first["seconds"]["prefill"]["shared"]
    found["seconds_a_token"] = sampling / (first["completion_tokens"][1] - 1)
    print(f"decoding: {found['seconds_a_token']:.4f} s a token, 8 completions side by side")

    found["steps"] = [whole_step(model, config.micro_batch)]
    if real:  # a model thinks
        model = make_model("7b", "cuda", torch.bfloat16)
        found["steps"].append(whole_step(model, 1, prompt="think", tokens=256))
    for step in found["steps"]:
        show_step(step)
    if config.json:
        Path(config.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
