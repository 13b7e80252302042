"""What every training run here needs, whether by GRPO or by SFT: flags, model, batches, metrics, saved models.

Nothing in here is about an algorithm; `train_grpo.py` and `train_sft.py` are.
"""

import json
import os
import re
import shutil
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from contextlib import contextmanager
from dataclasses import asdict

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, HfArgumentParser, Qwen2AudioForConditionalGeneration

from data import PROMPTS, BadInput, Example, check_audio, is_cut, load_audio, load_examples, make_batch, stream_indices


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
