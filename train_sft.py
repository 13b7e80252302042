"""Supervised fine-tuning, the baseline of R1-AQA (arXiv 2503.11197), and what every training run here needs.

    accelerate launch --mixed_precision bf16 train_sft.py \\
        --model Qwen/Qwen2-Audio-7B-Instruct --data avqa_train.jsonl --output runs/sft            # or: --lora_rank 16

The loss is the mean of -log pi(token | audio, prompt, tokens before) over all answer tokens of a step. The log-probs are
GRPO's, with a group of one: same prompts, same data order, same flags where they mean the same.
"""

import json
import math
import os
import re
import shutil
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, HfArgumentParser, Qwen2AudioForConditionalGeneration
from transformers.hf_argparser import HfArg

from data import PROMPTS, BadInput, Example, check_audio, is_cut, load_audio, load_examples, make_batch, stream_indices, take


@dataclass
class Config:
    model: str = HfArg(default="Qwen/Qwen2-Audio-7B-Instruct", help="hub name or folder of a Qwen2-Audio model")
    data: str = HfArg(default="", help="training questions: JSON or JSON Lines, see README")
    audio_dir: str = HfArg(default="", help="folder of the clips; empty: beside the questions")
    skip_bad_audio: bool = HfArg(default=False, help="pass over clips that cannot be read, and count them, instead of stopping")
    eval_data: str = HfArg(default="", help="questions to measure accuracy on while training; empty: none")
    eval_every: int = HfArg(default=100, help="steps between two such measurements")
    output: str = HfArg(default="runs/sft", help="folder for metrics, checkpoints and the final model")
    prompt: str = HfArg(default="answer", help="plain or answer; there are no thoughts to imitate for think")
    max_new_tokens: int = HfArg(default=256, help="of an answer, when accuracy is measured")
    prompts_per_step: int = HfArg(default=16, help="examples per optimizer step, all processes together")
    micro_batch: int = HfArg(default=1, help="examples in one forward on one process; changes memory, not results")
    lr: float = HfArg(default=1e-5, help="AdamW's learning rate at the start, decaying linearly to 0")
    epochs: float = HfArg(default=1.0, help="passes over the data, where --max_steps does not say")
    max_steps: int = HfArg(default=0, help="optimizer steps; 0: as --epochs says")
    save_every: int = HfArg(default=100, help="steps between checkpoints")
    seed: int = HfArg(default=42, help="of data order and new adapters")
    freeze_audio_encoder: bool = HfArg(default=False, help="train the language model and the projector only")
    lora_rank: int = HfArg(default=0, help="train adapters of this rank (LoRA) in place of the weights; 0: train the weights")
    lora_alpha: float = HfArg(default=32.0, help="what the adapters add is multiplied by alpha / rank")
    lora_dropout: float = HfArg(default=0.0, help="dropout before the adapters")
    lora_target: str = HfArg(
        default="language", help="linear layers with adapters: language, all (the audio encoder's too), or a regular expression"
    )
    merge: bool = HfArg(default=False, help="LoRA: also write the final model with its adapters merged, to merged in --output")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations in the backward pass: less memory")
    log_with: str = HfArg(default="", help="tensorboard or wandb, beside metrics.jsonl")


# ---------------------------------------------------------------------------------- a training run, SFT's or GRPO's


def run(main) -> None:
    """Call main; bad input becomes one line and exit status 1."""
    if not torch.cuda.is_available() and torch.get_num_threads() == 1:  # accelerate launch leaves one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and every flag with its default."""


def parse(config_class, description: str, argv: list[str] | None = None):
    """Flags into a settings dataclass."""
    parser = HfArgumentParser(config_class, description=description, formatter_class=Help)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise BadInput(f"unknown flag or value: {' '.join(unknown)} (--help lists the flags)")
    return config


def check_at_least(config, **bounds) -> None:
    """Raise BadInput for a setting below its bound."""
    for name, least in bounds.items():
        if getattr(config, name) < least:
            raise BadInput(f"--{name} must be at least {least}, not {getattr(config, name)}")


