"""The offline toy: synthetic questions about synthetic sounds, and a tiny Qwen2-Audio to answer them.

    python toy.py    # writes runs/toy: sounds, questions, and `base`, a model that is right half the time

The files have the format of the real datasets, and the model is a real Qwen2-Audio with 1.0 M parameters and
a window of 2 s, so everything else is the real code. The questions cover MMAU's three tasks, two kinds each.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import soundfile
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import GenerationConfig, Qwen2AudioConfig, Qwen2AudioEncoderConfig
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, Qwen2Config, Qwen2Tokenizer
from transformers import WhisperFeatureExtractor

from cli import BadInput, is_given, run_main
from data import PROMPTS, SAMPLE_RATE, lock_folder
from training import TrainConfig

FOLDER = "runs/toy"
SECONDS = 2  # the longest clip, and the model's window
N_TRAIN = 1600
N_TEST = 300

# ---------------------------------------------------------------- sounds


def envelope(n: int, decay: float = 0.0) -> np.ndarray:
    """Loudness (n,) of a sound that fades as exp(-decay * seconds), with 10 ms fades at both ends."""
    t = np.arange(n) / SAMPLE_RATE
    ends = np.minimum(1, np.minimum(t, t[::-1]) / 0.01)
    return ends * np.exp(-decay * t)


def tone(pitch: np.ndarray, amplitudes: list[float]) -> np.ndarray:
    """A harmonic sound (n,). pitch: (n,) in Hz; amplitudes: of the fundamental and its overtones."""
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    sound = np.zeros(len(pitch))
    for k, amplitude in enumerate(amplitudes, 1):
        sound += amplitude * np.sin(k * phase)
    return sound


def source(name: str, n: int, rng) -> np.ndarray:
    """n samples of a sound source."""
    t = np.arange(n) / SAMPLE_RATE
    noise = rng.standard_normal(n)
    if name == "siren":
        return tone(900 + 400 * np.sin(2 * np.pi * rng.uniform(1.5, 3) * t), [1, 0.3])
    if name == "engine":
        hum = tone(np.full(n, rng.uniform(60, 110)), [1 / k for k in range(1, 12)])
        return hum + 0.2 * noise
    if name == "rain":
        return noise
    if name == "bell":
        pitch = rng.uniform(500, 900)
        partials = sum(np.sin(2 * np.pi * pitch * k * t) for k in (1, 2.76, 5.4))  # a bell is not harmonic
        return partials * np.exp(-3 * t)
    if name == "bird":
        return tone(3500 + 1200 * np.sin(2 * np.pi * rng.uniform(7, 11) * t), [1])
    knocks_per_second = rng.uniform(6, 9)
    return np.where((t * knocks_per_second) % 1 < 0.1, noise, 0)


def bursts(count: int, rng) -> np.ndarray:
    """A clip with some short beeps, evenly spaced."""
    clip = np.zeros(SECONDS * SAMPLE_RATE)
    n = int(0.18 * SAMPLE_RATE)
    pitch = rng.uniform(400, 1200)
    gap = int(rng.uniform(0.3, 0.4) * SAMPLE_RATE)
    first = int(rng.uniform(0.05, 0.3) * SAMPLE_RATE)
    beep = tone(np.full(n, pitch), [1, 0.5]) * envelope(n)
    for i in range(count):
        start = first + i * gap
        clip[start : start + n] += beep
    return clip


STEPS = {"up": [0, 1, 2, 3], "down": [3, 2, 1, 0], "up then down": [0, 2, 2, 0], "nowhere": [1, 1, 1, 1]}
TIMBRES = {  # amplitudes of the overtones
    "flute": [1],
    "organ": [1, 0, 0.7, 0, 0.5, 0, 0.4],
    "trumpet": [0.6, 1, 1, 0.9, 0.7, 0.5, 0.4, 0.3],
    "harp": [1, 0.5, 0.3, 0.2],
}


def melody(shape: str, instrument: str, rng) -> np.ndarray:
    """A clip with four notes that follow a shape, played on an instrument."""
    n = SECONDS * SAMPLE_RATE // 4
    lowest = rng.uniform(240, 300)  # Hz
    width = rng.uniform(5, 7)  # semitones per step
    decay = 8 if instrument == "harp" else 1
    notes = []
    for step in STEPS[shape]:
        pitch = lowest * 2 ** (step * width / 12)
        notes.append(tone(np.full(n, pitch), TIMBRES[instrument]) * envelope(n, decay))
    return np.concatenate(notes)


# formants, Hz
VOWELS = {"a": (800, 1200), "e": (450, 2100), "i": (280, 2500), "o": (450, 850), "u": (310, 700)}


def voice(vowel: str, contour: str, rng) -> np.ndarray:
    """A vowel whose pitch rises, falls, does both or stays flat."""
    n = int(rng.uniform(1.2, SECONDS) * SAMPLE_RATE)
    x = np.linspace(0, 1, n)
    contours = {"rising": x, "falling": 1 - x, "rising then falling": 1 - abs(2 * x - 1), "flat": 0 * x + 0.5}
    pitch = rng.uniform(130, 160) * 2 ** (contours[contour] * rng.uniform(1.3, 1.6))
    # the nearer an overtone is to a formant, the louder it is
    distance = np.arange(1, 20)[:, None] * pitch.mean() - VOWELS[vowel]  # (19, 2), Hz
    amplitudes = (1 / (1 + (distance / 120) ** 2)).sum(1) + 0.02
    amplitudes[0] += 2  # keeps the fundamental audible
    return tone(pitch, amplitudes) * envelope(n)


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
# a short reason for each answer, in words that the toy's tokenizer knows
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
    """A row in the project's own format, without its audio, and the samples (n,) of its clip."""
    task, ways_to_ask, answers = KINDS[kind]
    choices = [str(choice) for choice in rng.permutation(answers)[:4]]
    answer = choices[rng.integers(4)]

    def draw(part: str) -> str:
        """The answer if the question is about this part of the sound, otherwise a random value."""
        return answer if part == kind else str(rng.choice(KINDS[part][2]))

    if kind == "source":
        n = SECONDS * SAMPLE_RATE
        clip = source(answer, n, rng) * envelope(n)
    elif kind == "count":
        clip = bursts(1 + answers.index(answer), rng)
    elif task == "music":
        clip = melody(draw("melody"), draw("instrument"), rng)
    else:
        clip = voice(draw("vowel"), draw("intonation"), rng)

    clip = clip / np.abs(clip).max() + 0.02 * rng.standard_normal(len(clip))
    row = {"question": str(rng.choice(ways_to_ask)), "choices": choices, "answer": answer}
    row |= {"thought": THOUGHTS[answer], "task": task, "kind": kind}
    return row, clip * rng.uniform(0.2, 0.8)


