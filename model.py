"""The audio language model behind every script: loading, LoRA, the policy, sampling, log-probs.

The completions o_1..o_G of a group share audio and prompt. `sample` and `shared_prompt_logps` process both
once per group. `repeated_logps` gives the same numbers the plain, slow way, for the tests and the notebook.
"""

import base64
import hashlib
import importlib.util
import inspect
import io
import json
import os
import warnings
from contextlib import contextmanager
from functools import partial

import numpy as np
import soundfile
import torch
import transformers
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import AutoProcessor, DynamicCache, PreTrainedConfig

from cli import BadInput, located
from data import SAMPLE_RATE, select_rows, window_padding

# On Hopper, cuDNN would handle every attention call. It builds a plan for each new shape, and sampling and
# packing produce new shapes all the time; with a mask, its backward pass gives nan at some lengths
# (github.com/pytorch/pytorch issue 196678, github.com/huggingface/trl issue 7181).
torch.backends.cuda.enable_cudnn_sdp(False)
# Without this, a KV cache that grows step by step fragments CUDA memory. CUDA reads it at startup.
if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"

DEFAULT_MODEL = "Qwen/Qwen2-Audio-7B-Instruct"
MODEL_FILES = ("config.json", "adapter_config.json")  # a folder with either can be loaded
NO_CODE = {"trust_remote_code": False}  # a model is data: never run code that comes with it

# config.model_type -> the class, without "ForConditionalGeneration"
FAMILIES = {
    "qwen2_audio": "Qwen2Audio",
    "qwen2_5_omni": "Qwen2_5OmniThinker",  # only the thinker of a full checkpoint is loaded
    "qwen3_omni_moe": "Qwen3OmniMoeThinker",
    "audioflamingo3": "AudioFlamingo3",
    "musicflamingo": "MusicFlamingo",
    "voxtral": "Voxtral",
    "glmasr": "GlmAsr",
}


# ---------------------------------------------------------------- loading


def load_model(path: str, dtype="auto", four_bit_dtype=None):
    """Load a model, of the class that its config names, and its processor. Adapters go onto their base.

    Raises BadInput unless the model is exactly the one that was saved: every weight found, finite and used,
    and a tokenizer that matches. With a four_bit_dtype, the language model's matrices are stored in 4 bits
    and computed in this dtype (see four_bit_settings).
    """
    if base := base_of_adapters(path):
        with located(f"{path}: the base of these adapters", BadInput):
            model, processor = load_model(base, dtype, four_bit_dtype)
        with located(path):
            add_saved_adapters(model, path)
        return model, processor

    processor = load_processor(path)
    with located(path):
        model_class = getattr(transformers, f"{family(path)}ForConditionalGeneration")
        settings = NO_CODE | (four_bit_settings(four_bit_dtype) if four_bit_dtype else {})
        # sdpa takes the masks of shared_prompt_logps; eager attention would misread them
        model, report = model_class.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **settings
        )
        for kind in ("missing", "unexpected", "mismatched"):
            names = sorted(map(str, report[f"{kind}_keys"]))
            if names:
                raise BadInput(f"the weights do not fit: {len(names)} {kind} keys, first {names[0]}")
        check_finite(model.named_parameters())
        check_tokenizer(processor, model)
        for module in model.modules():
            # on CPU, bitsandbytes would pack a layer's weights at its first use in eval mode: a packed layer
            # passes on no gradient, and its hash is different
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model, processor


def four_bit_settings(compute_dtype: torch.dtype) -> dict:
    """Arguments for from_pretrained to store the language model's matrices in 4 bits, as QLoRA does.

    Everything else stays as it is: audio encoder, projector, embeddings, LM head, and stacked experts.
    """
    if not importlib.util.find_spec("bitsandbytes"):
        raise BadInput("--load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    others = ["lm_head", "model.audio_tower", "model.multi_modal_projector", "model.visual"]
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=others,
    )
    return {"quantization_config": config}


