"""The offline stand-in: synthetic questions about synthetic sounds, and a tiny Qwen2-Audio to answer them.

    python toy.py make       # writes runs/toy: sounds, questions, and base, a model right half the time
    python toy.py compare    # the paper's comparison on it: SFT and GRPO, all weights and LoRA, with thoughts

The files are of the kinds that the real run reads, and the model is a real Qwen2-Audio of 1.0 M parameters
with a window of 2 s, so all else is the real code. Questions are of MMAU's three tasks, two kinds each.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import soundfile
import soxr
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

from data import PROMPTS, SAMPLE_RATE, BadInput, lock_folder
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
    overtones = [
        sum(1 / (1 + ((k * pitch.mean() - f) / 120) ** 2) for f in VOWELS[vowel]) + 0.02 for k in range(1, 20)
    ]
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
REPHRASED = {  # in words that training does not use
    "source": ["Can you tell where this noise comes from?"],
    "count": ["What is the number of short signals?"],
    "melody": ["In which direction does the tune go?"],
    "instrument": ["Name the thing these tones are made with."],
    "vowel": ["Tell me the letter that the person says."],
    "intonation": ["Describe how the speaker's pitch goes."],
}
# longer and lower, shorter and higher, 12 dB more noise, other words
SHIFTS = ("slow", "fast", "noisy", "rephrased")


def make_question(kind: str, rng, shift: str = "") -> tuple[dict, np.ndarray]:
    """A row in the project's own format, without its audio, and its clip; a shift: unlike training."""
    task, ways, answers = KINDS[kind]
    choices = [str(c) for c in rng.permutation(answers)[:4]]
    answer = choices[rng.integers(4)]

    def other(kind):  # what the question is not about is drawn too
        return str(rng.choice(KINDS[kind][2]))

    if kind == "source":
        clip = source(answer, SECONDS * SAMPLE_RATE, rng) * envelope(SECONDS * SAMPLE_RATE)
    elif kind == "count":
        clip = bursts(1 + answers.index(answer), rng)
    elif task == "music":
        clip = melody(*(answer, other("instrument")) if kind == "melody" else (other("melody"), answer), rng)
    else:
        clip = voice(*(answer, other("intonation")) if kind == "vowel" else (other("vowel"), answer), rng)
    if shift in ("slow", "fast"):  # a fifth
        clip = soxr.resample(clip, SAMPLE_RATE, SAMPLE_RATE * (1.2 if shift == "slow" else 1 / 1.2))
    clip = clip / np.abs(clip).max() + (0.08 if shift == "noisy" else 0.02) * rng.standard_normal(len(clip))
    question = str(rng.choice(REPHRASED[kind] if shift == "rephrased" else ways))
    row = {"question": question, "choices": choices, "answer": answer, "task": task, "kind": kind}
    return row | ({"shift": shift} if shift else {}), clip * rng.uniform(0.2, 0.8)


def make_data(folder: str, split: str, n: int, seed: int, shifts: tuple[str, ...] = ("",)) -> None:
    """n questions as folder/split.jsonl and folder/split/*.wav, the same on every call."""
    os.makedirs(os.path.join(folder, split), exist_ok=True)
    rng = np.random.default_rng(seed)
    with open(os.path.join(folder, f"{split}.jsonl"), "w") as file:
        for i in range(n):
            row, clip = make_question(list(KINDS)[i % len(KINDS)], rng, shifts[i // len(KINDS) % len(shifts)])
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
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts * 10, vocab_size=640, new_special_tokens=SPECIAL[1:]
    )
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds), tokenizer)


def make_model(folder: str, seed: int) -> None:
    """A randomly initialised Qwen2-Audio of 1.0 M parameters with its processor, for `from_pretrained`."""
    processor = make_processor(mels=64, seconds=SECONDS)
    tokenizer = processor.tokenizer
    set_seed(seed)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=384, d_model=128,
        max_source_positions=SECONDS * 50, initializer_range=0.12,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.08,
    )  # fmt: skip
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=ids["<|AUDIO|>"])
    )
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


