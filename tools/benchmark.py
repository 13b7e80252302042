"""What computing the prompt once per group saves, and where the time goes: shared vs. repeated prompts.

    python -m tools.benchmark                             # a small Qwen2-Audio on a CPU, five minutes
    python -m tools.benchmark --growth                    # also how update time grows: 15 GB, 10 more minutes
    python -m tools.benchmark --size 7b --json 7b.json    # the real configuration, random weights, bf16, GPU
    python -m tools.benchmark --arithmetic                # 1 to 64 GPUs, by arithmetic only

"Repeated" is what upstream does: prompt and audio go through encoder and language model G times (`generate`
with num_return_sequences), rows are padded, and every position gets logits. The small model is scaled so that
encoder, prompt and completions take the same shares of the cost as at full size; the output shows them.
"""

import gc
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
from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration
from transformers import Qwen2Config
from transformers.hf_argparser import HfArg

import toy
from cli import BadInput, parse, run_main
from data import SAMPLE_RATE, write_atomically
from model import repeated_logps, sample, shared_prompt_logps
from training import now

TEXT_TOKENS = 60  # in a prompt, besides the audio tokens
PLACEHOLDER = 5  # id of the audio placeholder token
# G, seconds of audio, fewest and most tokens in a completion
SETTINGS = [(8, 10, (10, 16)), (4, 30, (10, 16)), (8, 10, (64, 128))]
GROWTH_SETTING = (16, 10, (10, 16))


@dataclass
class Config:
    size: str = HfArg(default="small", help="small, or 7b: the real configuration, on a GPU")
    growth: bool = HfArg(default=False, help="also measure how update time grows: 15 GB, ten minutes")
    arithmetic: bool = HfArg(default=False, help="only calculate what a step would cost on 1 to 64 GPUs")
    json: str = HfArg(default="", help="also write the numbers to this file")
    micro_batch: int = HfArg(default=4, help="prompts per forward pass in the training step")


# ---------------------------------------------------------------- model and inputs