def family(path: str) -> str:
    """The key in FAMILIES of a model's family."""
    with located(path):
        config, _ = PreTrainedConfig.get_config_dict(path)
        if "model_type" not in config:
            raise BadInput("no config.json was found")
        kind = str(config["model_type"]).removesuffix("_thinker")
        if kind not in FAMILIES:
            raise BadInput(f"is a {kind} model; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def load_processor(path: str):
    """A model's processor: tokenizer, feature extractor and chat template. Adapters use their base's."""
    path = base_of_adapters(path) or path
    processor_class = VoxtralProcessor if family(path) == "Voxtral" else AutoProcessor
    with located(path):
        processor = processor_class.from_pretrained(path, **NO_CODE)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # for sampling, whatever the hub's tokenizer config says
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    processor.special_ids = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    # make_inputs asks for this too, but Qwen3-Omni's processor ignores it in transformers 5.23
    processor.audio_kwargs = getattr(processor, "audio_kwargs", {}) | window_padding(processor)
    return processor


class VoxtralProcessor(transformers.VoxtralProcessor):
    """Voxtral's processor takes clips only inside a chat; this one takes text and audio like the others."""

    def apply_chat_template(self, chat, **_) -> str:
        return chat[-1]["content"][-1]["text"]  # __call__ builds the chat around it

    def __call__(self, text, audio, **_):
        chats = []
        for question, wave in zip(text, audio):
            file = io.BytesIO()
            soundfile.write(file, wave, SAMPLE_RATE, format="WAV", subtype="FLOAT")
            clip = {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}
            chats.append([{"role": "user", "content": [clip, {"type": "text", "text": question}]}])
        return super().apply_chat_template(chats, return_tensors="pt")


def check_tokenizer(processor, model) -> None:
    """Raise BadInput if the tokenizer cannot round-trip text, or its tokens are not the model's."""
    tokenizer = processor.tokenizer
    text = "Which one barks? <answer>the dog</answer>"
    if tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() != text:
        raise BadInput(f"the tokenizer ({len(tokenizer)} tokens) cannot round-trip text; is a file missing?")
    embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        raise BadInput(f"the tokenizer has {len(tokenizer)} tokens; the model has {embeddings} embeddings")
    placeholder = tokenizer.convert_tokens_to_ids(processor.audio_token)
    if placeholder != model.config.audio_token_id:
        ids = f"{placeholder} for the processor but {model.config.audio_token_id} for the model"
        raise BadInput(f"the audio placeholder is token {ids}: the model would get no audio")


def check_finite(named_weights) -> None:
    """Raise BadInput if one of the (name, tensor) pairs contains nan or inf."""
    for name, weight in named_weights:
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        # one pass without copies, a minute faster on 8e9 values than isfinite().all(); aminmax keeps nan
        smallest, largest = weight.aminmax()
        if not (smallest.isfinite() and largest.isfinite()):
            raise BadInput(f"{name} has values that are nan or inf")


def base_of_adapters(path: str) -> str | None:
    """The base model of a folder of LoRA adapters; None if the folder has no adapters."""
    config = os.path.join(path, "adapter_config.json")
    if not os.path.isfile(config):
        return None
    with located(config), open(config) as file:
        return json.load(file)["base_model_name_or_path"]


def add_saved_adapters(model, path: str):
    """Load saved adapters into their base; returns the PeftModel. Raises BadInput if they do not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    settings = os.path.join(path, "run.json")
    if os.path.exists(settings):
        with open(settings) as file:
            settings = json.load(file)
        # 4-bit and other weights have different hashes: between such bases adapters can move unchecked
        is_comparable = settings.get("load_in_4bit", False) == getattr(model, "is_quantized", False)
        base_hash = settings.get("base_hash") if is_comparable else None
        if base_hash not in (None, weights_hash(model)):
            raise BadInput("the base model does not have the weights that these adapters were trained on")
    adapters = PeftModel.from_pretrained(model, path)
    with safe_open(os.path.join(path, "adapter_model.safetensors"), "pt") as file:
        saved = set(file.keys())
    if wrong := sorted(saved ^ get_peft_model_state_dict(adapters).keys()):
        raise BadInput(f"{len(wrong)} adapters do not fit the base, first {wrong[0]}")
    check_finite((name, p) for name, p in model.named_parameters() if "lora_" in name)
    return adapters


def weights_hash(model) -> str:
    """A short hash of the weights: equal values give the same hash, in bf16 or fp32, on any device.

    For a 4-bit model it is the hash of the loaded 4-bit codes, not of the original weights.
    """
    hashes = {}
    for name, p in model.named_parameters():
        hashes[name] = torch.hash_tensor(p.detach().float()).view(torch.int64)
    hashes = {name: int(value) for name, value in hashes.items()}
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]


def has_model(folder: str | os.PathLike) -> bool:
    """Whether a folder can be loaded: these files are written last, so the others are complete."""
    return any(os.path.exists(os.path.join(folder, name)) for name in MODEL_FILES)


# ---------------------------------------------------------------- policy and reference


class Policy(nn.Module):
    """The module that accelerate wraps. DDP and FSDP2 hook into its forward, which computes log-probs."""

    def __init__(self, model, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.temperature = temperature
        # FSDP2 shards layer by layer: name the classes of all layers
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        self._no_split_modules = sorted({type(layer).__name__ for layers in lists for layer in layers})

    def forward(self, inputs, ids, mask):
        """Log-probs and entropies (B, G, T) of completions (B, G, T); 0 where mask is False."""
        logits = completion_logits(self.model, inputs, ids, mask, self.temperature)  # (n, V)
        logps = token_logps(logits, ids[mask])
        # checkpoint stores no intermediate results, so the gradient costs nothing unless it is used
        entropy = checkpoint(token_entropy, logits, use_reentrant=False)
        return unflatten(logps, mask), unflatten(entropy, mask)

    def initialize(self) -> None:
        """An empty forward pass; see setup() in training.py."""


@contextmanager
def unsharded(policy):
    """Under FSDP2, keep all weights gathered inside the block.

    Otherwise each forward pass gathers them, but in sampling the processes run different numbers of passes.
    """
    shards = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not policy, recurse=False)


def load_policy(config, accelerator: Accelerator):
    """The model to train, its processor, its PeftModel (None without LoRA) and the hash of its weights."""
    if base_of_adapters(config.model):
        raise BadInput(f"{config.model}: contains LoRA adapters; merge them first (python checkpoints.py)")
    # fp32: at a learning rate of 1e-6, updates would round to nothing in bf16. LoRA does not train its base
    four_bit_dtype = None
    if config.load_in_4bit:
        four_bit_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    model, processor = load_model(config.model, "auto" if config.lora_rank else torch.float32, four_bit_dtype)
    base_hash = weights_hash(model)
    if config.lora_rank:
        freeze(model, accelerator)
    else:
        freeze_other_parts(model, config.train or list(PARTS))
    disable_dropout(model)
    adapters = add_lora(model, config) if config.lora_rank else None
    if config.gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:  # its name before transformers 5.23
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, processor, adapters, base_hash


def load_reference(config, accelerator: Accelerator):
    """The reference: the model that training starts from, frozen."""
    model, _ = load_model(config.model)
    freeze(model, accelerator)
    return model


def freeze(model, accelerator: Accelerator) -> None:
    """Freeze all weights. With bf16, matrices become bf16, as autocast would cast them; the rest is fp32.

    4-bit weights stay as they are.
    """
    seen = set()
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        # the matrices of linear layers, convolutions and stacked experts
        is_matrix = isinstance(module, nn.Linear) or any(p.ndim > 2 for p in parameters)
        for p in parameters:
            if not p.is_floating_point():
                continue
            if p not in seen:  # an LM head may share the embedding table, which comes first
                bf16 = is_matrix and accelerator.mixed_precision == "bf16"
                p.data = p.data.to(torch.bfloat16 if bf16 else torch.float32)
                seen.add(p)
    model.eval().requires_grad_(False)


PARTS = {"encoder": "audio_tower.", "projector": "multi_modal_projector.", "language": "language_model."}


def is_in(name: str, parts: list[str]) -> bool:
    """Whether a module or weight belongs to one of these parts of the model (see PARTS)."""
    if name.startswith("lm_head"):
        return "language" in parts
    return any(name.startswith(f"model.{PARTS[part]}") for part in parts)


def freeze_other_parts(model, parts: list[str]) -> None:
    """Freeze everything that is not in these parts, and the encoder's sinusoids, which are never trained."""
    for name, p in model.named_parameters():
        p.requires_grad_(is_in(name, parts))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and is_in(name, ["encoder"]):
            module.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInput(f"--train {' '.join(parts)}: this model has no such part")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: sampling has no dropout, and scoring must match it."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def add_lora(model, config):
    """Add fp32 adapters to a frozen model; returns the PeftModel, which can save them and turn them off."""
    from peft import LoraConfig, get_peft_model

    parts = config.train or ["language"]
    torch.manual_seed(config.seed)  # half of each adapter is initialized at random
    with located(f"--train {' '.join(parts)}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old transformers name
        # list the layers by name: in MoE models, a pattern would make peft adapt the stacked experts too
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = [name for name in layers if is_in(name, parts) and name != "lm_head"]
        if not targets:
            raise BadInput("there are no linear layers to put adapters on")
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
        )
        return get_peft_model(model, lora)


# ---------------------------------------------------------------- prompts


def encode_audio(model, inputs: dict):
    """Output of the audio encoder for B prompts, which can be cached if `encoder_is_frozen`.

    For Qwen2-Audio (B, S, D_audio), before its projector; for others a tuple with one (n, D) per prompt.
    """
    kind = model.config.model_type
    if kind == "qwen2_audio":
        return encode_qwen2_audio(model, inputs)
    B = len(inputs["input_features"])
    if "qwen3" in kind and B > 1:
        # one by one: its own code lets the other clips in a batch change the end of a clip under 1 s
        return tuple(encode_audio(model, select_rows(inputs, slice(b, b + 1)))[0] for b in range(B))

    wanted = inspect.signature(model.model.get_audio_features).parameters
    features = {name: value for name, value in inputs.items() if name in wanted}
    features["input_features"] = features["input_features"].to(model.model.audio_tower.dtype)
    audio = model.model.get_audio_features(**features, return_dict=True).pooler_output  # (placeholders, D)
    placeholders = (inputs["input_ids"] == model.config.audio_token_id).sum(1)  # (B,)
    check_placeholders(placeholders.sum(), audio)
    return audio.split(placeholders.tolist())


def encode_qwen2_audio(model, inputs: dict) -> torch.Tensor:
    """Qwen2-Audio's encoder output (B, S, D_audio): same as its own code, but without the silent padding."""
    tower = model.model.audio_tower
    frames = inputs["feature_attention_mask"].sum(-1)  # (B,) mel frames with sound
    convolved, _ = tower._get_feat_extract_output_lengths(frames)  # (B,) after stride 2
    longest = convolved.max()
    features = inputs["input_features"][..., : 2 * longest + 1]  # the last output looks one frame ahead
    hidden = nn.functional.gelu(tower.conv1(features.to(tower.conv1.weight.dtype)))
    hidden = nn.functional.gelu(tower.conv2(hidden))[..., :longest].transpose(1, 2)
    hidden = hidden + tower.embed_positions.weight[:longest]
    has_sound = torch.arange(longest, device=frames.device) < convolved[:, None]  # (B, longest)
    for layer in tower.layers:
        hidden = layer(hidden, has_sound[:, None, None])
    return tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))


