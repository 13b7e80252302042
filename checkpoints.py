"""Checkpoints: models that anyone loads, and the state from which a run goes on as if it had never stopped.

A checkpoint is written beside its place and renamed when it is whole. Its `state` folder holds tensors (safetensors) and JSON,
no pickle. Data order, samples and dropout follow from seed and step, so there is no generator to save.
"""

import glob
import json
import os
import re
import shutil
import sys
from dataclasses import asdict

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from data import BadInput, sha256, write_rows, write_whole
from model import LOADABLE, base_of_adapter, load_model
from training import local, read_metrics

# flags that a resumed run may change: what was computed before it does not depend on them (questions are known by their content)
MAY_CHANGE = ("output", "resume", "save_every", "keep_states", "merge", "log_with", "eval_data", "eval_every", "data", "audio_dir")
MAY_CHANGE += ("skip_bad_audio", "micro_batch", "gradient_checkpointing")


def save_model(accelerator: Accelerator, folder: str, policy, model, processor, config, adapters=None) -> None:
    """What `from_pretrained` loads (peft's, for adapters), and the settings (run.json). Every process takes part."""
    weights = {name.removeprefix("model."): weight for name, weight in accelerator.get_state_dict(policy).items()}
    if accelerator.is_main_process:
        if adapters:
            adapters.save_pretrained(folder, state_dict={f"base_model.model.{name}": weight for name, weight in weights.items()})
        else:
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            model.save_pretrained(folder, state_dict={name: weight.to("cpu", dtype) for name, weight in weights.items()})
            model.config.dtype = dtype  # as the weights are stored, not as they were trained
            model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_whole(os.path.join(folder, "run.json"), json.dumps(asdict(config), indent=2))


