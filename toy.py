"""The offline stand-in: synthetic questions about synthetic sounds, and a tiny Qwen2-Audio to answer them.

    python toy.py make       # writes runs/toy: sounds, questions, and base, a model right half the time
    python toy.py compare    # the paper's question on it: train on one task, measure on all (--quick, --task)

The files are of the kinds that the real run reads, and the model is a real Qwen2-Audio of 1.0 M parameters
with a window of 2 s, so all else is the real code. Questions are of MMAU's three tasks, two kinds each.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext

import numpy as np
import soundfile
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2AudioConfig, Qwen2AudioEncoderConfig
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, Qwen2Config, Qwen2Tokenizer
from transformers import WhisperFeatureExtractor

from data import PROMPTS, SAMPLE_RATE, BadInput, lock_folder, read_rows, write_rows
from flags import TrainConfig, is_given, run_command

FOLDER = "runs/toy"
SECONDS = 2
N_TRAIN, N_TEST = 1600, 300

# ---------------------------------------------------------------- sounds


def envelope(n: int, decay: float = 0.0) -> np.ndarray:
    """Loudness (n,) of a sound with soft ends of 10 ms, fading as exp(-decay seconds)."""
    t = np.arange(n) / SAMPLE_RATE
    ends = np.minimum(1, np.minimum(t, t[::-1]) / 0.01)
    return ends * np.exp(-decay * t)


def tone(pitch: np.ndarray, harmonics: list[float]) -> np.ndarray:
    """A harmonic sound (n,) whose pitch (n,) is in Hz and whose overtones have these amplitudes."""
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    return sum(a * np.sin(k * phase) for k, a in enumerate(harmonics, 1))


def source(name: str, n: int, rng) -> np.ndarray:
    """n samples of a thing that sounds."""
    t = np.arange(n) / SAMPLE_RATE
    noise = rng.standard_normal(n)
    if name == "siren":
        return tone(900 + 400 * np.sin(2 * np.pi * rng.uniform(1.5, 3) * t), [1, 0.3])
    if name == "engine":
        return tone(np.full(n, rng.uniform(60, 110)), [1 / k for k in range(1, 12)]) + 0.2 * noise
    if name == "rain":
        return noise
    if name == "bell":
        base = rng.uniform(500, 900)
        return sum(np.sin(2 * np.pi * base * k * t) for k in (1, 2.76, 5.4)) * np.exp(-3 * t)
    if name == "bird":
        return tone(3500 + 1200 * np.sin(2 * np.pi * rng.uniform(7, 11) * t), [1])
    return np.where((t * rng.uniform(6, 9)) % 1 < 0.1, noise, 0)  # knocking


def bursts(count: int, rng) -> np.ndarray:
    """A whole clip of some short beeps, evenly spaced."""
    clip, pitch, n = np.zeros(SECONDS * SAMPLE_RATE), rng.uniform(400, 1200), int(0.18 * SAMPLE_RATE)
    gap = int(rng.uniform(0.3, 0.4) * SAMPLE_RATE)
    start = int(rng.uniform(0.05, 0.3) * SAMPLE_RATE)
    for i in range(count):
        clip[start + i * gap : start + i * gap + n] += tone(np.full(n, pitch), [1, 0.5]) * envelope(n)
    return clip


def melody(shape: str, instrument: str, rng) -> np.ndarray:
    """A whole clip of four notes that go a way, on an instrument."""
    shapes = {"up": [0, 1, 2, 3], "down": [3, 2, 1, 0], "up then down": [0, 2, 2, 0], "nowhere": [1, 1, 1, 1]}
    harmonics = {"flute": [1], "organ": [1, 0, 0.7, 0, 0.5, 0, 0.4]}
    harmonics["trumpet"] = [0.6, 1, 1, 0.9, 0.7, 0.5, 0.4, 0.3]
    overtones, decay = harmonics.get(instrument, [1, 0.5, 0.3, 0.2]), 8 if instrument == "harp" else 1
    n, base, width = SECONDS * SAMPLE_RATE // 4, rng.uniform(240, 300), rng.uniform(5, 7)
    pitches = [base * 2 ** (k * width / 12) for k in shapes[shape]]
    return np.concatenate([tone(np.full(n, pitch), overtones) * envelope(n, decay) for pitch in pitches])


# formants, Hz
VOWELS = {"a": (800, 1200), "e": (450, 2100), "i": (280, 2500), "o": (450, 850), "u": (310, 700)}


def voice(vowel: str, contour: str, rng) -> np.ndarray:
    """A vowel on a pitch that rises, falls, does both or stays."""
    n = int(rng.uniform(1.2, SECONDS) * SAMPLE_RATE)
    x = np.linspace(0, 1, n)
    bends = {"rising": x, "falling": 1 - x, "rising then falling": 1 - abs(2 * x - 1), "flat": 0 * x + 0.5}
    pitch = rng.uniform(130, 160) * 2 ** (bends[contour] * rng.uniform(1.3, 1.6))
    distance = np.arange(1, 20)[:, None] * pitch.mean() - VOWELS[vowel]  # (19, 2), Hz
    overtones = (1 / (1 + (distance / 120) ** 2)).sum(1) + 0.02
    overtones[0] += 2  # the pitch itself stays audible
    return tone(pitch, overtones) * envelope(n)


# ---------------------------------------------------------------- questions

CONTOURS = ["rising", "falling", "rising then falling", "flat"]
INSTRUMENTS = ["flute", "organ", "trumpet", "harp"]
MELODIES = ["up", "down", "up then down", "nowhere"]
COUNTS = ["once", "twice", "three times", "four times"]
SOURCES = ["siren", "engine", "rain", "bell", "bird", "knocking"]
KINDS = {  # kind: task, ways to ask, answers
    "source": ("sound", ["Which source makes the sound?", "What is making this sound?"], SOURCES),
    "count": ("sound", ["How many beeps are there?", "How often does it beep?"], COUNTS),
    "melody": ("music", ["How does the melody move?", "Where do the notes go?"], MELODIES),
    "instrument": ("music", ["Which instrument is playing?", "What plays the notes?"], INSTRUMENTS),
    "vowel": ("speech", ["Which vowel is spoken?", "Which vowel does the voice say?"], list(VOWELS)),
    "intonation": ("speech", ["How does the voice move?", "What is the intonation of the voice?"], CONTOURS),
}
# what one hears in the answer, as its short reason; in words that the base can spell
THOUGHTS = {
    "siren": "a tone that moves slowly", "engine": "a low hum", "rain": "noise all the time",
    "bell": "a tone that fades", "bird": "a tone that moves fast", "knocking": "noise again and again",
    "once": "beep", "twice": "beep, beep", "three times": "beep, beep, beep",
    "four times": "beep, beep, beep, beep",
    "up": "low, then high", "down": "high, then low", "up then down": "low, then high, then low",
    "nowhere": "the same note again", "flute": "one tone", "organ": "some tones, not all",
    "trumpet": "many tones", "harp": "notes that fade",
    "a": "open", "e": "half open, in front", "i": "closed, in front", "o": "half open, at the back",
    "u": "closed, at the back",
    "rising": "low, then high", "falling": "high, then low",
    "rising then falling": "low, then high, then low", "flat": "the same pitch all the time",
}  # fmt: skip


def make_question(kind: str, rng) -> tuple[dict, np.ndarray]:
    """A row in the project's own format, without its audio, and its clip."""
    task, ways, answers = KINDS[kind]
    choices = [str(c) for c in rng.permutation(answers)[:4]]
    answer = choices[rng.integers(4)]

    def heard(part):  # what the question is not about is drawn too
        return answer if part == kind else str(rng.choice(KINDS[part][2]))

    if kind == "source":
        clip = source(answer, SECONDS * SAMPLE_RATE, rng) * envelope(SECONDS * SAMPLE_RATE)
    elif kind == "count":
        clip = bursts(1 + answers.index(answer), rng)
    elif task == "music":
        clip = melody(heard("melody"), heard("instrument"), rng)
    else:
        clip = voice(heard("vowel"), heard("intonation"), rng)
    clip = clip / np.abs(clip).max() + 0.02 * rng.standard_normal(len(clip))
    row = {"question": str(rng.choice(ways)), "choices": choices, "answer": answer}
    row |= {"thought": THOUGHTS[answer], "task": task, "kind": kind}
    return row, clip * rng.uniform(0.2, 0.8)


