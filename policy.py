"""The policy and its reference: which weights are trained, LoRA, what they take of memory."""

import hashlib
import re

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from data import BadInput
from model import base_of_adapter, load_model, shared_prompt_logps


def frozen_dtypes(model: nn.Module, accelerator: Accelerator) -> dict[nn.Parameter, torch.dtype]:
    """The dtype of each frozen weight: under bf16 that is bf16 for matrices, as in autocast; else fp32."""
    dtypes = {}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        # those of convolutions and stacked experts too
        is_matrix = isinstance(module, nn.Linear) or any(p.ndim > 2 for p in own)
        dtype = torch.bfloat16 if is_matrix and accelerator.mixed_precision == "bf16" else torch.float32
        for p in own:  # a table that the LM head shares is the embeddings', which come first
            dtypes.setdefault(p, dtype)
    return dtypes


def load_frozen(config, accelerator: Accelerator):
    """A model that is not trained, and its processor."""
    model, processor = load_model(config.model)
    for p, dtype in frozen_dtypes(model, accelerator).items():
        p.data = p.data.to(dtype)
    return model.eval().requires_grad_(False), processor


def load_policy(config, accelerator: Accelerator):
    """The model to train, its processor, and under LoRA peft's view of it (else None)."""
    if base_of_adapter(config.model):
        raise BadInput(f"{config.model}: holds LoRA adapters; merge them first (python checkpoints.py merge)")
    if config.lora_rank:
        model, processor = load_frozen(config, accelerator)
    else:
        model, processor = load_model(config.model, torch.float32)  # at lr 1e-6 bf16 weights lose the updates
        if config.freeze_audio_encoder:
            model.model.audio_tower.requires_grad_(False)
        for name, module in model.model.named_modules():
            # sinusoids and what only speech output needs; pictures
            if name == "visual" or name.startswith("audio_tower.") and isinstance(module, nn.Embedding):
                module.requires_grad_(False)
    turn_off_dropout(model)
    adapters = add_lora(model, config) if config.lora_rank else None
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, processor, adapters


def turn_off_dropout(model: nn.Module) -> None:
    """A config may ask for it; the sampler has none, so another policy than its own would be scored."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def add_lora(model, config):
    """Put fp32 adapters into a frozen model; returns peft's view, which saves them and turns them off."""
    from peft import LoraConfig, get_peft_model

    pattern = {
        "language": r"model\.language_model\..*_proj",
        "all": r"model\.(language_model|audio_tower)\..*(_proj|fc1|fc2)",
    }.get(config.lora_target, config.lora_target)
    torch.manual_seed(config.seed)  # half of each adapter starts random
    try:
        # by name, for of a mixture of experts peft widens a pattern; its stacked experts stay as they are
        layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        if not (targets := [name for name in layers if re.fullmatch(pattern, name)]):
            raise ValueError("matches no linear layer")
        if "lm_head" in targets:
            raise ValueError("matches lm_head, whose adapters peft saves in a way that cannot be loaded")
        scale = dict(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)
        return get_peft_model(model, LoraConfig(**scale, target_modules=targets))
    except (ValueError, re.error) as error:
        raise BadInput(f"--lora_target {config.lora_target}: {str(error).splitlines()[0]}") from None


def weights_hash(model) -> str:
    """What the weights are, in a few digits: the same for the same values of the same type, on any device."""
    hashes = {name: torch.hash_tensor(p.detach()).view(torch.int64) for name, p in model.named_parameters()}
    hashes = {name: int(value) for name, value in hashes.items()}
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]


class Policy(nn.Module):
    """The module that accelerate wraps: DDP and FSDP2 act in its forward only, so that computes log-probs."""

    def __init__(self, model, temperature: float = 1.0):
        super().__init__()
        self.model, self.temperature = model, temperature
        # what FSDP2 gathers and frees one by one
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        self._no_split_modules = sorted({type(layer).__name__ for layers in lists for layer in layers})

    def forward(self, inputs, ids, mask):
        return shared_prompt_logps(self.model, inputs, ids, mask, self.temperature)

    def call(self, function):
        """Any other use of the model, such as sampling, through the module that FSDP2 wraps."""
        return function()


def with_whole_weights(policy, function):
    """function(), which may run the model as often as it likes on this process.

    Under FSDP2 each forward gathers weights from all processes, and in sampling they run unequal numbers of
    forwards: so all weights are gathered once, before, and freed after.
    """
    shards = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    if not shards:
        return function()

    def gathered():
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        return function()

    try:
        return policy.call(gathered)  # through the policy, which FSDP2 must see first
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)


def check_memory(accelerator: Accelerator, model, separate_reference: bool) -> None:
    """Say what each process will hold, in GB, without activations. Refuses more than its GPU has free."""
    trained = model.num_parameters(only_trainable=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory_gb = {"weights": weights, "gradients": 4 * trained, "AdamW": 8 * trained}
    if separate_reference:
        dtypes = frozen_dtypes(model, accelerator).items()
        memory_gb["reference"] = sum(p.numel() * dtype.itemsize for p, dtype in dtypes)
    shards = accelerator.num_processes if accelerator.is_fsdp2 else 1
    memory_gb = {name: size / shards / 1e9 for name, size in memory_gb.items()}
    parts = ", ".join(f"{name} {size:.2f}" for name, size in memory_gb.items())
    counts = f"{model.num_parameters() / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained"
    where = f"{'sharded over' if shards > 1 else 'on each of'} {accelerator.num_processes} process(es)"
    accelerator.print(f"{counts}, {where}; GB on each, without activations: {parts}")
    needed, free = sum(memory_gb.values()), free_memory_gb(accelerator.device)
    if needed > free:
        ways = "--lora_rank 16, or --config_file fsdp.yaml on more GPUs"
        raise BadInput(f"{needed:.1f} GB do not fit into the GPU's free {free:.1f} GB; what helps: {ways}")


def free_memory_gb(device: torch.device) -> float:
    """Free memory of a GPU; of other devices nothing is known."""
    return torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else float("inf")
