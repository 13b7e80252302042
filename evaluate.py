"""Accuracy on MMAU, or on any file of questions: greedy answers, scored as the benchmark scores them.

    accelerate launch evaluate.py --model runs/grpo --data mmau-test-mini.json --audio_dir mmau --output runs/eval
"""

import json
import os
from collections import defaultdict
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data import PROMPTS, BadInput, Example, check_audio, decode, eos_tokens, load_examples, make_batch
from rewards import extract_answer, mmau_match
from train_grpo import sample
from train_sft import load_model, parse, run


@dataclass
class Config:
    model: str = HfArg(default="Qwen/Qwen2-Audio-7B-Instruct", help="hub name or folder of a Qwen2-Audio model")
    data: str = HfArg(default="", help="questions: MMAU, or any file that training takes")
    audio_dir: str = HfArg(default="", help="folder of the clips; empty: beside the questions")
    output: str = HfArg(default="runs/eval", help="folder for predictions.json")
    prompt: str = HfArg(default="", help="plain, answer or think; empty: as the model was trained, else answer")
    batch_size: int = HfArg(default=16, help="questions answered together")
    max_new_tokens: int = HfArg(default=256, help="of an answer")
    limit: int = HfArg(default=0, help="answer only the first so many questions; 0: all")


def predict(model, processor, examples: list[Example], prompt: str, batch_size: int, max_new_tokens: int, quiet=False):
    """Greedy completions, in the order of the examples, and the number of clips longer than the model hears."""
    eos_ids, texts, cut = eos_tokens(model, processor), [], 0
    for start in tqdm(range(0, len(examples), batch_size), desc="answering", disable=quiet):
        inputs, longer = make_batch(processor, examples[start : start + batch_size], prompt)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        texts += [group[0] for group in decode(processor, eos_ids, *sample(model, inputs, eos_ids, max_new_tokens))]
        cut += longer
    return texts, cut


def eval_accuracy(accelerator: Accelerator, model, processor, examples: list[Example], config) -> float:
    """Accuracy of a model in training; every process answers its part."""
    mine = examples[accelerator.process_index :: accelerator.num_processes]
    model.eval()
    with accelerator.autocast():
        batch_size = config.prompts_per_step // accelerator.num_processes
        texts, _ = predict(model, processor, mine, config.prompt, batch_size, config.max_new_tokens, quiet=True)
    right = sum(mmau_match(extract_answer(o, config.prompt), e.answer, e.choices) for o, e in zip(texts, mine))
    return accelerator.reduce(torch.tensor(float(right), device=accelerator.device)).item() / len(examples)