def make_data(folder: str, split: str, n: int, seed: int) -> None:
    """n questions as folder/split.jsonl and folder/split/*.wav, the same on every call."""
    os.makedirs(os.path.join(folder, split), exist_ok=True)
    rng = np.random.default_rng(seed)
    with open(os.path.join(folder, f"{split}.jsonl"), "w") as file:
        for i in range(n):
            row, clip = make_question(list(KINDS)[i % len(KINDS)], rng)
            row = {"id": f"{split}-{i}", "audio": f"{split}/{i:04d}.wav", **row}
            soundfile.write(os.path.join(folder, row["audio"]), clip.astype(np.float32), SAMPLE_RATE)
            file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------- model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]


def make_processor(mels: int, seconds: int) -> Qwen2AudioProcessor:
    """A processor whose tokenizer knows the toy's questions, for a window of so many seconds."""
    texts = ["system\nYou are a helpful assistant.\n", "user\nAudio 1: \n", "assistant\n"]
    for _, ways, answers in KINDS.values():
        texts += [prompt.format(question=way, choices=answers) for way in ways for prompt in PROMPTS.values()]
        texts += [f"<answer>{answer}</answer>" for answer in answers]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts * 10, 640, new_special_tokens=SPECIAL[1:])
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds), tokenizer)