def make_folder(path: str) -> None:
    """Make a folder for results before there are any to lose."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--output {path or repr('')}: cannot be made ({error.strerror})") from None


def start(config) -> tuple[Accelerator, list[Example], list[Example]]:
    """Check what both kinds of training have in common, read the questions, open the output folder."""
    if config.log_with not in ("", "tensorboard", "wandb"):
        raise BadInput(f"--log_with {config.log_with}: unknown, choose tensorboard or wandb")
    # not PartialState(), which overlooks ACCELERATE_USE_CPU and finds one process where there are several
    accelerator = Accelerator(log_with=config.log_with or None, project_dir=config.output)
    if config.prompt not in PROMPTS:
        raise BadInput(f"--prompt {config.prompt}: unknown, choose one of {', '.join(PROMPTS)}")
    if not config.data:
        raise BadInput("--data is missing: the file of training questions")
    check_at_least(config, prompts_per_step=1, micro_batch=1, save_every=1, eval_every=1, max_new_tokens=1, lr=0, seed=0)
    check_at_least(config, lora_rank=0, lora_alpha=0, lora_dropout=0)
    if config.merge and not config.lora_rank:
        raise BadInput("--merge is for LoRA, and --lora_rank is 0: there are no adapters to merge")
    if config.freeze_audio_encoder and config.lora_rank and config.lora_target == "all":
        raise BadInput("--freeze_audio_encoder and --lora_target all contradict each other")
    if config.prompts_per_step % (accelerator.num_processes * config.micro_batch):
        share = f"{accelerator.num_processes} process(es) x --micro_batch {config.micro_batch}"
        raise BadInput(f"--prompts_per_step {config.prompts_per_step} does not divide by {share}")
    examples = load_examples(config.data, config.audio_dir)
    eval_examples = load_examples(config.eval_data, config.audio_dir) if config.eval_data else []
    missing = check_audio(examples + eval_examples, config.skip_bad_audio)
    if os.path.exists(config.output) and (not os.path.isdir(config.output) or os.listdir(config.output)):
        raise BadInput(f"--output {config.output}: already holds a run or other files; remove it or name another folder")

    accelerator.wait_for_everyone()  # until all have seen the folder empty
    if accelerator.is_main_process:
        make_folder(config.output)
    accelerator.init_trackers("r1-aqa", asdict(config))
    if config.log_with and accelerator.is_main_process and not accelerator.trackers:
        raise BadInput(f"--log_with {config.log_with}: not installed, pip install {config.log_with}")
    if missing:
        accelerator.print(f"{missing} of {len(examples + eval_examples)} clips are missing; other rows will stand in for them")
    if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
        accelerator.print("computing in fp32: `accelerate launch --mixed_precision bf16` is several times faster")
    return accelerator, examples, eval_examples


def load_model(path: str, dtype="auto"):
    """A Qwen2-Audio model, known by its config and not by its name, and its processor. A LoRA adapter comes with its base."""
    if base := base_of_adapter(path):
        from peft import PeftModel

        model, processor = load_model(base, dtype)
        try:
            PeftModel.from_pretrained(model, path)  # which puts the adapters into `model` itself
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BadInput(f"{path}: cannot load the adapters ({str(error).strip().splitlines()[0]})") from None
        return model, processor
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != "qwen2_audio":
            raise BadInput(f"{path}: is a {kind} model, and only qwen2_audio is supported")
        processor = AutoProcessor.from_pretrained(path)
        # sdpa takes the masks of shared_prompt_logps; eager attention would read them wrongly
        model = Qwen2AudioForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot load the model ({str(error).strip().splitlines()[0]})") from None
    processor.tokenizer.padding_side = "left"  # for sampling, whatever the hub's tokenizer config says
    return model, processor


def base_of_adapter(path: str) -> str | None:
    """The model that a folder of LoRA adapters belongs to; None if it is no such folder."""
    try:
        with open(os.path.join(path, "adapter_config.json")) as file:
            return json.load(file)["base_model_name_or_path"]
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}/adapter_config.json: names no base model") from None


def load_frozen(config, accelerator: Accelerator):
    """A model to compute with and not to train. Under bf16 its matrices lie in bf16, as autocast would cast them; the rest in fp32."""
    model, processor = load_model(config.model)
    for module in model.modules():
        if not list(module.children()):
            is_matrix = isinstance(module, (torch.nn.Linear, torch.nn.Conv1d))
            module.to(torch.bfloat16 if is_matrix and accelerator.mixed_precision == "bf16" else torch.float32)
    return model.to(accelerator.device).eval().requires_grad_(False), processor


def load_policy(config, accelerator: Accelerator):
    """The model to train, its processor, and under LoRA peft's view of it, which saves the adapters and turns them off."""
    if base_of_adapter(config.model):
        raise BadInput(f"{config.model}: holds LoRA adapters; train on from a merged model (--merge)")
    adapters = None
    if config.lora_rank:
        model, processor = load_frozen(config, accelerator)
        adapters = add_lora(model, config)
    else:
        model, processor = load_model(config.model, torch.float32)  # fp32 masters: at lr 1e-6 bf16 loses the updates
        model.model.audio_tower.requires_grad_(not config.freeze_audio_encoder)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, processor, adapters