def make_model(size: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A model with random weights: the real configuration ("7b"), or a small one with its proportions.

    "tiny" has other proportions: it only shows that the code runs.
    """
    if size == "7b":
        audio = Qwen2AudioEncoderConfig()
        text = Qwen2Config(
            vocab_size=156_032,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        )
    elif size == "tiny":
        audio = Qwen2AudioEncoderConfig(
            encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, d_model=32
        )
        text = Qwen2Config(
            vocab_size=800,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    else:
        audio = Qwen2AudioEncoderConfig(
            encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=1024, d_model=256
        )
        text = Qwen2Config(
            vocab_size=8_000,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=PLACEHOLDER)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2AudioForConditionalGeneration(config)
    return model.to(dtype).eval()


def make_group(model, B: int, G: int, clip_seconds: int, completion_tokens: tuple[int, int]):
    """Random model inputs for B prompts, and completions with their mask (B, G, T).

    completion_tokens: the fewest and the most tokens of a completion.
    """
    vocabulary = model.config.text_config.vocab_size
    mels = model.config.audio_config.num_mel_bins
    window = 2 * model.config.audio_config.max_source_positions  # frames, 100 per second
    audio_tokens = 25 * clip_seconds  # the frames, halved twice

    prompt = torch.randint(10, vocabulary, (B, audio_tokens + TEXT_TOKENS))
    prompt[:, 20 : 20 + audio_tokens] = PLACEHOLDER
    has_sound = torch.arange(window) < 100 * clip_seconds
    inputs = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "input_features": torch.randn(B, mels, window),
        "feature_attention_mask": has_sound.long().expand(B, -1),
    }
    inputs = {name: value.to(model.device) for name, value in inputs.items()}

    fewest, most = completion_tokens
    ids = torch.randint(10, vocabulary, (B, G, most))
    lengths = torch.randint(fewest, most + 1, (B, G, 1))
    mask = torch.arange(most) < lengths
    mask[0, 0] = True  # one completion has the full length
    return inputs, ids.to(model.device), mask.to(model.device)


# ---------------------------------------------------------------- the two ways


def shared_sample(model, inputs, G: int, T: int):
    no_eos = [-1]
    noise = torch.rand(len(inputs["input_ids"]), G, T, device=model.device)
    sample(model, inputs, no_eos, T, 1.0, noise)


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


WAYS = {"shared": (shared_sample, shared_prompt_logps), "repeated": (repeated_sample, repeated_logps)}


def check_agreement(shared: torch.Tensor, repeated: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise RuntimeError if the log-probs of the two ways differ: comparing their costs would be pointless.

    dtype: the model's. In bf16 a single log-prob is inexact, so only the mean difference counts.
    """
    gap = (shared - repeated).abs()
    agrees = gap.max() < 1e-4 if dtype == torch.float32 else gap.mean() < 0.05
    if not agrees:
        raise RuntimeError(f"the two ways differ by {gap.mean():.2g} on average and {gap.max():.2g} at most")


# ---------------------------------------------------------------- measuring


def seconds(run, *args) -> float:
    started = now()
    run(*args)
    return now() - started


def memory(model, logps, *args) -> int:
    """Bytes for the backward pass of logps(model, *args): on a GPU the peak, else what autograd saves."""
    if model.device.type == "cuda":
        model.zero_grad(set_to_none=False)  # so that gradients are allocated before as well as after
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps(model, *args).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    sizes = {}  # by address: tensors can share a storage, which then counts once

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps(model, *args)
    for p in model.parameters():
        sizes.pop(p.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def compare(
    model, G: int, clip_seconds: int, completion_tokens: tuple[int, int], repeats=2, prompts=1, updates=True
) -> dict:
    """Seconds and MiB of both ways and their ratios, as medians over repeats.

    updates=False leaves out updates and their memory: with the 7B model four repeated prompts do not fit on a
    card.
    """
    inputs, ids, mask = make_group(model, prompts, G, clip_seconds, completion_tokens)
    with torch.no_grad():
        shared = shared_prompt_logps(model, inputs, ids, mask, 1.0)
        repeated = repeated_logps(model, inputs, ids, mask, 1.0)
    check_agreement(shared, repeated, model.dtype)

    def prefill(sample_way, logps_way):  # up to the first token
        sample_way(model, inputs, G, 1)

    def sample_all(sample_way, logps_way):
        sample_way(model, inputs, G, completion_tokens[1])

    def score(sample_way, logps_way):
        with torch.no_grad():
            logps_way(model, inputs, ids, mask, 1.0)

    def update(sample_way, logps_way):
        model.zero_grad()
        logps_way(model, inputs, ids, mask, 1.0).sum().backward()

    phases = {"prefill": prefill, "sample": sample_all, "score": score}
    if updates:
        phases["update"] = update
    found = {
        "prompts": prompts,
        "group_size": G,
        "clip_seconds": clip_seconds,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "completion_tokens": list(completion_tokens),
        "repeats": repeats,
        "seconds": {},
        "ratio": {},
        "MiB": {},
    }
    for name, phase in phases.items():
        # the two ways take turns, so that other load on the machine affects both alike
        rounds = []
        for _ in range(repeats + 1):
            rounds.append({way: seconds(phase, *functions) for way, functions in WAYS.items()})
        rounds = rounds[1:]  # the first is the warm-up
        found["seconds"][name] = {way: statistics.median(times[way] for times in rounds) for way in WAYS}
        found["ratio"][name] = statistics.median(times["repeated"] / times["shared"] for times in rounds)
    if not updates:
        return found
    for way, (_, logps) in WAYS.items():
        found["MiB"][way] = memory(model, logps, inputs, ids, mask, 1.0) / 2**20
    found["ratio"]["memory"] = found["MiB"]["repeated"] / found["MiB"]["shared"]
    model.zero_grad()
    return found


def free(model) -> None:
    """Drop a model's weights and gradients, and release the GPU memory that torch has cached."""
    for p in model.parameters():
        p.grad = None
    model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def update_seconds(model, G: int, completion_tokens: tuple[int, int], repeats: int = 3) -> float:
    """Median seconds for a forward and backward pass over one group with a 10 s clip and a shared prompt."""
    inputs, ids, mask = make_group(model, 1, G, 10, completion_tokens)

    def update():
        model.zero_grad()
        shared_prompt_logps(model, inputs, ids, mask, 1.0).sum().backward()

    times = [seconds(update) for _ in range(repeats + 1)]
    return statistics.median(times[1:])  # the first is the warm-up


def measure_growth(model) -> dict[str, dict[int, float]]:
    """Seconds per update, by group size and by completion length."""
    sizes = (1, 2, 4, 8, 16, 32, 64)
    lengths = (8, 16, 32, 64, 128, 256, 512)
    return {
        "G, 10 to 16 tokens each": {G: update_seconds(model, G, (10, 16)) for G in sizes},
        "tokens each, G 8": {T: update_seconds(model, 8, (T, T)) for T in lengths},
    }


def measure_step(model, micro_batch: int, prompts: int = 16, prompt="answer", tokens: int = 16) -> dict:
    """The third step of train_grpo.py with LoRA, 8 completions, 10 s clips: seconds by phase, GPU memory.

    Frees the model, because train_grpo.py loads it from a folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_task(model, folder, prompts)
        free(model)  # train_grpo.py runs in a process of its own, which needs the memory
        flags = f"--prompts_per_step {prompts} --micro_batch {micro_batch}"
        flags += f" --max_steps 3 --prompt {prompt} --max_new_tokens {tokens}"
        metrics = train_steps(folder, "run", flags)[-1]
    found = {phase: metrics[f"seconds_{phase}"] for phase in ("sample", "score", "update")}
    found |= {"tokens": metrics["completion_tokens"], "memory_gb": metrics.get("memory_gb", 0.0)}
    return found | {"micro_batch": micro_batch, "prompt": prompt}


def write_task(model, folder: str, prompts: int) -> None:
    """Write the model, with a tokenizer, and questions about 10 s of noise to a folder."""
    processor = toy.make_processor(model.config.audio_config.num_mel_bins, seconds=30)
    processor.save_pretrained(f"{folder}/model")
    model.config.audio_token_id = processor.tokenizer.convert_tokens_to_ids(processor.audio_token)
    model.save_pretrained(f"{folder}/model")
    with open(f"{folder}/train.jsonl", "w") as file:
        for i in range(prompts):
            clip = np.random.default_rng(i).uniform(-0.5, 0.5, 10 * SAMPLE_RATE)
            soundfile.write(f"{folder}/{i}.wav", clip, SAMPLE_RATE)
            row, _ = toy.make_question("source", np.random.default_rng(i))
            file.write(json.dumps(row | {"audio": f"{i}.wav"}) + "\n")


def train_steps(folder: str, run: str, flags: str) -> list[dict]:
    """Train with LoRA on what write_task wrote, in a separate process; returns the lines of metrics.jsonl."""
    flags = f"--model {folder}/model --data {folder}/train.jsonl --output {folder}/{run} {flags}"
    flags += " --lora_rank 16 --lr 1e-5"
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16" if torch.cuda.is_available() else "no"}
    command = [sys.executable, write_script(folder), *flags.split()]
    subprocess.run(command, env=os.environ | precision, check=True)
    return [json.loads(line) for line in Path(f"{folder}/{run}/metrics.jsonl").read_text().splitlines()]


SCRIPT = """
import sys

sys.path.insert(0, {root!r})
import torch

import train_grpo
from cli import parse, run_main


def every_other(examples, texts, prompt):
    G = len(texts[0])
    return {{"every_other": (torch.arange(G) % 2).float().expand(len(texts), G)}}


train_grpo.compute_rewards = every_other
run_main(lambda: train_grpo.train(parse(train_grpo.Config, "")))
"""


def write_script(folder: str) -> str:
    """Write a script: train_grpo.py, but rewarding every other completion. Returns its path.

    A random model is never right. Without a reward it would have no gradient, and would learn nothing.
    """
    path = f"{folder}/train.py"
    Path(path).write_text(SCRIPT.format(root=str(Path(__file__).parent.parent)))
    return path


def needed_flops(model, G: int, clip_seconds: int, tokens: float, frames: int = 0) -> dict[str, float]:
    """Floating-point operations of a forward pass over one group with a shared prompt, by part.

    tokens: mean length of a completion. frames: how many the encoder processes, 50 per second; 0: the clip's.
    """
    encoder = model.model.audio_tower.layers
    lm = model.model.language_model.layers
    frames = frames or 50 * clip_seconds
    P = 25 * clip_seconds + TEXT_TOKENS  # tokens of the prompt
    N = G * tokens  # tokens of all completions

    # per token, one multiplication and one addition for each weight of a matrix
    encoder_weights = sum(p.numel() for p in encoder.parameters() if p.dim() == 2)
    lm_weights = sum(p.numel() for p in lm.parameters() if p.dim() == 2)
    head_weights = model.lm_head.weight.numel()
    # per pair of tokens, attention multiplies queries by keys, and attention weights by values
    encoder_pair = 4 * model.config.audio_config.d_model * len(encoder)
    lm_pair = 4 * model.config.text_config.hidden_size * len(lm)

    completion_pairs = N * (P + tokens / 2)  # a token sees the prompt and, on average, half of its completion
    return {
        "encoder": 2 * encoder_weights * frames + encoder_pair * frames**2,
        "prompt": 2 * lm_weights * P + lm_pair * P**2 / 2,
        "completions": 2 * (lm_weights + head_weights) * N + lm_pair * completion_pairs,
    }


def matrix_rate(device, dtype) -> float:
    """Floating-point operations per second in one large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    times = [seconds(torch.matmul, a, b) for _ in range(12)]
    return 2 * n**3 / statistics.median(times[2:])  # the first two are the warm-up


def measure(config: Config) -> None:
    """Measure everything, print it, and write --json after each part, so that no measurement is lost."""
    is_real = config.size == "7b"
    model = make_model("7b", "cuda", torch.bfloat16) if is_real else make_model("small")
    device = torch.cuda.get_device_name() if is_real else f"CPU, {torch.get_num_threads()} threads"
    print(f"{config.size} on {device}, torch {torch.__version__}, transformers {transformers.__version__}")
    show_shares(needed_flops(model, 8, 10, 13, frames=1500))  # the model's own forward always encodes 30 s

    settings = SETTINGS + [GROWTH_SETTING] if config.growth else SETTINGS
    found = {"size": config.size, "device": device, "settings": []}
    for setting in settings:
        found["settings"].append(compare(model, *setting))
        write_found(config, found)
    show_settings(found["settings"])
    if config.growth:
        found["growth"] = measure_growth(model)
        write_found(config, found)
        show_growth(found["growth"])

    first = found["settings"][0]
    times = first["seconds"]
    rate = matrix_rate(model.device, model.dtype)
    flops = 3 * sum(needed_flops(model, 8, 10, 13).values())  # the backward pass costs twice the forward pass
    found["matrix_tflops"] = rate / 1e12
    found["update_tflop"] = flops / 1e12
    found["update_share"] = flops / times["update"]["shared"] / rate
    decoding = times["sample"]["shared"] - times["prefill"]["shared"]
    found["seconds_a_token"] = decoding / (first["completion_tokens"][1] - 1)
    write_found(config, found)
    show_rates(found)

    found["steps"] = [measure_step(model, config.micro_batch)]
    write_found(config, found)
    show_step(found["steps"][0])
    if is_real:  # long completions, too; not worth the time with the small model
        model = make_model("7b", "cuda", torch.bfloat16)
        found["steps"].append(measure_step(model, 1, prompt="think", tokens=256))
        write_found(config, found)
        show_step(found["steps"][1])


def write_found(config: Config, found: dict) -> None:
    """Write the numbers so far to --json."""
    if config.json:
        write_atomically(config.json, json.dumps(found, indent=2) + "\n")


# ---------------------------------------------------------------- printing


def show_shares(flops: dict[str, float]) -> None:
    total = sum(flops.values())
    shares = ", ".join(f"{part} {value / total:.0%}" for part, value in flops.items())
    print(f"shares of one forward pass with a shared prompt: {shares}")


def show_settings(found: list[dict]) -> None:
    print("\n| G | clip | completion | | shared | repeated | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in found:
        fewest, most = row["completion_tokens"]
        setting = f"{row['group_size']} | {row['clip_seconds']} s | {fewest} to {most} tokens"
        for phase, pair in row["seconds"].items():
            times = f"{pair['shared']:.3f} s | {pair['repeated']:.3f} s"
            print(f"| {setting} | {phase} | {times} | {row['ratio'][phase]:.1f} |")
        sizes = f"{row['MiB']['shared']:.0f} MiB | {row['MiB']['repeated']:.0f} MiB"
        print(f"| {setting} | memory | {sizes} | {row['ratio']['memory']:.1f} |")


def show_growth(found: dict[str, dict[int, float]]) -> None:
    for title, times in found.items():
        print(f"\n| {title} | {' | '.join(map(str, times))} |")
        print("|" + " --- |" * (len(times) + 1))
        print(f"| update, s | {' | '.join(f'{value:.2f}' for value in times.values())} |")


def show_rates(found: dict) -> None:
    rate = f"{found['matrix_tflops']:.3g} TFLOP/s of a large matrix product"
    print(f"\nupdate: {found['update_tflop']:.3g} TFLOP at {found['update_share']:.0%} of the {rate}")
    print(f"decoding: {found['seconds_a_token']:.4f} s per token, 8 completions side by side")


def show_step(found: dict) -> None:
    phases = {phase: found[phase] for phase in ("sample", "score", "update")}
    parts = ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items())
    setting = f"16 prompts x 8 with LoRA, {found['prompt']}, {found['tokens']:.0f} tokens each"
    peak = f", at most {found['memory_gb']:.1f} GB" if found["memory_gb"] else ""
    total = f"{sum(phases.values()):.2f} s ({parts})"
    print(f"\na training step, {setting}, micro_batch {found['micro_batch']}: {total}{peak}")


# ---------------------------------------------------------------- by arithmetic

# an H100 SXM in bf16
FLOPS = 989e12  # per second
SHARE = 0.45  # fraction of these that is reached in practice
MEMORY_RATE = 3.35e12  # bytes per second, like the next two
NODE_RATE = 450e9  # within a node of 8 GPUs
NETWORK_RATE = 50e9  # between nodes

METHODS = ("LoRA, DDP", "all weights, FSDP2", "all weights, FSDP2 in a node, replicas across")
ADAPTER_WEIGHTS = 40e6


@dataclass
class Cost:
    """One GPU's part of a training step."""

    method: str
    gpus: int
    compute: float  # seconds
    decoding: float  # seconds
    memory: float  # bytes for weights, gradients, optimizer and reference
    in_node: float  # bytes exchanged within the node
    across: float  # bytes exchanged between nodes


def arithmetic(prompts: int = 16, G: int = 8, tokens: int = 13) -> list[Cost]:
    """The cost of a step by method and number of GPUs.

    It counts operations (the encoder runs once under LoRA), weights read once per decoded token, memory,
    and bytes exchanged, but no kernel launches, activations or overlap.
    """
    model = make_model("7b", "meta")
    n = sum(p.numel() for p in model.parameters())
    flops = needed_flops(model, G, 10, tokens)
    costs = []
    for gpus in (1, 8, 16, 64):
        nodes = max(1, gpus // 8)
        own_prompts = max(1, prompts // gpus)  # with more GPUs than `prompts`, a step has one prompt per GPU
        decoding = tokens * 2 * n / MEMORY_RATE
        for method in METHODS:
            prefill = flops["encoder"] + flops["prompt"]
            if method.startswith("LoRA"):
                # reference, forward, and backward, which is for activations only
                operations = prefill + 3 * (flops["prompt"] + flops["completions"])
                memory, in_node, across = lora_bytes(n, gpus, nodes)
            else:
                # reference, forward, and backward, which costs twice the forward
                operations = prefill + 4 * sum(flops.values())
                shards = gpus if method.endswith("FSDP2") else min(gpus, 8)
                memory, in_node, across = fsdp_bytes(n, gpus, nodes, shards, own_prompts)
            compute = own_prompts * operations / (SHARE * FLOPS)
            costs.append(Cost(method, gpus, compute, decoding, memory, in_node, across))
    return costs


def lora_bytes(n: int, gpus: int, nodes: int) -> tuple[float, float, float]:
    """Memory, and bytes exchanged within and between nodes, for n frozen weights in bf16 plus adapters."""
    memory = 2 * n + 16 * ADAPTER_WEIGHTS  # fp32: adapters, gradients, two moments of AdamW
    exchanged = 2 * 4 * ADAPTER_WEIGHTS  # an all-reduce sends the gradients twice
    return memory, exchanged if gpus > 1 else 0.0, exchanged if nodes > 1 else 0.0


def fsdp_bytes(n: int, gpus: int, nodes: int, shards: int, prompts: int) -> tuple[float, float, float]:
    """Memory, and bytes exchanged within and between nodes, for n trained weights in `shards` shards."""
    memory = (16 + 2) * n / shards  # fp32: weights, gradients, two moments of AdamW; bf16: the reference
    if gpus > 1:
        memory += 2 * n  # all weights in bf16 during sampling
    if shards == 1:
        return memory, 0.0, 0.0
    # gathered in bf16 for sampling, then per prompt for reference, forward and backward; gradients in fp32
    exchanged = 2 * n + prompts * (3 * 2 * n + 4 * n)
    if nodes == 1:
        return memory, exchanged, 0.0
    if shards > 8:  # the shards of one replica are on several nodes
        return memory, exchanged, exchanged
    return memory, exchanged, 2 * 4 * n / shards  # an all-reduce of the gradients between the replicas


def show_arithmetic() -> None:
    print(f"by arithmetic, not measured: {SHARE:.0%} of {FLOPS / 1e12:.0f} TFLOP/s, ", end="")
    print(f"{MEMORY_RATE / 1e12} TB/s memory bandwidth,")
    print(f"{NODE_RATE / 1e9:.0f} GB/s within a node, {NETWORK_RATE / 1e9:.0f} GB/s between nodes;")
    print("one GPU's part of a step of 16 prompts x 8 (64 prompts on 64 GPUs), 10 s clips, 13 tokens\n")
    print("| | GPUs | compute, s | decoding, s | memory, GB | GB within node | GB between nodes | bound by |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for cost in arithmetic():
        times = {
            "compute": cost.compute,
            "decoding": cost.decoding,
            "the node's links": cost.in_node / NODE_RATE,
            "links between nodes": cost.across / NETWORK_RATE,
        }
        slowest = max(times, key=times.get)
        sizes = " | ".join(f"{size / 1e9:.1f}" for size in (cost.memory, cost.in_node, cost.across))
        row = f"{cost.method} | {cost.gpus} | {cost.compute:.2f} | {cost.decoding:.2f} | {sizes}"
        print(f"| {row} | {slowest}, {times[slowest]:.2f} s |")


def main() -> None:
    config = parse(Config, __doc__)
    if config.size not in ("small", "7b"):
        raise BadInput(f"--size {config.size}: unknown, choose small or 7b")
    if config.arithmetic:
        return show_arithmetic()
    if config.size == "7b" and not torch.cuda.is_available():
        raise BadInput("--size 7b needs a CUDA GPU, but there is none")
    measure(config)


if __name__ == "__main__":
    run_main(main)