def make_model(folder: str, seed: int) -> None:
    """A randomly initialised Qwen2-Audio of 1.0 M parameters with its processor, for `from_pretrained`."""
    processor = make_processor(mels=64, seconds=SECONDS)
    ids = processor.tokenizer.get_vocab()
    set_seed(seed)
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=384, d_model=128,
        max_source_positions=SECONDS * 50, initializer_range=0.12,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(ids), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.08,
    )  # fmt: skip
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=ids["<|AUDIO|>"])
    model = Qwen2AudioForConditionalGeneration(config)
    # Whisper's sinusoids; a random encoder that cannot tell time would never learn what comes first
    angle = torch.arange(SECONDS * 50)[:, None] * torch.logspace(0, -4, audio.d_model // 2)
    model.model.audio_tower.embed_positions.weight.data = torch.cat([angle.sin(), angle.cos()], 1)
    # as Qwen2-Audio-7B-Instruct's, so that what must not reach the sampler is there to be kept away
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.5, top_k=20, repetition_penalty=1.1,
        eos_token_id=[ids["<|endoftext|>"], ids["<|im_end|>"]], pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# ---------------------------------------------------------------- the runs

WARMUP = "--lr 7e-4 --max_steps 260 --prompts_per_step 4 --micro_batch 4 --seed 0 --save_every 300"
TRAINING = "--lr 4e-4 --max_steps 400 --max_new_tokens 16 --eval_every 50 --save_every 200"
COLD_START = "--lr 1e-3 --max_steps 300 --prompts_per_step 4 --micro_batch 4 --seed 0 --save_every 300"


def run_script(name: str, flags: str, log: str = "", share: int = 1) -> None:
    """Run a script in one process of its own, even where a launcher started several of this one.

    With a share of n it takes an n-th of the cores; its output goes to `log`, if that is given.
    """
    launcher = tuple("ACCELERATE_ TORCHELASTIC_ MASTER_ LOCAL_ GROUP_ ROLE_ RANK WORLD_SIZE OMP_".split())
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    if share > 1:
        environment |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(share)}  # run_main reads them
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    with open(log, "a") if log else nullcontext() as file:
        command = [sys.executable, script, *flags.split()]
        done = subprocess.run(command, env=environment, stdout=file, stderr=file)
    if done.returncode:
        raise BadInput(f"{FOLDER}: {name} failed, as {log or 'it'} says{'' if log else ' above'}")


def warm_up(start: str, flags: str, name: str) -> None:
    """Train a model by train_sft.py; it appears under its name last, and only when it is whole."""
    shutil.rmtree(f"{FOLDER}/warmup", ignore_errors=True)
    files = f"--model {FOLDER}/{start} --data {FOLDER}/train.jsonl --output {FOLDER}/warmup"
    run_script("train_sft.py", f"{files} {flags}")
    os.rename(f"{FOLDER}/warmup", f"{FOLDER}/{name}")


def make() -> None:
    """Make the toy anew: data, a random model, and its warm-up by train_sft.py."""
    lock = lock_folder(FOLDER)
    for name in ("base", "thinker", "init", "train", "test", "grpo", "sft", "compare"):
        shutil.rmtree(f"{FOLDER}/{name}", ignore_errors=True)
    make_data(FOLDER, "train", N_TRAIN, seed=1)
    make_data(FOLDER, "test", N_TEST, seed=2)
    make_model(f"{FOLDER}/init", seed=0)
    warm_up("init", WARMUP, "base")
    shutil.rmtree(f"{FOLDER}/init")
    del lock