def add_lora(model, config):
    """Put adapters, in fp32, into the model itself; the rest of it is frozen."""
    from peft import LoraConfig, get_peft_model

    targets = {"language": r"model\.language_model\..*_proj", "all": r"model\.(language_model|audio_tower)\..*(_proj|fc1|fc2)"}
    target = targets.get(config.lora_target, config.lora_target)
    settings = dict(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=target)
    torch.manual_seed(config.seed)  # half of each adapter starts random
    try:
        return get_peft_model(model, LoraConfig(**settings))
    except (ValueError, re.error) as error:
        raise BadInput(f"--lora_target {config.lora_target}: {str(error).splitlines()[0]}") from None


def next_batch(accelerator: Accelerator, processor, examples: list[Example], config, step: int):
    """This process's B examples of a step: their first place in the stream, themselves, model inputs, metrics of the clips.

    Raises BadInput at a clip that cannot be read. With --skip_bad_audio the next row of the file stands in for it.
    """
    B, batch, waves, skipped = config.prompts_per_step // accelerator.num_processes, [], [], 0
    first = step * config.prompts_per_step + accelerator.process_index * B
    for i in stream_indices(len(examples), config.seed, first, B):
        while len(waves) == len(batch):
            try:
                waves.append(load_audio(examples[i].audio))
            except BadInput as error:
                skipped += 1
                if not config.skip_bad_audio or skipped > len(examples):
                    raise BadInput(f"{examples[i].place}: {error}") from None
                tqdm.write(f"skipped: {examples[i].place}: {error}")
                i = (i + 1) % len(examples)
        batch.append(examples[i])
    inputs = make_batch(processor, batch, waves, config.prompt)
    clips = {"clips_cut": sum(is_cut(processor, wave) for wave in waves) / B, "clips_skipped": skipped / B}
    return first, batch, {name: value.to(accelerator.device) for name, value in inputs.items()}, clips


