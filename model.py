"""Qwen2-Audio: loading it, LoRA on it, the embeddings of its prompts, and the memory that training it takes."""

import json
import os
import re

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoProcessor, Qwen2AudioForConditionalGeneration

from data import BadInput

LOADABLE = ("config.json", "adapter_config.json")  # a folder with one of these is a model, or LoRA adapters of one


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


def frozen_dtype(module: nn.Module, accelerator: Accelerator) -> torch.dtype:
    """What `load_frozen` keeps a layer in: under bf16 matrices in bf16, as autocast would cast them; the rest in fp32."""
    is_matrix = isinstance(module, (nn.Linear, nn.Conv1d))
    return torch.bfloat16 if is_matrix and accelerator.mixed_precision == "bf16" else torch.float32


def load_frozen(config, accelerator: Accelerator):
    """A model to compute with and not to train, and its processor."""
    model, processor = load_model(config.model)
    for module in model.modules():
        if not list(module.children()):
            module.to(frozen_dtype(module, accelerator))
    return model.eval().requires_grad_(False), processor


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
        model.model.audio_tower.embed_positions.requires_grad_(False)  # sinusoids; from_pretrained forgets that they are fixed
        if config.freeze_audio_encoder:
            model.model.audio_tower.requires_grad_(False)
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


# ------------------------------------------------------------------------------------------------------------- prompts


def encode_audio(model, inputs: dict) -> torch.Tensor:
    """The encoder's output (B, S, D_audio), run only as far as the longest clip sounds and not always 30 s, as its own forward."""
    tower, frames = model.model.audio_tower, inputs["feature_attention_mask"].sum(-1)  # (B,) mel frames that carry sound
    convolved, _ = tower._get_feat_extract_output_lengths(frames)  # (B,) after stride 2
    longest = convolved.max()
    features = inputs["input_features"][..., : 2 * longest + 1].to(tower.conv1.weight.dtype)  # the last frame looks one ahead
    hidden = nn.functional.gelu(tower.conv2(nn.functional.gelu(tower.conv1(features))))[..., :longest].transpose(1, 2)
    hidden = hidden + tower.embed_positions.weight[:longest]
    heard = torch.arange(longest, device=frames.device) < convolved[:, None]  # (B, longest)
    for layer in tower.layers:
        hidden = layer(hidden, heard[:, None, None])
    return tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))


def embed_prompt(model, inputs: dict) -> torch.Tensor:
    """Prompt embeddings (B, P, D), the encoder's output written over the audio placeholders."""
    audio = inputs["encoded_audio"] if "encoded_audio" in inputs else encode_audio(model, inputs)
    audio = model.model.multi_modal_projector(audio)  # (B, S, D)
    _, pooled = model.model.audio_tower._get_feat_extract_output_lengths(inputs["feature_attention_mask"].sum(-1))
    audio = audio[torch.arange(audio.shape[1], device=audio.device) < pooled[:, None]]  # (all placeholders, D)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    placeholder = inputs["input_ids"] == model.config.audio_token_id
    return embeds.masked_scatter(placeholder[..., None], audio.to(embeds.dtype))


def prompt_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, P) that start at 0 where the left padding ends; transformers would count the padding too."""
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)


# -------------------------------------------------------------------------------------------------------------- memory


def check_memory(accelerator: Accelerator, model, config, completion_tokens: int, with_reference: bool) -> None:
    """Say what each process will hold, in GB. Raises BadInput if its GPU has less; warns if activations may need more.

    completion_tokens: the most that one prompt's completions come to. Call it before anything is moved to the GPU.
    """
    weights, trained = list(model.parameters()), [p for p in model.parameters() if p.requires_grad]
    n, shards = sum(p.numel() for p in trained), accelerator.num_processes if accelerator.is_fsdp2 else 1
    held = {"weights": sum(p.numel() * p.element_size() for p in weights), "gradients": 4 * n, "AdamW": 8 * n}
    if with_reference:
        layers = [module for module in model.modules() if not list(module.children())]
        held["reference"] = sum(p.numel() * frozen_dtype(layer, accelerator).itemsize for layer in layers for p in layer.parameters())
    held = {name: size / shards / 1e9 for name, size in held.items()}
    accelerator.print(
        f"{sum(p.numel() for p in weights) / 1e6:,.1f} M parameters, {n / 1e6:,.1f} M of them trained, "
        f"{'sharded over' if accelerator.is_fsdp2 else 'on each of'} {accelerator.num_processes} process(es); held by each, in GB, "
        f"before activations: {', '.join(f'{name} {size:.2f}' for name, size in held.items())}"
    )
    room, needed = free_memory(accelerator.device), sum(held.values())
    helps = [] if config.lora_rank else ["--lora_rank 16", "--config_file fsdp.yaml on more GPUs"]
    helps += ["--beta 0"] if with_reference else []
    if needed > room:
        raise BadInput(f"{needed:.1f} GB do not fit into the {room:.1f} GB that are free on the GPU; what helps: {', '.join(helps)}")
    needed += activations(accelerator, model, config, completion_tokens)
    if needed > room:
        helps += [] if config.gradient_checkpointing else ["--gradient_checkpointing"]
        helps += ["--micro_batch 1"] if config.micro_batch > 1 else []
        helps += ["a lower --max_new_tokens"] if hasattr(config, "group_size") else []
        accelerator.print(
            f"may not fit: clips of full length and {completion_tokens} tokens of completions would take it to about {needed:.0f} GB, "
            f"and {room:.0f} GB are free on the GPU; what helps: {', '.join(helps)}"
        )


def free_memory(device: torch.device) -> float:
    """GB that are free on a GPU; elsewhere nothing is known."""
    return torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else float("inf")


def activations(accelerator: Accelerator, model, config, completion_tokens: int) -> float:
    """GB beyond what is held, about, at the most of sampling or update: clips as long as is heard, all completion tokens drawn."""
    lm, encoder = model.config.text_config, model.config.audio_config
    bf16, frames = accelerator.mixed_precision == "bf16", encoder.max_source_positions
    tokens = frames // 2 + 100 + completion_tokens  # of one prompt, with 100 for its text
    cache = tokens * 2 * lm.num_hidden_layers * lm.num_key_value_heads * (lm.hidden_size // lm.num_attention_heads)
    gathered = sum(p.numel() for p in model.parameters()) if accelerator.is_fsdp2 else 0  # see with_whole_weights
    sampling = (config.prompts_per_step // accelerator.num_processes * cache + gathered) * (2 if bf16 else 4)
    # what autograd keeps in a layer, in bytes a token and unit of width: counted with saved_tensors_hooks
    of_lm, of_encoder = (58, 42) if bf16 else (92, 68)
    layers = tokens * lm.hidden_size * of_lm, frames * encoder.d_model * of_encoder
    update = layers[0] * lm.num_hidden_layers + layers[1] * encoder.encoder_layers
    if config.gradient_checkpointing:  # the input of each layer, 4 bytes, and one layer at a time
        update = update * 4 / of_lm + max(layers)
    logits = completion_tokens * lm.vocab_size * 16
    # autocast keeps a bf16 copy of all that is trained until the backward pass; FSDP2 shards that too
    copies = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad) if bf16 and not accelerator.is_fsdp2 else 0
    return max(sampling, config.micro_batch * (update + logits) + copies) / 1e9
