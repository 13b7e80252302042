"""Checkpoints: models that anyone loads, and the state from which a run goes on as if it had never stopped.

    python checkpoints.py merge runs/grpo-lora/checkpoint-500 --output merged    # adapters into their base

A checkpoint is written under another name and renamed when it is whole. Its `state` folder holds tensors
(safetensors) and JSON, no pickle. Data order, samples and dropout follow from seed and step, so no random
state is saved. The `run` of these functions is the Run of training.py.
"""

import json
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data import BadInput, write_rows, write_whole
from flags import run_command
from model import LOADABLE, add_saved_adapters, base_of_adapter, check_finite_weights, load_model

# flags that a resumed run may change: nothing computed before depends on them (data is known by its content)
MAY_CHANGE = """output resume save_every keep_states merge log_with eval_data eval_every data audio_dir
    skip_bad_audio micro_batch gradient_checkpointing eval_batch_size skip_steps samples_every""".split()

# ---------------------------------------------------------------- saving


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor: under FSDP2 its shard, else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor: under FSDP2 gathered from all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_model(run, folder: str) -> None:
    """What `from_pretrained` loads (peft's, for adapters), and run.json. Every process must call it."""
    accelerator, model = run.accelerator, run.model
    if run.adapters:  # gathers what is trained, and not the base around it
        trained = accelerator.unwrap_model(run.policy).named_parameters()
        state_dict = {name: whole(p.detach()) for name, p in trained if p.requires_grad}
    else:
        state_dict = accelerator.get_state_dict(run.policy)
    once = {f"model.{name}" for name, _ in model.named_parameters()}  # of tied weights the first name
    tied = {f"model.{name}" for name, _ in model.named_parameters(remove_duplicate=False)} - once
    weights = {name.removeprefix("model."): weight for name, weight in state_dict.items() if name not in tied}
    check_finite_weights(weights.items())
    if accelerator.is_main_process:
        if run.adapters:
            weights = {f"base_model.model.{name}": weight for name, weight in weights.items()}
            run.adapters.save_pretrained(folder, state_dict=weights)
        else:
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            weights = {name: weight.to("cpu", dtype) for name, weight in weights.items()}
            model.save_pretrained(folder, state_dict=weights)
            parts = [getattr(model.config, name) for name in model.config.sub_configs]
            for config in (model.config, *parts):
                config.dtype = dtype  # as the weights are stored, not as they were trained
            model.config.save_pretrained(folder)
        run.processor.save_pretrained(folder)
        write_whole(os.path.join(folder, "run.json"), json.dumps(asdict(run.config), indent=2))


def shard_of(accelerator: Accelerator) -> tuple[int, int]:
    """Which part of the state this process saves, and of how many; without FSDP2 each has all of it."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator.is_fsdp2 else (0, 1)


def settings_of(run) -> dict:
    """What a resumed run must share with the one before, except for MAY_CHANGE."""
    return asdict(run.config) | {"mixed_precision": run.accelerator.mixed_precision}


def save_state(run, folder: str, step: int) -> None:
    """What --resume needs besides the model: this process's part of trained weights and optimizer."""
    accelerator, tensors = run.accelerator, {}
    shard, shards = shard_of(accelerator)
    if shards > 1 or accelerator.is_main_process:
        for name, p in accelerator.unwrap_model(run.policy).named_parameters():
            if p.requires_grad:
                values = {"weight": p.detach(), **run.optimizer.state[p]}
                tensors |= {f"{key} {name}": local(value).contiguous() for key, value in values.items()}
        save_file(tensors, os.path.join(folder, f"process-{shard}.safetensors"))
    if accelerator.is_main_process:
        state = {"step": step, "shards": shards, "data_hash": run.data_hash, "base_hash": run.base_hash}
        state |= {"config": settings_of(run), "tensors": sorted(tensors)}
        write_whole(os.path.join(folder, "state.json"), json.dumps(state, indent=2))