def shard_of(accelerator: Accelerator) -> tuple[int, int]:
    """Which part of the state this process holds, and of how many; but for FSDP2 every process holds the same."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator.is_fsdp2 else (0, 1)


def settings_of(accelerator: Accelerator, config) -> dict:
    """What a resumed run must share with the one before, but for MAY_CHANGE."""
    return asdict(config) | {"mixed_precision": accelerator.mixed_precision}


def save_state(accelerator: Accelerator, folder: str, step: int, policy, optimizer, config) -> None:
    """What --resume needs besides: trained weights as they are and the optimizer's tensors, by name, of this process's shard."""
    shard, shards = shard_of(accelerator)
    if shards > 1 or accelerator.is_main_process:
        tensors = {}
        for name, p in accelerator.unwrap_model(policy).named_parameters():
            if p.requires_grad:
                tensors |= {f"{key} {name}": local(value) for key, value in {"weight": p.detach(), **optimizer.state[p]}.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, os.path.join(folder, f"process-{shard}.safetensors"))
    if accelerator.is_main_process:
        state = {"step": step, "shards": shards, "data_sha256": sha256(config.data), "config": settings_of(accelerator, config)}
        write_whole(os.path.join(folder, "state.json"), json.dumps(state, indent=2))


def save_final(accelerator: Accelerator, policy, model, processor, config, adapters=None) -> None:
    """The trained model, in --output itself; with --merge also a plain one in its folder `merged`."""
    aside = os.path.join(config.output, "final.partial")
    try:
        save_model(accelerator, aside, policy, model, processor, config, adapters)
        if accelerator.is_main_process:  # the file that makes a folder loadable comes last
            for name in sorted(os.listdir(aside), key=lambda name: name in LOADABLE):
                os.replace(os.path.join(aside, name), os.path.join(config.output, name))
            os.rmdir(aside)
            if config.merge:
                shutil.rmtree(merged := os.path.join(config.output, "merged"), ignore_errors=True)
                merge(config.output, merged)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{config.output}: the model cannot be saved ({error})") from None
    accelerator.wait_for_everyone()


def save_checkpoint(accelerator: Accelerator, step: int, policy, optimizer, model, processor, config, adapters=None) -> None:
    """checkpoint-<step> in --output: a model, and in its folder `state` what --resume needs. It appears when it is whole."""
    folder = os.path.join(config.output, f"checkpoint-{step}")
    aside = f"{folder}.partial"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            os.makedirs(os.path.join(aside, "state"))
        accelerator.wait_for_everyone()
        save_model(accelerator, aside, policy, model, processor, config, adapters)
        save_state(accelerator, os.path.join(aside, "state"), step, policy, optimizer, config)
        os.sync()  # it may be the machine that dies, and not only the process
        accelerator.wait_for_everyone()  # nobody gets past this unless all have written
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was resumed from before it
            os.replace(aside, folder)
            for older in list_states(config.output)[: -config.keep_states]:
                shutil.rmtree(os.path.join(older, "state"), ignore_errors=True)
        accelerator.wait_for_everyone()
    except (OSError, SafetensorError, BadInput) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise BadInput(f"{folder}: cannot be saved ({error}); older checkpoints are as they were") from None


def list_states(output: str) -> list[str]:
    """Checkpoints that a run can be resumed from, oldest first."""
    found = glob.glob(os.path.join(glob.escape(output), "checkpoint-*", "state", "state.json"))
    folders = [os.path.dirname(os.path.dirname(path)) for path in found]
    return sorted((f for f in folders if re.search(r"-\d+$", f)), key=lambda folder: int(folder.rsplit("-", 1)[1]))


def resume(accelerator: Accelerator, policy, optimizer, config) -> int:
    """The step to go on with: 0, or with --resume what the newest checkpoint says, whose weights and optimizer are taken."""
    if not config.resume:
        return 0
    folders = list_states(config.output)
    if any(os.path.exists(os.path.join(config.output, name)) for name in LOADABLE):
        accelerator.print(f"--resume: the run in {config.output} is finished")
        accelerator.end_training()
        sys.exit()
    accelerator.wait_for_everyone()
    if not folders:
        accelerator.print(f"--resume: no complete checkpoint in {config.output}, so this run starts at step 0")
        step = 0
    else:
        accelerator.print(f"--resume: going on from {folders[-1]}")
        step = load_state(accelerator, os.path.join(folders[-1], "state"), policy, optimizer, config)
    if accelerator.is_main_process:
        for left in glob.glob(os.path.join(glob.escape(config.output), "*.partial")):
            shutil.rmtree(left, ignore_errors=True)
        # what came after the checkpoint comes again
        write_rows(os.path.join(config.output, "metrics.jsonl"), [line for line in read_metrics(config.output) if line["step"] < step])
    accelerator.wait_for_everyone()
    return step


def load_state(accelerator: Accelerator, folder: str, policy, optimizer, config) -> int:
    """Take over what save_state wrote; returns the step. Raises BadInput for a state that is damaged or of another run."""
    try:
        with open(os.path.join(folder, "state.json")) as file:
            state = json.load(file)
        settings = settings_of(accelerator, config)
        changed = [name for name, value in settings.items() if name not in MAY_CHANGE and state["config"][name] != value]
        if changed:
            flags = ", ".join(f"--{name} {settings[name]} (it was {state['config'][name]})" for name in changed)
            raise BadInput(f"--resume: these flags would make it another run: {flags}")
        if state["data_sha256"] != sha256(config.data):
            raise BadInput(f"--resume: {config.data} is not the file that the run was started with")
        shard, shards = shard_of(accelerator)
        if state["shards"] != shards:
            raise BadInput(f"--resume: {folder} was saved in {state['shards']} shard(s), and this run has {shards}")
        tensors = load_file(os.path.join(folder, f"process-{shard}.safetensors"))
        for name, p in accelerator.unwrap_model(policy).named_parameters():
            if p.requires_grad:
                local(p.data).copy_(tensors.pop(f"weight {name}"))
                for key in [key for key in tensors if key.endswith(f" {name}")]:
                    value = tensors.pop(key)
                    # a moment is shaped and sharded as its parameter; a copy, for the file may be removed
                    held = torch.zeros_like(p.data if value.dim() else value)
                    local(held).copy_(value)
                    optimizer.state[p][key.split()[0]] = held
        if tensors:
            raise BadInput(f"--resume: {folder} is of another model; it holds {next(iter(tensors))!r}")
        return state["step"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"--resume: {folder} is damaged or of another model ({type(error).__name__}: {error})") from None


def merge(adapter: str, folder: str) -> None:
    """Write the plain model that adapters and their base make, in the base's own type."""
    base = base_of_adapter(adapter)
    if not base:
        raise BadInput(f"{adapter}: holds no LoRA adapters")
    if os.path.exists(folder):
        raise BadInput(f"{folder}: already there; remove it or name another folder")
    from peft import PeftModel

    dtype = AutoConfig.from_pretrained(base).dtype
    model, processor = load_model(base, torch.float32)  # a sum in bf16 would lose what little the adapters add
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(dtype)
    aside = f"{folder}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    if os.path.exists(settings := os.path.join(adapter, "run.json")):
        shutil.copy(settings, aside)
    os.replace(aside, folder)
