"""Accuracy on MMAU, or on any file of questions: greedy answers, scored as the benchmark scores them.

    accelerate launch evaluate.py --model runs/grpo --data mmau-test-mini.json --audio_dir mmau --output runs/eval
"""

import json
import os
from collections import defaultdict
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data import PROMPTS, BadInput, Example, check_audio, decode, eos_tokens, load_examples, make_batch
from rewards import extract_answer, mmau_match
from train_grpo import sample
from train_sft import check_at_least, load_model, make_folder, parse, run


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


def trained_prompt(model: str) -> str:
    """The prompt style that a checkpoint of ours was trained with (its run.json), else the default."""
    try:
        with open(os.path.join(model, "run.json")) as file:
            return json.load(file)["prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        return "answer"


def main() -> None:
    config = parse(Config, __doc__)
    if not config.data:
        raise BadInput("--data is missing: the file of questions")
    prompt = config.prompt or trained_prompt(config.model)
    if prompt not in PROMPTS:
        raise BadInput(f"--prompt {prompt}: unknown, choose one of {', '.join(PROMPTS)}")
    check_at_least(config, batch_size=1, max_new_tokens=1, limit=0)
    target = os.path.join(config.output, "predictions.json")
    if os.path.exists(target):
        raise BadInput(f"{target}: already there; remove it or name another --output")
    examples = load_examples(config.data, config.audio_dir, need_answers=False)[: config.limit or None]
    check_audio(examples)

    accelerator = Accelerator()
    make_folder(config.output)
    model, processor = load_model(config.model)
    model.to(accelerator.device).eval()
    # every process answers each n-th question; pairs with their places come back
    mine = range(accelerator.process_index, len(examples), accelerator.num_processes)
    quiet = not accelerator.is_main_process
    part = [examples[i] for i in mine]
    texts, cut = predict(model, processor, part, prompt, config.batch_size, config.max_new_tokens, quiet)
    answered = dict(gather_object(list(zip(mine, texts))))
    cut = sum(gather_object([cut]))
    if accelerator.is_main_process:
        rows, right = [], defaultdict(list)
        for i, example in enumerate(examples):
            answer = extract_answer(answered[i], prompt)
            # both keys that the benchmark's own script has used
            rows.append(example.row | {"model_output": answer, "model_prediction": answer, "completion": answered[i]})
            if example.answer is not None:
                correct = mmau_match(answer, example.answer, example.choices)
                for group in ("all", str(example.row.get("task", example.row.get("modality", "no task")))):
                    right[group].append(correct)
        with open(f"{target}.partial", "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2, ensure_ascii=False)
        os.replace(f"{target}.partial", target)
        for group, scores in sorted(right.items(), key=lambda item: (item[0] == "all", item[0])):
            print(f"{group:<12} {sum(scores) / len(scores):6.1%}  {sum(scores)} of {len(scores)}")
        if not right:
            print("the file has no answers, so there is nothing to score")
        if cut:
            seconds = processor.feature_extractor.chunk_length
            print(f"{cut} of {len(examples)} clips are longer than the {seconds} s the model hears; the rest was not heard")
        print(f"prompt {prompt}; predictions in {target}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