def save_final(run) -> None:
    """The trained model, in --output itself; with --merge also a plain one in its folder `merged`."""
    output = run.config.output
    partial = os.path.join(output, "final.partial")
    try:
        save_model(run, partial)
        if run.accelerator.is_main_process:  # the file that makes a folder loadable comes last
            flush(partial)
            if run.config.merge:
                shutil.rmtree(merged := os.path.join(output, "merged"), ignore_errors=True)
                merge(partial, output=merged)
            for name in sorted(os.listdir(partial), key=lambda name: name in LOADABLE):
                os.replace(os.path.join(partial, name), os.path.join(output, name))
            os.rmdir(partial)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{output}: the model cannot be saved ({error})") from None
    run.accelerator.wait_for_everyone()


def flush(folder: str) -> None:
    """Wait until every file below a folder is on the disk."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with suppress(FileNotFoundError), open(path, "rb+") as file:  # another process may rename it
                os.fsync(file.fileno())


def save_checkpoint(run, step: int) -> None:
    """Write checkpoint-<step>: a model, and in `state` what --resume needs. It appears when it is whole."""
    accelerator, output = run.accelerator, run.config.output
    folder = os.path.join(output, f"checkpoint-{step}")
    partial = f"{folder}.partial"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(os.path.join(partial, "state"))
        accelerator.wait_for_everyone()
        save_model(run, partial)
        save_state(run, os.path.join(partial, "state"), step)
        flush(partial)  # it may be the machine that dies, and not only the process
        accelerator.wait_for_everyone()  # until all have written
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was resumed from before it
            os.replace(partial, folder)
            for older in list_states(output)[: -run.config.keep_states]:
                shutil.rmtree(os.path.join(older, "state"), ignore_errors=True)
        accelerator.wait_for_everyone()
    except (OSError, SafetensorError, BadInput) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise BadInput(f"{folder}: cannot be saved ({error}); older checkpoints are as they were") from None


# ---------------------------------------------------------------- resuming


def read_metrics(folder: str, name: str = "metrics.jsonl") -> tuple[list[dict], int]:
    """The lines of a run's metrics.jsonl or samples.jsonl, and how many whole ones are none.

    A killed run may end with half a line, which does not count.
    """
    lines, damaged, path = [], 0, os.path.join(folder, name)
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
                lines += [line | {"step": int(line["step"])}] if text.endswith("\n") else []
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged += text.endswith("\n")
    return lines, damaged


def mean_over_processes(run, metrics: dict) -> dict:
    """Means as floats of six digits."""
    values = torch.tensor([float(value) for value in metrics.values()], device=run.accelerator.device)
    values = run.accelerator.reduce(values, "mean").tolist()
    return {name: float(f"{value:.6g}") for name, value in zip(metrics, values)}


def append_metrics(run, step: int) -> None:
    """A line of metrics.jsonl, if there are metrics, and to the trackers."""
    metrics, run.metrics = run.metrics, {}
    if metrics:
        run.accelerator.log(metrics, step)
        append_rows(run, "metrics.jsonl", [{"step": step, **metrics}])


def append_rows(run, name: str, rows: list[dict]) -> None:
    """Append rows, on every process the same, to a JSON Lines file of a run, written as write_rows does."""
    if run.accelerator.is_main_process:
        path = os.path.join(run.config.output, name)
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def is_saved(run, step: int) -> bool:
    """Whether a run can be resumed from a checkpoint after so many steps."""
    return os.path.exists(os.path.join(run.config.output, f"checkpoint-{step}", "state", "state.json"))


def list_states(output: str) -> list[str]:
    """Checkpoints that a run can be resumed from, oldest first."""
    folders = [str(path.parent.parent) for path in Path(output).glob("checkpoint-*/state/state.json")]
    return sorted((f for f in folders if re.search(r"-\d+$", f)), key=lambda f: int(f.rsplit("-", 1)[1]))


def resume(run) -> int:
    """The step to go on with: 0, or with --resume that of the newest checkpoint, whose state is loaded."""
    accelerator, output = run.accelerator, run.config.output
    if not run.config.resume:
        return 0
    folders = list_states(output)
    if any(os.path.exists(os.path.join(output, name)) for name in LOADABLE):
        accelerator.print(f"--resume: the run in {output} is finished")
        accelerator.end_training()
        sys.exit()
    accelerator.wait_for_everyone()
    if not folders:
        accelerator.print(f"--resume: no complete checkpoint in {output}, so this run starts at step 0")
        step = 0
    else:
        accelerator.print(f"--resume: going on from {folders[-1]}")
        step = load_state(run, os.path.join(folders[-1], "state"))
    if accelerator.is_main_process:
        for partial in Path(output).glob("*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            lines, damaged = read_metrics(output, name)
            if damaged:
                accelerator.print(f"--resume: {damaged} lines of {name} cannot be read and are dropped")
            # what came after the checkpoint comes again
            if os.path.exists(path := os.path.join(output, name)):
                write_rows(path, [line for line in lines if line["step"] < step])
    accelerator.wait_for_everyone()
    return step


def load_state(run, folder: str) -> int:
    """Load what save_state wrote; returns the step. Refuses a state that is damaged or of another run."""
    try:
        with open(os.path.join(folder, "state.json")) as file:
            state = json.load(file)
        check_same_run(run, folder, state)
        shard, _ = shard_of(run.accelerator)
        tensors = load_file(os.path.join(folder, f"process-{shard}.safetensors"))
        if sorted(tensors) != state["tensors"]:
            raise BadInput(f"--resume: {folder} is damaged: its tensors are not those that were saved")
        check_finite_weights(tensors.items())
        for name, p in run.accelerator.unwrap_model(run.policy).named_parameters():
            if p.requires_grad:
                copy_into(local(p.data), tensors.pop(f"weight {name}"))
                for key in [key for key in tensors if key.endswith(f" {name}")]:
                    value = tensors.pop(key)
                    # a moment is shaped and sharded as its parameter; a copy, for the file may be removed
                    # AdamW's count of steps lies on the CPU, and with fused=True where the parameter is
                    step_device = p.device if run.optimizer.defaults.get("fused") else "cpu"
                    moment = torch.zeros_like(p.data if value.dim() else value.to(step_device))
                    copy_into(local(moment), value)
                    run.optimizer.state[p][key.split()[0]] = moment
        if tensors:
            raise BadInput(f"--resume: {folder} is of another model; it holds {next(iter(tensors))!r}")
        return state["step"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"--resume: {folder} is damaged or of another model ({reason})") from None


def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    if target.shape != value.shape:  # which copy_ would stretch
        raise ValueError(f"a tensor has the shape {list(value.shape)} and not {list(target.shape)}")
    target.copy_(value)


def check_same_run(run, folder: str, state: dict) -> None:
    """Raise BadInput if a run with this state would not be the run that was saved."""
    before, settings = state["config"], settings_of(run)
    changed = [name for name in settings if name not in MAY_CHANGE and before[name] != settings[name]]
    if changed:
        flags = ", ".join(f"--{name} {settings[name]} (it was {before[name]})" for name in changed)
        raise BadInput(f"--resume: these flags would make it another run: {flags}")
    if state["data_hash"] != run.data_hash:
        raise BadInput(f"--resume: {run.config.data} is not the file that the run was started with")
    if state["base_hash"] != run.base_hash:
        raise BadInput(f"--resume: {run.config.model} has not the weights that the run was started from")
    saved, (_, shards) = state["shards"], shard_of(run.accelerator)
    if saved != shards:
        raise BadInput(f"--resume: {folder} was saved in {saved} shard(s), and this run has {shards}")


# ---------------------------------------------------------------- merging


def merge(adapters: str, *, output: str) -> None:
    """Write the plain model that LoRA adapters and their base make, in the base's own type."""
    base = base_of_adapter(adapters)
    if not base:
        raise BadInput(f"{adapters}: holds no LoRA adapters")
    if os.path.exists(output):
        raise BadInput(f"{output}: already there; remove it or name another folder")
    model, processor = load_model(base)
    dtype = model.dtype
    # a sum in bf16 would lose what little the adapters add
    model = add_saved_adapters(model.float(), adapters).merge_and_unload().to(dtype)
    partial = f"{output}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    if os.path.exists(settings := os.path.join(adapters, "run.json")):
        shutil.copy(settings, partial)
    os.replace(partial, output)


if __name__ == "__main__":
    run_command(__doc__, merge)