def encoder_is_frozen(model) -> bool:
    """Whether training leaves the output of `encode_audio` unchanged."""
    parts = ("audio_tower.", "multi_modal_projector.")
    if model.config.model_type == "qwen2_audio":
        parts = ("audio_tower.",)  # its projector runs after encode_audio
    return not any(p.requires_grad for name, p in model.model.named_parameters() if name.startswith(parts))


def embed_prompt(model, inputs: dict) -> torch.Tensor:
    """Prompt embeddings (B, P, D), with the encoder's output written over the audio placeholders."""
    audio = inputs["encoded_audio"] if "encoded_audio" in inputs else encode_audio(model, inputs)
    if model.config.model_type == "qwen2_audio":
        audio = model.model.multi_modal_projector(audio)  # (B, S, D)
        frames = inputs["feature_attention_mask"].sum(-1)
        _, pooled = model.model.audio_tower._get_feat_extract_output_lengths(frames)  # (B,)
        audio = audio[torch.arange(audio.shape[1], device=audio.device) < pooled[:, None]]
    else:
        audio = torch.cat(audio)  # (placeholders, D)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    placeholder = inputs["input_ids"] == model.config.audio_token_id
    check_placeholders(placeholder.sum(), audio)
    return embeds.masked_scatter(placeholder[..., None], audio.to(embeds.dtype))