def write_metrics(accelerator: Accelerator, config, step: int, metrics: dict) -> dict:
    """Mean over processes, as one line of metrics.jsonl and to the trackers; returned as floats of six digits."""
    values = torch.tensor([float(value) for value in metrics.values()], device=accelerator.device)
    values = accelerator.reduce(values, "mean").tolist()
    metrics = {name: float(f"{value:.6g}") for name, value in zip(metrics, values)}
    if accelerator.is_main_process:
        with open(os.path.join(config.output, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
    accelerator.log(metrics, step)
    return metrics


@contextmanager
def written_aside(folder: str):
    """A folder to write a model into; its files then move to `folder`, the one that makes it loadable last."""
    aside = os.path.join(folder, "partial")
    yield aside
    for name in sorted(os.listdir(aside), key=lambda name: name in ("config.json", "adapter_config.json")):
        os.replace(os.path.join(aside, name), os.path.join(folder, name))
    os.rmdir(aside)


def save_model(accelerator: Accelerator, folder: str, model, processor, config, adapters=None) -> None:
    """What `from_pretrained` loads (peft's, for adapters), and the settings (run.json)."""
    if accelerator.is_main_process:
        with written_aside(folder) as aside:
            if adapters:
                adapters.save_pretrained(aside)
            else:
                dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
                model.save_pretrained(aside, state_dict={k: w.to("cpu", dtype) for k, w in model.state_dict().items()})
                model.config.dtype = dtype  # as the weights are stored, not as they were trained
                model.config.save_pretrained(aside)
            processor.save_pretrained(aside)
            with open(os.path.join(aside, "run.json"), "w") as file:
                json.dump(asdict(config), file, indent=2)
    accelerator.wait_for_everyone()


def merge(adapter: str, folder: str) -> None:
    """Write the plain model that adapters and their base make, in the base's own type."""
    base = base_of_adapter(adapter)
    if not base:
        raise BadInput(f"{adapter}: holds no LoRA adapters")
    from peft import PeftModel

    dtype = AutoConfig.from_pretrained(base).dtype
    model, processor = load_model(base, torch.float32)  # a sum in bf16 would lose what little the adapters add
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(dtype)
    with written_aside(folder) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
        shutil.copy(os.path.join(adapter, "run.json"), aside)


# -------------------------------------------------------------------------------------------- supervised fine-tuning


def answer_batch(processor, examples: list[Example], prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers as groups of one: ids and mask (B, 1, T), each ending as the chat template ends a turn."""
    target = "{}" if prompt == "plain" else "<answer>{}</answer>"
    texts = [target.format(example.answer) + "<|im_end|>" for example in examples]
    tokens = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return tokens["input_ids"][:, None], tokens["attention_mask"][:, None].bool()


def train(config: Config) -> None:
    from evaluate import eval_accuracy  # here, for both files import this one
    from train_grpo import Policy

    if config.prompt == "think":
        raise BadInput("--prompt think: the data holds no thoughts to imitate; choose plain or answer")
    accelerator, examples, eval_examples = start(config)
    max_steps = config.max_steps or math.ceil(config.epochs * len(examples) / config.prompts_per_step)
    if max_steps < 1:
        raise BadInput("nothing to do: --max_steps or --epochs must be above 0")
    device = accelerator.device
    model, processor, adapters = load_policy(config, accelerator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr, weight_decay=0.0)
    policy, optimizer = accelerator.prepare(Policy(model), optimizer)

    B = config.prompts_per_step // accelerator.num_processes  # examples of this process
    micro_batches = [slice(i, i + config.micro_batch) for i in range(0, B, config.micro_batch)]
    bar = tqdm(range(max_steps), desc="SFT", disable=not accelerator.is_main_process)
    for step in bar:
        metrics = {}
        if eval_examples and step % config.eval_every == 0:
            metrics["eval_accuracy"] = eval_accuracy(accelerator, model, processor, eval_examples, config)

        began = time.perf_counter()
        _, batch, inputs, clips = next_batch(accelerator, processor, examples, config, step)
        ids, mask = (tensor.to(device) for tensor in answer_batch(processor, batch, config.prompt))
        n_tokens = accelerator.reduce(mask.sum())  # answer tokens of the whole step

        policy.train()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - step / max_steps)
        total = torch.zeros((), device=device)
        for rows in micro_batches:
            with nullcontext() if rows.stop == B else accelerator.no_sync(policy):
                logp = policy(take(inputs, rows), ids[rows], mask[rows])  # (micro_batch, 1, T)
                # DDP takes the mean over processes, and the loss is a sum over all of them
                loss = -logp.sum() / n_tokens * accelerator.num_processes
                accelerator.backward(loss)
            total += loss.detach()
        grad_norm = accelerator.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        metrics |= {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **clips}
        metrics |= {"answer_tokens": n_tokens, "seconds": time.perf_counter() - began}
        done = step + 1
        if done == max_steps and eval_examples:
            metrics["eval_accuracy"] = eval_accuracy(accelerator, model, processor, eval_examples, config)
        metrics = write_metrics(accelerator, config, step, metrics)
        bar.set_postfix_str(f"loss {metrics['loss']:.3f} {metrics['seconds']:.2f} s/step")
        if done % config.save_every == 0:
            save_model(accelerator, os.path.join(config.output, f"checkpoint-{done}"), model, processor, config, adapters)

    save_model(accelerator, config.output, model, processor, config, adapters)
    if config.merge and accelerator.is_main_process:
        merge(config.output, os.path.join(config.output, "merged"))
    accelerator.print(f"the model is in {config.output}, its curves in {config.output}/metrics.jsonl")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run(lambda: train(parse(Config, __doc__)))