def toy_flags(method: str, config: TrainConfig) -> list[str]:
    """The toy's flags for train_<method>.py, under which the user's own settings, `config`, go.

    Makes the toy if it is not there, and clears its last run unless that is to be resumed.
    """
    accelerator, output = Accelerator(), f"{FOLDER}/{method}"
    share = max(1, config.prompts_per_step // accelerator.num_processes)  # prompts of each process
    thinks = method == "grpo" and config.prompt == "think"  # from a base that has seen thoughts
    base = "thinker" if thinks else "base"
    flags = f"--model {FOLDER}/{base} --data {FOLDER}/train.jsonl --eval_data {FOLDER}/test.jsonl"
    flags += f" --output {output} --prompts_per_step {share * accelerator.num_processes}"
    flags += f" --micro_batch {share} {TRAINING}" + " --max_new_tokens 48" * (config.prompt == "think")
    if accelerator.is_main_process:
        print("No --model and no --data: this is the offline toy. The README has the paper's recipe.")
        if not os.path.isdir(f"{FOLDER}/base"):
            size = f"{N_TRAIN + N_TEST} sounds and a tiny model"
            print(f"making it in {FOLDER}: {size}, about a minute", flush=True)
            make()
        if thinks and not os.path.isdir(f"{FOLDER}/thinker"):
            print("warming it up with thoughts", flush=True)
            warm_up("base", f"--prompt think {COLD_START}", "thinker")
        if os.path.isdir(output) and not config.resume and not is_given("--output"):
            lock = lock_folder(output)
            shutil.rmtree(output, ignore_errors=True)
            del lock
        print(f"train_{method}.py {flags} {' '.join(sys.argv[1:])}", flush=True)
    accelerator.wait_for_everyone()
    return flags.split()


# ---------------------------------------------------------------- the comparison

TASKS, SEEDS = ["sound", "music", "speech"], [1, 2, 3]
LORA = "--lora_rank 16 --lora_target all"
RATES, LORA_RATES = ("5e-5", "1e-4", "2e-4"), ("3e-4", "1e-3", "3e-3")
COMPARED = {  # method: script, flags, learning rates
    "full SFT": ("train_sft.py", "", RATES),
    "LoRA SFT": ("train_sft.py", LORA, LORA_RATES),
    "GRPO": ("train_grpo.py", "--beta 0.04", RATES),
    "GRPO, beta 0.2": ("train_grpo.py", "--beta 0.2", RATES),
    "GRPO, LoRA": ("train_grpo.py", f"--beta 0.04 {LORA}", LORA_RATES),
}
PAIRS = [("GRPO", "full SFT"), ("GRPO, beta 0.2", "full SFT"), ("GRPO, LoRA", "LoRA SFT")]
SKILLED = 95  # % on the trained task
STUDENT_T = 4.303  # 97.5 % quantile with two degrees of freedom: three seeds


def compare(*, task: str = "sound", quick: bool = False) -> None:
    """Train each method on one task, three learning rates, three seeds; measure on all."""
    if task not in TASKS:
        raise BadInput(f"--task {task}: unknown, choose one of {', '.join(TASKS)}")
    if not os.path.isdir(f"{FOLDER}/base"):
        make()
    share, tasks = min(8, os.cpu_count()), sorted(TASKS, key=lambda name: name != task)  # the trained first
    folder, seeds, steps = f"{FOLDER}/compare/{task}", SEEDS, 300
    if quick:
        folder, seeds, steps = f"{folder}-quick", SEEDS[:1], 150
    os.makedirs(folder, exist_ok=True)
    make_data(f"{FOLDER}/compare", "test", 3 * N_TEST, seed=3)
    rows = [row for row, _ in read_rows(f"{FOLDER}/train.jsonl")[0]]
    write_rows(f"{FOLDER}/train-{task}.jsonl", [row for row in rows if row["task"] == task])

    def measure(model, output):  # % in each task, and the mean of the two that were not trained
        if not os.path.exists(f"{output}/results.json"):
            flags = f"--model {model} --data {FOLDER}/compare/test.jsonl --max_new_tokens 16"
            run_script("evaluate.py", f"{flags} --output {output}", f"{output}.log", share)
        with open(f"{output}/results.json") as file:
            by_task = json.load(file)["by"]["task"]
        found = [100 * by_task[name]["accuracy"] for name in tasks]
        return [*found, np.mean(found[1:])]

    def train(seed, method, lr):
        script, flags, _ = COMPARED[method]
        output = f"{folder}/{method.replace(',', '').replace(' ', '-')}-{lr}-{seed}"
        if not os.path.exists(f"{output}/run.json"):  # else it was trained before
            flags += f" --model {FOLDER}/base --data {FOLDER}/train-{task}.jsonl --output {output} --resume"
            flags += f" --lr {lr} --seed {seed} --max_steps {steps} --save_every {steps} --micro_batch 16"
            run_script(script, f"{flags} --max_new_tokens 16", f"{output}.log", share)
        return measure(output, f"{output}/eval")

    with ThreadPoolExecutor(share) as pool:
        methods = [(method, lr) for method, (_, _, rates) in COMPARED.items() for lr in rates]
        runs = [pool.submit(train, seed, *method) for seed in seeds for method in methods]
        try:
            for run in tqdm(as_completed(runs), total=len(runs), unit="run"):
                run.result()
        except KeyboardInterrupt:  # the scripts have caught it too, and save
            raise BadInput("interrupted; the same command goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)
    scores = np.reshape([run.result() for run in runs], (len(seeds), len(COMPARED), 3, 4))
    base = np.array(measure(f"{FOLDER}/base", f"{folder}/base"))
    print("\n".join(comparison_tables(tasks, base, scores)))
    draw_comparison(tasks, base, scores, f"{folder}/compare.svg")
    print(f"\nthe picture is {folder}/compare.svg")


def at_equal_skill(scores: np.ndarray) -> np.ndarray:
    """Scores (seeds, methods, 4) of the lowest learning rate with SKILLED % on the trained task, else of the
    best one on it. scores: (seeds, methods, learning rates, 4). The other tasks have no say."""
    skill = scores[..., 0]
    chosen = np.where((skill >= SKILLED).any(-1), (skill >= SKILLED).argmax(-1), skill.argmax(-1))
    return np.take_along_axis(scores, chosen[..., None, None], 2)[:, :, 0]


def comparison_tables(tasks: list[str], base: np.ndarray, scores: np.ndarray) -> list[str]:
    """Lines of two tables: all runs; what GRPO has more than SFT at equal skill. base: (4,)."""
    names = f"{tasks[0]} (trained) | {tasks[1]} | {tasks[2]} | both others |"
    lines = [f"| accuracy in % | lr | {names}", "| --- " * 6 + "|"]
    lines += [f"| base | | {' | '.join(f'{value:.1f}' for value in base)} |"]
    for m, (method, (_, _, rates)) in enumerate(COMPARED.items()):
        for lr, found in zip(rates, scores[:, m].swapaxes(0, 1)):  # (seeds, 4)
            ranges = [f" ({x.min():.1f} to {x.max():.1f})" if len(x) > 1 else "" for x in found.T]
            cells = [f"{x.mean():.1f}{extent}" for x, extent in zip(found.T, ranges)]
            lines.append(f"| {method} | {lr} | {' | '.join(cells)} |")
    lines += ["", f"| points more, where {tasks[0]} reaches {SKILLED} % | {names}", "| --- " * 5 + "|"]
    chosen, index = at_equal_skill(scores), list(COMPARED).index
    for one, other in PAIRS:
        more = chosen[:, index(one)] - chosen[:, index(other)]  # (seeds, 4), in pairs of one seed
        cells = [f"{value:+.1f}" for value in more.mean(0)]
        if len(more) == len(SEEDS):
            half = STUDENT_T * more.std(0, ddof=1) / len(more) ** 0.5
            cells = [f"{m:+.1f} ({m - h:+.1f} to {m + h:+.1f})" for m, h in zip(more.mean(0), half)]
        skill = chosen[:, [index(one), index(other)], 0]
        note = "" if skill.min() >= SKILLED else f", not all at {SKILLED} %"
        lines.append(f"| {one} minus {other}{note} | {' | '.join(cells)} |")
    return lines


def draw_comparison(tasks: list[str], base: np.ndarray, scores: np.ndarray, target: str) -> Figure:
    """A point a run, a line a method through the means of its learning rates."""
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    axes.plot(base[0], base[3], "k*", markersize=12, label="base")
    for n, (method, points) in enumerate(zip(COMPARED, scores[..., [0, 3]].swapaxes(0, 1))):
        axes.plot(*points.reshape(-1, 2).T, "o", color=f"C{n}", alpha=0.5)
        axes.plot(*points.mean(0).T, color=f"C{n}", label=method)
    axes.set(xlabel=f"accuracy on {tasks[0]}, the trained task, %", ylabel="mean of the two others, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(target)
    return figure


if __name__ == "__main__":
    run_command(__doc__, make, compare)