def make_data(folder: str, split: str, n: int, seed: int) -> None:
    """Write n questions to folder/split.jsonl and their clips to folder/split; the same ones every time."""
    os.makedirs(os.path.join(folder, split), exist_ok=True)
    rng = np.random.default_rng(seed)
    kinds = list(KINDS)
    with open(os.path.join(folder, f"{split}.jsonl"), "w") as file:
        for i in range(n):
            question, clip = make_question(kinds[i % len(kinds)], rng)
            row = {"id": f"{split}-{i}", "audio": f"{split}/{i:04d}.wav", **question}
            soundfile.write(os.path.join(folder, row["audio"]), clip.astype(np.float32), SAMPLE_RATE)
            file.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------- model

# special tokens, besides <|endoftext|>, which every Qwen2Tokenizer has
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]


def make_processor(mels: int, seconds: int) -> Qwen2AudioProcessor:
    """A processor with a window of `seconds` and a tokenizer trained on the toy's questions."""
    texts = ["system\nYou are a helpful assistant.\n", "user\nAudio 1: \n", "assistant\n"]
    for _, ways_to_ask, answers in KINDS.values():
        for question in ways_to_ask:
            texts += [prompt.format(question=question, choices=answers) for prompt in PROMPTS.values()]
        texts += [f"<answer>{answer}</answer>" for answer in answers]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts * 10, 640, new_special_tokens=SPECIAL)
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds), tokenizer)


