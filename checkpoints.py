"""Checkpoints: models that anyone can load, and the state to resume a run exactly.

    python checkpoints.py runs/grpo-lora/checkpoint-500 --output merged    # merge adapters into their base

A checkpoint is written under a temporary name and renamed once complete. Its `state` folder has tensors
(safetensors) and JSON, no pickle. Seed and step determine data order, samples and dropout, so no RNG state
is saved. The `run` argument of these functions is the Run of training.py.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cli import BadInput, located, run_main
from data import LOCK, write_atomically, write_rows
from model import MODEL_FILES, add_saved_adapters, base_of_adapters, check_finite, load_model

# flags that may differ when a run is resumed: no earlier step depends on them (data is compared by content)
MAY_CHANGE = """output resume save_every keep_states merge log_with eval_data eval_every data audio_dir
    eval_silence skip_bad_audio micro_batch gradient_checkpointing eval_batch_size skip_steps
    samples_every sample_batch""".split()


# ---------------------------------------------------------------- saving


def save_checkpoint(run, step: int) -> None:
    """Write checkpoint-<step>: a model, and in `state` what --resume needs. Every process must call it."""
    accelerator = run.accelerator
    folder = os.path.join(run.config.output, f"checkpoint-{step}")
    partial = f"{folder}.partial"
    try:
        with located(f"{folder}: cannot be saved, older checkpoints are unchanged"):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                os.makedirs(os.path.join(partial, "state"))
            accelerator.wait_for_everyone()
            save_model(run, partial)
            save_state(run, os.path.join(partial, "state"), step)
            flush(partial)
            accelerator.wait_for_everyone()  # until all processes have written
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)  # left over if the run resumed from an earlier step
                os.replace(partial, folder)
                for older in list_states(run.config.output)[: -run.config.keep_states]:
                    shutil.rmtree(os.path.join(older, "state"), ignore_errors=True)
            accelerator.wait_for_everyone()
    except BadInput:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save_final(run) -> None:
    """Write the trained model to --output; with --merge, also a merged one to its folder `merged`."""
    output = run.config.output
    partial = os.path.join(output, "final.partial")
    with located(f"{output}: the model cannot be saved"):
        save_model(run, partial)
        if run.accelerator.is_main_process:
            flush(partial)
            if run.config.merge:
                merged = os.path.join(output, "merged")
                shutil.rmtree(merged, ignore_errors=True)
                merge(partial, merged)
            # the file that makes a folder loadable comes last
            for name in sorted(os.listdir(partial), key=lambda name: name in MODEL_FILES):
                os.replace(os.path.join(partial, name), os.path.join(output, name))
            os.rmdir(partial)
    run.accelerator.wait_for_everyone()


def save_model(run, folder: str) -> None:
    """Write what `from_pretrained` loads (peft's, for adapters), and run.json. Every process must call it."""
    accelerator = run.accelerator
    model = run.model
    if run.adapters:  # gather only the trained weights, not the base
        state_dict = {}
        for name, p in accelerator.unwrap_model(run.policy).named_parameters():
            if p.requires_grad:
                state_dict[name] = gathered(p.detach())
    else:
        state_dict = accelerator.get_state_dict(run.policy)
    if not accelerator.is_main_process:
        return

    state_dict = {name.removeprefix("model."): weight for name, weight in state_dict.items()}
    missing = run.saved_names - state_dict.keys()
    if missing:  # a wrapper may have renamed them; then nobody could load the model
        raise BadInput(f"{len(missing)} weights are missing from the state, first {min(missing)}")
    weights = {name: state_dict[name] for name in sorted(run.saved_names)}
    check_finite(weights.items())
    if run.adapters:
        weights = {f"base_model.model.{name}": weight for name, weight in weights.items()}
        run.adapters.save_pretrained(folder, state_dict=weights)
    else:
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        weights = {name: weight.to("cpu", dtype) for name, weight in weights.items()}
        model.save_pretrained(folder, state_dict=weights)
        parts = [getattr(model.config, name) for name in model.config.sub_configs]
        for config in (model.config, *parts):
            config.dtype = dtype  # the dtype of the stored weights, not the one used in training
        model.config.save_pretrained(folder)
    run.processor.save_pretrained(folder)
    write_settings(run, folder)


def write_settings(run, folder: str) -> None:
    """Write run.json. Evaluation reads the prompt from it, and the report reads the settings."""
    settings = asdict(run.config) | {"base_hash": run.base_hash}
    write_atomically(os.path.join(folder, "run.json"), json.dumps(settings, indent=2))


def names_to_save(model, adapters) -> set[str]:
    """Names of the weights in a checkpoint: the adapters, or all weights, tied ones by their first name."""
    names = {name for name, p in model.named_parameters() if p.requires_grad or not adapters}
    if not adapters:
        names |= dict(model.named_buffers()).keys() & model.state_dict().keys()  # only the persistent ones
    return names


def save_state(run, folder: str, step: int) -> None:
    """Write what --resume needs besides the model: this process's trained weights and optimizer state."""
    shard, shards = shard_of(run.accelerator)
    tensors = {}
    if shards > 1 or run.accelerator.is_main_process:
        for name, p in run.accelerator.unwrap_model(run.policy).named_parameters():
            if p.requires_grad:
                values = {"weight": p.detach(), **run.optimizer.state[p]}
                for key, value in values.items():
                    tensors[f"{key} {name}"] = local_shard(value).contiguous()
        save_file(tensors, os.path.join(folder, f"process-{shard}.safetensors"))
    if run.accelerator.is_main_process:
        state = {
            "step": step,
            "shards": shards,
            "data_hash": run.data_hash,
            "base_hash": run.base_hash,
            "config": resume_settings(run),
            "tensors": sorted(tensors),
        }
        write_atomically(os.path.join(folder, "state.json"), json.dumps(state, indent=2))


def shard_of(accelerator) -> tuple[int, int]:
    """This process's shard of the state, and how many there are; without FSDP2, one shard is all of it."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator.is_fsdp2 else (0, 1)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor: under FSDP2 its shard, else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor: under FSDP2 gathered from all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def resume_settings(run) -> dict:
    """The settings that a resumed run must share with the first one, except for MAY_CHANGE."""
    return asdict(run.config) | {"mixed_precision": run.accelerator.mixed_precision}


def flush(folder: str) -> None:
    """Wait until all files in a folder are on disk: the machine may crash, not only the process."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with suppress(FileNotFoundError), open(path, "rb+") as file:  # another process may rename it
                os.fsync(file.fileno())


# ---------------------------------------------------------------- which code made this run

MAX_PATCH_BYTES = 1_000_000


def record_code(run) -> None:
    """Write run.json, and record in code.json which code the run uses from its first step on.

    code.json is a list: resuming with different code adds an entry. The patch is the diff against the commit,
    including new scripts. Outside a git checkout there is no commit or patch to record.
    """
    output = run.config.output
    write_settings(run, output)
    commit, patch = git_state()
    packages = ("torch", "transformers", "accelerate", "peft")
    code = {
        "step": run.first_step,
        "commit": commit,
        "patch": f"code-{run.first_step}.patch" if patch else "",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    path = os.path.join(output, "code.json")
    entries = []
    if run.first_step > 0 and os.path.exists(path):
        with located(path), open(path) as file:
            entries = json.load(file)
    if entries:
        before = entries[-1]
        old_patch = ""
        if before["patch"]:
            old_patch = Path(output, before["patch"]).read_text(encoding="utf-8", errors="replace")
        same = all(before[key] == code[key] for key in ("commit", "versions")) and old_patch == patch
        if same:
            return
        run.accelerator.print("--resume: the code or a package has changed since; see code.json")
    if patch:
        write_atomically(os.path.join(output, code["patch"]), patch)
    write_atomically(path, json.dumps([*entries, code], indent=2))


def git_state() -> tuple[str, str]:
    """The commit of this checkout and the diff against it, including new scripts; both "" without git."""

    def git(*words: str) -> str:
        folder = os.path.dirname(os.path.abspath(__file__))
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True)
        return done.stdout.decode("utf-8", "replace")

    try:
        commit = git("rev-parse", "HEAD").strip()
        patch = git("diff", "HEAD")
        for script in git("ls-files", "--others", "--exclude-standard", "*.py").splitlines():
            text = Path(os.path.dirname(os.path.abspath(__file__)), script).read_text(errors="replace")
            lines = text.splitlines()
            patch += f"--- /dev/null\n+++ b/{script}\n@@ -0,0 +1,{len(lines)} @@\n"
            patch += "".join(f"+{line}\n" for line in lines)
    except (OSError, subprocess.CalledProcessError):
        return "", ""
    return commit, patch.encode()[:MAX_PATCH_BYTES].decode("utf-8", "ignore")


# ---------------------------------------------------------------- resuming


def resume(run) -> int:
    """The step to start at: 0, or with --resume the newest checkpoint's, whose state is loaded."""
    accelerator = run.accelerator
    output = run.config.output
    if not run.config.resume:
        return 0
    folders = list_states(output)
    accelerator.wait_for_everyone()  # until all processes have seen the same checkpoints
    if folders:
        accelerator.print(f"--resume: continuing from {folders[-1]}")
        step = load_state(run, os.path.join(folders[-1], "state"))
    else:
        check_barely_begun(output)
        accelerator.print(f"--resume: no complete checkpoint in {output}, so this run starts at step 0")
        step = 0
    if accelerator.is_main_process:
        for partial in Path(output).glob("*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        for name in ("metrics.jsonl", "samples.jsonl"):  # later steps will be run again
            path = os.path.join(output, name)
            if os.path.exists(path):
                write_rows(path, [line for line in read_log(path) if line["step"] < step])
    accelerator.wait_for_everyone()
    return step


def check_barely_begun(output: str) -> None:
    """Raise BadInput if the folder has more in it than a run writes before its first checkpoint."""
    expected = {LOCK, "run.json", "code.json", "metrics.jsonl", "samples.jsonl"}
    expected |= {"r1-aqa", "wandb"}  # written by trackers
    found = [name for name in sorted(os.listdir(output)) if name not in expected]
    found = [name for name in found if not name.endswith((".partial", ".patch"))]
    if found:
        raise BadInput(
            f"--resume: {output} has no complete checkpoint, but has {found[0]}; name another --output"
        )


def list_states(output: str) -> list[str]:
    """Checkpoints from which a run can be resumed, oldest first."""
    folders = [str(path.parent.parent) for path in Path(output).glob("checkpoint-*/state/state.json")]
    folders = [folder for folder in folders if re.search(r"-\d+$", folder)]
    return sorted(folders, key=lambda folder: int(folder.rsplit("-", 1)[1]))


def is_saved(run, step: int) -> bool:
    """Whether there is a checkpoint to resume from for this step."""
    return os.path.exists(os.path.join(run.config.output, f"checkpoint-{step}", "state", "state.json"))


def read_log(path: str) -> list[dict]:
    """The lines of metrics.jsonl or samples.jsonl, except incomplete ones left by a killed run."""
    lines = []
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def load_state(run, folder: str) -> int:
    """Load what save_state wrote; returns the step. Raises BadInput if it is damaged or from another run."""
    with located(f"--resume: {folder}"):
        with open(os.path.join(folder, "state.json")) as file:
            state = json.load(file)
        check_same_run(run, state)
        shard, _ = shard_of(run.accelerator)
        tensors = load_file(os.path.join(folder, f"process-{shard}.safetensors"))
        if sorted(tensors) != state["tensors"]:
            raise BadInput("is damaged: its tensors are not those that were saved")
        check_finite(tensors.items())
        for name, p in run.accelerator.unwrap_model(run.policy).named_parameters():
            if not p.requires_grad:
                continue
            copy_into(local_shard(p.data), tensors.pop(f"weight {name}"))
            for key in [key for key in tensors if key.endswith(f" {name}")]:
                value = tensors.pop(key)
                if value.dim():  # a moment has the shape and the sharding of its parameter
                    moment = torch.zeros_like(p.data)
                else:  # the step count: on the CPU, or on the parameter's device if AdamW is fused
                    moment = torch.zeros_like(value, device=p.device if run.fused_optimizer else "cpu")
                copy_into(local_shard(moment), value)
                run.optimizer.state[p][key.split()[0]] = moment
        if tensors:
            raise BadInput(f"belongs to another model: it contains {next(iter(tensors))!r}")
        return state["step"]


def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a saved tensor. Raises BadInput if the shapes differ, since copy_ would broadcast."""
    if target.shape != value.shape:
        raise BadInput(f"is damaged: a tensor has the shape {list(value.shape)}, not {list(target.shape)}")
    target.copy_(value)


def check_same_run(run, state: dict) -> None:
    """Raise BadInput if continuing from this state would not continue the run that was saved."""
    before = state["config"]
    now = resume_settings(run)
    changed = [name for name in now if name not in MAY_CHANGE and before[name] != now[name]]
    if changed:
        flags = ", ".join(f"--{name} {now[name]} (was {before[name]})" for name in changed)
        raise BadInput(f"these flags differ from the saved run's: {flags}")
    if state["data_hash"] != run.data_hash:
        raise BadInput(f"{run.config.data} is not the file that the run was started with")
    if state["base_hash"] != run.base_hash:
        raise BadInput(f"{run.config.model} does not have the weights that the run was started from")
    _, shards = shard_of(run.accelerator)
    if state["shards"] != shards:
        raise BadInput(f"was saved in {state['shards']} shard(s), but this run has {shards}")


# ---------------------------------------------------------------- merging


def merge(adapters: str, output: str) -> None:
    """Merge LoRA adapters into their base and write a plain model, in the base's dtype."""
    output = os.path.normpath(output)  # drop a trailing slash
    base = base_of_adapters(adapters)
    if not base:
        raise BadInput(f"{adapters}: contains no LoRA adapters")
    if os.path.exists(output):
        raise BadInput(f"{output}: already exists; remove it or name another folder")
    model, processor = load_model(base)
    dtype = model.dtype
    with located(adapters):
        model = add_saved_adapters(model.float(), adapters)  # adding in bf16 would lose the small updates
    model = model.merge_and_unload().to(dtype)

    partial = f"{output}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    settings = os.path.join(adapters, "run.json")
    if os.path.exists(settings):
        shutil.copy(settings, partial)
    os.replace(partial, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=merge.__doc__)
    parser.add_argument("adapters", help="folder of LoRA adapters: a run, or a checkpoint of one")
    parser.add_argument("--output", required=True, help="folder for the merged model")
    flags = parser.parse_args()
    merge(flags.adapters, flags.output)


if __name__ == "__main__":
    run_main(main)