def check_placeholders(count, audio: torch.Tensor) -> None:
    """Raise BadInput unless there is one row of audio (n, D) for each placeholder."""
    if count != len(audio):
        raise BadInput(f"the prompts have {count} audio placeholders for {len(audio)} audio embeddings")


def prompt_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, P), 0 at the first real token; transformers would count the left padding too."""
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)


def additive_mask(visible: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """A mask (B, 1, queries, keys) of 0 and -inf from a bool (B, queries, keys), in attention's dtype.

    A bool mask would be converted again in every layer. Rows are aligned to 8 elements, as kernels require.
    """
    device = embeds.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds.dtype
    B, queries, keys = visible.shape
    aligned = -(-keys // 8) * 8
    mask = torch.full((B, 1, queries, aligned), -torch.inf, dtype=dtype, device=embeds.device)
    return mask[..., :keys].masked_fill_(visible[:, None], 0)


# ---------------------------------------------------------------- sampling


def eos_tokens(model, processor) -> list[int]:
    """Every id that ends a completion in the generation config, the tokenizer or the chat template."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, processor.tokenizer.eos_token_id, end_of_turn(processor)} - {None})


def end_of_turn(processor) -> int:
    """The id that ends the assistant's turn in the chat template; SFT appends it to each answer."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]}
    question = {"role": "user", "content": [{"type": "text", "text": "QUESTION"}]}
    text = processor.apply_chat_template([question, answer], tokenize=False)
    after = processor.tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"]
    if after and after[0] in processor.special_ids:
        return after[0]
    return processor.tokenizer.eos_token_id


def completion_mask(ids: torch.Tensor, eos_ids: list[int]) -> torch.Tensor:
    """(..., T), True up to and including the first EOS. Goes by position: later tokens can be anything."""
    is_eos = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).long()
    return is_eos.cumsum(-1) - is_eos == 0


def sampling_noise(seed: int, first: int, B: int, G: int, T: int) -> torch.Tensor:
    """Uniform numbers (B, G, T) in (0, 1] for prompts first..first+B-1 of the stream.

    They are tied to the prompt, so a sample depends neither on the batch nor on the process.
    """
    noise = []
    for k in range(first, first + B):
        rng = np.random.default_rng((seed, k, 1))  # the 1 keeps this seed apart from the data order's
        noise.append(1 - torch.from_numpy(rng.random((G, T), np.float32)))
    return torch.stack(noise)


def draw(logits: torch.Tensor, u: torch.Tensor, temperature: float) -> torch.Tensor:
    """Tokens (B, G) drawn from logits (B, G, V): the first whose cumulative probability reaches u (B, G)."""
    # fp64, because fp32 sums of 156,000 terms are inexact; mps has no fp64
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    cdf = torch.softmax(logits / temperature, dim=-1, dtype=dtype).cumsum(-1)
    u = u[..., None] * cdf[..., -1:]  # scaled: the cdf does not end at exactly 1
    return torch.searchsorted(cdf, u)[..., 0].clamp_max(logits.shape[-1] - 1)  # clamped: logits may be nan


class SamplingCache(DynamicCache):
    """A KV cache that keeps keys in the dtype of the values: under autocast, rotary embeddings are fp32."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