def run_script(name: str, flags: str) -> None:
    """Run a script in one process of its own, even where a launcher started several of this one."""
    launcher = (
        "ACCELERATE_",
        "TORCHELASTIC_",
        "MASTER_",
        "LOCAL_",
        "GROUP_",
        "ROLE_",
        "RANK",
        "WORLD_SIZE",
        "OMP_",
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    if subprocess.run([sys.executable, script, *flags.split()], env=environment).returncode:
        raise BadInput(f"{FOLDER}: {name} failed, as it says above")


def make() -> None:
    """Make the toy anew: data, a random model, and its warm-up by train_sft.py."""
    lock = lock_folder(FOLDER)
    for name in ("base", "init", "warmup", "train", "test", "grpo", "sft", "shifted", "compare"):
        shutil.rmtree(f"{FOLDER}/{name}", ignore_errors=True)
    make_data(FOLDER, "train", N_TRAIN, seed=1)
    make_data(FOLDER, "test", N_TEST, seed=2)
    make_model(f"{FOLDER}/init", seed=0)
    files = f"--model {FOLDER}/init --data {FOLDER}/train.jsonl --output {FOLDER}/warmup"
    run_script("train_sft.py", f"{files} {WARMUP}")
    os.rename(f"{FOLDER}/warmup", f"{FOLDER}/base")  # appears last, and only when it is whole
    shutil.rmtree(f"{FOLDER}/init")
    del lock


def toy_flags(method: str, config: TrainConfig) -> list[str]:
    """The toy's flags for train_<method>.py, under which the user's own settings, `config`, go.

    Makes the toy if it is not there, and clears its last run unless that is to be resumed.
    """
    accelerator, output = Accelerator(), f"{FOLDER}/{method}"
    share = max(1, config.prompts_per_step // accelerator.num_processes)  # prompts of each process
    flags = f"--model {FOLDER}/base --data {FOLDER}/train.jsonl --eval_data {FOLDER}/test.jsonl"
    flags += f" --output {output} --prompts_per_step {share * accelerator.num_processes}"
    flags += f" --micro_batch {share} {TRAINING}"
    if accelerator.is_main_process:
        print("No --model and no --data: this is the offline toy. The README has the paper's recipe.")
        if not os.path.isdir(f"{FOLDER}/base"):
            size = f"{N_TRAIN + N_TEST} sounds and a tiny model"
            print(f"making it in {FOLDER}: {size}, about a minute", flush=True)
            make()
        if os.path.isdir(output) and not config.resume and not is_given("--output"):
            lock = lock_folder(output)
            shutil.rmtree(output, ignore_errors=True)
            del lock
        print(f"train_{method}.py {flags} {' '.join(sys.argv[1:])}", flush=True)
    accelerator.wait_for_everyone()
    return flags.split()


# ---------------------------------------------------------------- the comparison

COMPARED = {  # the paper's rows; every run sees 400 x 16 samples
    "full SFT": ("train_sft.py", "--lr 4e-4", 16),
    "LoRA SFT": ("train_sft.py", "--lr 3e-3 --lora_rank 16 --lora_target all", 16),
    "GRPO, answer": ("train_grpo.py", "--lr 4e-4", 16),
    "GRPO, think": ("train_grpo.py", "--lr 4e-4 --prompt think", 48),
    "GRPO, answer, LoRA": ("train_grpo.py", "--lr 3e-3 --lora_rank 16 --lora_target all", 16),
}
SEEDS = [1, 2, 3]


def accuracy(model: str, split: str, output: str, max_new_tokens: int) -> float:
    """Per cent right by evaluate.py, which is not run again where it has been."""
    results = f"{output}/{split}/results.json"
    if not os.path.exists(results):
        questions = f"--data {FOLDER}/{split}.jsonl --output {output}/{split}"
        run_script("evaluate.py", f"--model {model} {questions} --max_new_tokens {max_new_tokens}")
    with open(results) as file:
        return 100 * json.load(file)["accuracy"]


def compare() -> None:
    """Train each method with each seed; print accuracy on held-out questions and on shifted ones."""
    if not os.path.isdir(f"{FOLDER}/base"):
        make()
    make_data(FOLDER, "shifted", N_TEST, seed=3, shifts=SHIFTS)
    base = [accuracy(f"{FOLDER}/base", split, f"{FOLDER}/compare/base", 16) for split in ("test", "shifted")]
    table = [f"| base | {base[0]:.1f} | {base[1]:.1f} |"]
    for method, (script, flags, max_new_tokens) in COMPARED.items():
        scores = {"test": [], "shifted": []}
        for seed in SEEDS:
            output = f"{FOLDER}/compare/{method.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not os.path.exists(f"{output}/run.json"):  # else it was trained before
                shutil.rmtree(output, ignore_errors=True)
                data = f"--model {FOLDER}/base --data {FOLDER}/train.jsonl --output {output} --seed {seed}"
                steps = f"--max_steps 400 --save_every 400 --micro_batch 16 --max_new_tokens {max_new_tokens}"
                run_script(script, f"{data} {steps} {flags}")
            for split in scores:
                scores[split].append(accuracy(output, split, output, max_new_tokens))
        cells = [f"{np.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})" for found in scores.values()]
        table.append(f"| {method} | {' | '.join(cells)} |")
    print(f"\naccuracy in %, mean (range) over seeds {SEEDS}\n\n| | held out | shifted |")
    print("| --- | --- | --- |")
    print("\n".join(table))


if __name__ == "__main__":
    run_command(__doc__, make, compare)