def make_model(folder: str, seed: int) -> None:
    """Save a randomly initialised Qwen2-Audio of 1.0 M parameters and its processor."""
    processor = make_processor(mels=64, seconds=SECONDS)
    ids = processor.tokenizer.get_vocab()
    set_seed(seed)
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=384,
        d_model=128,
        max_source_positions=SECONDS * 50,
        initializer_range=0.12,
    )
    text = Qwen2Config(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.08,
    )
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=ids["<|AUDIO|>"])
    model = Qwen2AudioForConditionalGeneration(config)

    # Whisper's sinusoids: an encoder with random positions would never learn what comes first
    angle = torch.arange(SECONDS * 50)[:, None] * torch.logspace(0, -4, audio.d_model // 2)
    model.model.audio_tower.embed_positions.weight.data = torch.cat([angle.sin(), angle.cos()], 1)

    # same as in Qwen2-Audio-7B-Instruct: the sampler must ignore all of it except the ids
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.5,
        top_k=20,
        repetition_penalty=1.1,
        eos_token_id=[ids["<|endoftext|>"], ids["<|im_end|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# ---------------------------------------------------------------- making the toy

WARMUP = "--lr 7e-4 --max_steps 260 --prompts_per_step 4 --micro_batch 4 --seed 0 --save_every 300"
COLD_START = "--lr 1e-3 --max_steps 300 --prompts_per_step 4 --micro_batch 4 --seed 0 --save_every 300"
TRAINING = "--lr 4e-4 --max_steps 400 --max_new_tokens 16 --eval_every 50 --save_every 200"


def run_script(name: str, flags: str, log: str = "", share: int = 1) -> None:
    """Run a script in this folder as a single process, even if a launcher started several of this one.

    log: file for the output; empty: the terminal. share: number of scripts that share the cores. Raises
    BadInput if the script fails.
    """
    prefixes = "ACCELERATE_ TORCHELASTIC_ MASTER_ LOCAL_ GROUP_ ROLE_ RANK WORLD_SIZE OMP_"
    launcher = tuple(prefixes.split())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    if share > 1:
        environment |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(share)}  # run_main reads them

    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    command = [sys.executable, script, *flags.split()]
    with open(log, "a") if log else nullcontext() as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=file)
    if done.returncode:
        raise BadInput(f"{name} failed: see {log or 'its message above'}")


def warm_up(start: str, flags: str, name: str) -> None:
    """Train the toy's model `start` with train_sft.py; it gets its final name once it is complete."""
    partial = f"{FOLDER}/warmup"
    shutil.rmtree(partial, ignore_errors=True)
    files = f"--model {FOLDER}/{start} --data {FOLDER}/train.jsonl --output {partial}"
    run_script("train_sft.py", f"{files} {flags}")
    os.rename(partial, f"{FOLDER}/{name}")
    print(f"{partial} is now {FOLDER}/{name}", flush=True)


def make() -> None:
    """Make the toy: data, a random model, and its warm-up with train_sft.py. Replaces an older toy."""
    lock = lock_folder(FOLDER)
    for name in ("base", "thinker", "init", "train", "test", "grpo", "sft", "compare"):
        shutil.rmtree(f"{FOLDER}/{name}", ignore_errors=True)  # runs of another toy cannot be compared
    make_data(FOLDER, "train", N_TRAIN, seed=1)
    make_data(FOLDER, "test", N_TEST, seed=2)
    make_model(f"{FOLDER}/init", seed=0)
    warm_up("init", WARMUP, "base")
    shutil.rmtree(f"{FOLDER}/init")
    lock.release()


# ---------------------------------------------------------------- training on the toy


def toy_flags(method: str, config: TrainConfig) -> list[str]:
    """The flags of train_<method>.py for the toy: its own, overridden by the user's (parsed in `config`).

    Makes the toy if it is missing, and removes the previous run unless it is to be resumed.
    """
    accelerator = Accelerator()
    model = start_model(method, config.prompt)
    flags = f"--model {FOLDER}/{model} --data {FOLDER}/train.jsonl --eval_data {FOLDER}/test.jsonl"
    flags += f" --output {FOLDER}/{method}"
    flags += f" {batch_flags(config.prompts_per_step, accelerator.num_processes)} {TRAINING}"
    if config.prompt == "think":
        flags += " --max_new_tokens 48"

    if accelerator.is_main_process:
        print("Neither --model nor --data is given: this is the offline toy.")
        print("The README has the paper's recipe.")
        make_missing(model)
        if not config.resume and not is_given("--output"):
            remove_run(f"{FOLDER}/{method}")
    words = merge_flags([*flags.split(), *sys.argv[1:]])
    if accelerator.is_main_process:
        print(f"train_{method}.py {' '.join(words)}", flush=True)
    accelerator.wait_for_everyone()
    return words


def merge_flags(words: list[str]) -> list[str]:
    """The same flags, each only once: the last one wins."""
    flags = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flags[name] = [value] if equals else []
        elif flags:
            flags[name].append(word)
    return [word for name, values in flags.items() for word in (name, *values)]


def start_model(method: str, prompt: str) -> str:
    """The toy's model that a run starts from: GRPO with thoughts needs one trained on thoughts."""
    return "thinker" if method == "grpo" and prompt == "think" else "base"


def batch_flags(prompts_per_step: int, processes: int) -> str:
    """Split the prompts of a step evenly, for any number of processes, even more than there are prompts."""
    per_process = max(1, prompts_per_step // processes)
    return f"--prompts_per_step {per_process * processes} --micro_batch {per_process}"


def make_missing(model: str) -> None:
    """Make the toy, and the thinker if that is the model, unless they exist."""
    if not os.path.isdir(f"{FOLDER}/base"):
        size = f"{N_TRAIN + N_TEST} sounds and a tiny model"
        print(f"making it in {FOLDER}: {size}, about a minute", flush=True)
        make()
    if not os.path.isdir(f"{FOLDER}/{model}"):
        print("warming it up with thoughts", flush=True)
        warm_up("base", f"--prompt think {COLD_START}", "thinker")


def remove_run(output: str) -> None:
    """Remove a finished or interrupted run. Raises BadInput if the run is still going."""
    if os.path.isdir(output):
        lock = lock_folder(output)
        shutil.rmtree(output, ignore_errors=True)
        lock.release()


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=kind).parse_args()
    make()


if __name__ == "__main__":
    run_main(main)