@torch.no_grad()
def sample(model, inputs: dict, eos_ids: list[int], max_new_tokens: int, temperature=1.0, noise=None):
    """Completions for B prompts: ids (B, G, T), mask (B, G, T) True up to and including the first EOS.

    noise (B, G, max_new_tokens): a uniform number in (0, 1] for each token (see sampling_noise); without
    it, decoding is greedy and G is 1. Raises BadInput if logits are nan or inf.

    The KV cache holds each prompt once: its G completions are decoded side by side in one row, and the mask
    hides them from each other.
    """
    prompt_mask = inputs["attention_mask"]
    device = prompt_mask.device
    B, P = prompt_mask.shape
    G = 1 if noise is None else noise.shape[1]
    eos = torch.tensor(eos_ids, device=device)

    # prefill: each prompt once
    cache = SamplingCache(config=model.config.get_text_config())
    lm = partial(model.model.language_model, past_key_values=cache, use_cache=True)
    embeds = embed_prompt(model, inputs)
    position = prompt_positions(prompt_mask)
    hidden = lm(inputs_embeds=embeds, attention_mask=prompt_mask, position_ids=position).last_hidden_state
    hidden = hidden[:, -1:].expand(-1, G, -1)  # (B, G, D)

    # each round appends G keys, one per completion; a completion sees the prompt and its own keys
    own = torch.eye(G, dtype=torch.bool, device=device).repeat(1, max_new_tokens - 1)  # (G, G * rounds)
    visible = torch.cat([prompt_mask.bool()[:, None].expand(-1, G, -1), own.expand(B, -1, -1)], -1)
    mask = additive_mask(visible, embeds)  # (B, 1, G, P + G * rounds)
    first_position = prompt_mask.sum(1, keepdim=True).expand(-1, G)  # (B, G)

    tokens = []
    ended = torch.zeros(B, G, dtype=torch.bool, device=device)
    finite = torch.ones(B, dtype=torch.bool, device=device)
    while True:
        logits = model.lm_head(hidden).float()  # (B, G, V)
        if noise is None:
            token = logits.argmax(-1)  # (B, G)
        else:
            token = draw(logits, noise[..., len(tokens)], temperature)
        tokens.append(token)
        finite &= logits.isfinite().flatten(1).all(1)
        ended |= torch.isin(token, eos)
        if len(tokens) == max_new_tokens or ended.all():
            break
        embeds = model.get_input_embeddings()(token)
        position = first_position + len(tokens) - 1
        seen = mask[..., : P + G * len(tokens)]
        hidden = lm(inputs_embeds=embeds, attention_mask=seen, position_ids=position).last_hidden_state
    if not finite.all():
        bad = int(finite.long().argmin())
        raise BadInput(f"the model's logits are nan or inf for prompt {bad + 1} of {B} in the batch")
    ids = torch.stack(tokens, -1)  # (B, G, T)
    return ids, completion_mask(ids, eos_ids)


# ---------------------------------------------------------------- log-probs


def repeated_logps(model, inputs: dict, ids: torch.Tensor, mask: torch.Tensor, temperature: float):
    """Same as shared_prompt_logps, but with the model's own forward on G copies of each prompt."""
    B, G, T = ids.shape
    P = inputs["input_ids"].shape[1]
    inputs = {name: value.repeat_interleave(G, 0) for name, value in inputs.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids.flatten(0, 1)], 1)  # (B*G, P+T)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.flatten(0, 1).long()], 1)
    logits = model(**inputs).logits[:, P - 1 : -1].float()  # (B*G, T, V)
    logps = (logits / temperature).log_softmax(-1)
    return logps.gather(2, ids.flatten(0, 1)[..., None]).view(B, G, T) * mask


def completion_logits(model, inputs: dict, ids: torch.Tensor, mask: torch.Tensor, temperature: float):
    """Logits / temperature (n, V), fp32, that predict the n tokens of B x G completions where mask is True.

    One row per prompt, [prompt, o_1, ..., o_G], with no padding in between. A completion sees the prompt and
    itself, and its positions continue the prompt's, so each token sees what it would see in a row of its own:

        prompt p1 p2, o_1 = a1 a2, o_2 = b1      position 0 1 2 3 2      b1 sees p1 p2 b1
    """
    T = ids.shape[2]
    prompt_mask = inputs["attention_mask"].bool()  # (B, P)
    P = prompt_mask.shape[1]

    # pack: the indices into G*T of each row's real tokens, in order, then filler up to N columns
    # (G = 2, T = 3, mask 110 100: indices 0 1 3)
    flat_mask = mask.flatten(1)  # (B, G*T)
    packed = (~flat_mask).long().argsort(dim=1, stable=True)[:, : flat_mask.sum(1).max()]  # (B, N)
    is_real = flat_mask.gather(1, packed)
    completion = packed // T
    t = packed % T
    tokens = ids.flatten(1).gather(1, packed)

    # segment: 0 for the prompt, 1..G for the completions, -1 for padding, which no real token may see
    segment = torch.cat([prompt_mask.long() - 1, torch.where(is_real, completion + 1, -1)], 1)  # (B, P+N)
    position = torch.cat([prompt_positions(prompt_mask), prompt_mask.sum(1, keepdim=True) + t], 1)
    query = segment[:, :, None]
    key = segment[:, None, :]
    is_earlier = position[:, None, :] <= position[:, :, None]
    visible = ((key == 0) | (key == query)) & is_earlier  # (B, P+N, P+N)

    # completions are embedded as plain tokens: a placeholder sampled by chance must not receive audio
    embeds = torch.cat([embed_prompt(model, inputs), model.get_input_embeddings()(tokens)], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=additive_mask(visible, embeds),
        position_ids=position,
        use_cache=False,
    ).last_hidden_state  # (B, P+N, D)

    # the column before a token predicts it; the prompt's last column predicts every first token
    previous = torch.arange(P, P + packed.shape[1], device=ids.device) - 1
    predictor = torch.where(t == 0, P - 1, previous)  # (B, N)
    hidden = hidden.gather(1, predictor[..., None].expand(-1, -1, hidden.shape[-1]))
    return model.lm_head(hidden[is_real]).float() / temperature  # (n, V)


def token_logps(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probs (n,) of tokens (n,) under softmax of logits (n, V)."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy (n,), in nats, of softmax of logits (n, V)."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def unflatten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values (n,) of the tokens where mask (B, G, T) is True, as (B, G, T); 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def shared_prompt_logps(model, inputs: dict, ids: torch.Tensor, mask: torch.Tensor, temperature: float):
    """Log-probs (B, G, T), fp32, of completions under softmax(logits / temperature); 0 after their end."""
    logits = completion_logits(model, inputs, ids, mask, temperature)
    return unflatten(token_logps(logits, ids[mask]), mask)
