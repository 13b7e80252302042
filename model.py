"""An audio language model, as every script uses it: loading any supported kind, LoRA, sampling, log-probs.

The completions o_1..o_G of a group share audio and prompt. `sample` and `shared_prompt_logps` compute both
once per group; `repeated_logps` is the plain, slow way, gives the same numbers, and serves the tests.
"""

import base64
import inspect
import io
import json
import os
from contextlib import contextmanager
from functools import partial

import numpy as np
import soundfile
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from torch import nn
from transformers import AutoProcessor, DynamicCache, PreTrainedConfig

from data import SAMPLE_RATE, BadInput, select_rows, whole_window

# cuDNN would take every attention call on Hopper. It builds a plan for each new shape, and sampling and
# packing make new ones all the time; under a mask its backward pass gives nan at some lengths
# (github.com/pytorch/pytorch issue 196678, github.com/huggingface/trl issue 7181).
torch.backends.cuda.enable_cudnn_sdp(False)
# a KV cache that grows round by round fragments CUDA's memory otherwise; read when CUDA starts
if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"

DEFAULT_MODEL = "Qwen/Qwen2-Audio-7B-Instruct"
LOADABLE = ("config.json", "adapter_config.json")  # a folder with one is a model, or LoRA adapters of one
NO_CODE = {"trust_remote_code": False}  # a model is data: nothing that it brings along is run

# config.model_type -> the class without "ForConditionalGeneration", and the first transformers that fits
FAMILIES = {
    "qwen2_audio": ("Qwen2Audio", "5.10"),
    "qwen2_5_omni": ("Qwen2_5OmniThinker", "5.21"),  # of a full checkpoint the thinker alone is loaded
    "qwen3_omni_moe": ("Qwen3OmniMoeThinker", "5.21"),
    "audioflamingo3": ("AudioFlamingo3", "5.10"),
    "musicflamingo": ("MusicFlamingo", "5.10"),
    "voxtral": ("Voxtral", "5.10"),
    "glmasr": ("GlmAsr", "5.10"),
}


def load_model(path: str, dtype="auto"):
    """A model, known by its config and not by its name, and its processor; adapters come with their base.

    It is exactly what was saved: every weight found, finite and used, the tokenizer whole. Else BadInput.
    """
    if base := base_of_adapter(path):
        model, processor = load_model(base, dtype)
        with loading(path):
            add_saved_adapters(model, path)
        return model, processor
    model_class = getattr(transformers, f"{family(path)}ForConditionalGeneration")
    processor = load_processor(path)
    with loading(path):
        # sdpa takes the masks of shared_prompt_logps; eager attention would read them wrongly
        model, report = model_class.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **NO_CODE
        )
        for what in ("missing", "unexpected", "mismatched"):
            if names := sorted(map(str, report[f"{what}_keys"])):
                raise BadInput(f"its weights do not fit: {len(names)} {what} keys, first {names[0]}")
        check_finite_weights(model.named_parameters())
        check_tokenizer(processor, model)
    return model, processor


def family(path: str) -> str:
    """The name in FAMILIES of the kind that a model is of."""
    with loading(path):
        kind = str(PreTrainedConfig.get_config_dict(path)[0].get("model_type")).removesuffix("_thinker")
        if kind not in FAMILIES:
            raise BadInput(f"is a {kind} model; supported are {', '.join(FAMILIES)}")
        name, since = FAMILIES[kind]
        if Version(transformers.__version__) < Version(since):
            raise BadInput(f"needs transformers {since}, and {transformers.__version__} is installed")
    return name


def load_processor(path: str):
    """A model's processor: its tokenizer, feature extractor and chat template; adapters have their base's."""
    path = base_of_adapter(path) or path
    kind = VoxtralProcessor if family(path) == "Voxtral" else AutoProcessor
    with loading(path):
        try:
            processor = kind.from_pretrained(path, **NO_CODE)
        except ImportError as error:
            wanted = "mistral-common[audio]" if kind is VoxtralProcessor else "pillow torchvision"
            raise BadInput(f"pip install {wanted}: {str(error).strip().splitlines()[0]}") from None
    processor.tokenizer.padding_side = "left"  # for sampling, whatever the hub's tokenizer config says
    # make_batch asks for this too, but in transformers 5.23 Qwen3-Omni's drops what a call asks for
    processor.audio_kwargs = getattr(processor, "audio_kwargs", {}) | whole_window(processor)
    return processor


class VoxtralProcessor(transformers.VoxtralProcessor):
    """Voxtral's takes clips inside a chat only; this one takes texts and clips side by side, as others do."""

    def apply_chat_template(self, chat, **_) -> str:
        return chat[-1]["content"][-1]["text"]  # the chat around it is made in __call__

    def __call__(self, text, audio, **_):
        chats = []
        for question, wave in zip(text, audio):
            clip = io.BytesIO()
            soundfile.write(clip, wave, SAMPLE_RATE, format="WAV", subtype="FLOAT")
            clip = {"type": "audio", "base64": base64.b64encode(clip.getvalue()).decode()}
            chats.append([{"role": "user", "content": [clip, {"type": "text", "text": question}]}])
        return super().apply_chat_template(chats, return_tensors="pt")


@contextmanager
def loading(path: str):
    """Whatever goes wrong inside is said as one line about this model."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{path}: cannot load the model ({reason})") from None


def check_tokenizer(processor, model) -> None:
    """Raise BadInput for a tokenizer that cannot spell, or whose tokens are not the model's."""
    tokenizer, rows = processor.tokenizer, model.get_input_embeddings().weight.shape[0]
    text = "Which one barks? <answer>the dog</answer>"
    if tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() != text:
        raise BadInput(f"its tokenizer, of {len(tokenizer)} tokens, cannot spell; is a file missing?")
    if len(tokenizer) > rows:
        raise BadInput(f"its tokenizer has {len(tokenizer)} tokens, and the model {rows} embeddings")
    placeholder = tokenizer.convert_tokens_to_ids(processor.audio_token)
    if placeholder != model.config.audio_token_id:
        ids = f"{placeholder} to the processor and {model.config.audio_token_id} to the model"
        raise BadInput(f"the audio placeholder is token {ids}, which would answer without hearing")


def check_finite_weights(named_weights) -> None:
    """Raise BadInput for (name, tensor) pairs of which one holds nan or inf."""
    if name := next((name for name, weight in named_weights if not weight.isfinite().all()), None):
        raise BadInput(f"{name} has values that are not finite numbers")


def add_saved_adapters(model, path: str):
    """Put saved adapters into their base; returns peft's view. Refuses names that do not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    adapters = PeftModel.from_pretrained(model, path)
    with safe_open(os.path.join(path, "adapter_model.safetensors"), "pt") as file:
        saved = set(file.keys())
    if wrong := sorted(saved ^ get_peft_model_state_dict(adapters).keys()):
        raise BadInput(f"{len(wrong)} adapters do not fit the base, first {wrong[0]}")
    check_finite_weights((name, p) for name, p in model.named_parameters() if "lora_" in name)
    return adapters


def base_of_adapter(path: str) -> str | None:
    """The model that a folder of LoRA adapters belongs to; None if it is no such folder."""
    try:
        with open(os.path.join(path, "adapter_config.json")) as file:
            return json.load(file)["base_model_name_or_path"]
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}/adapter_config.json: names no base model") from None


# ---------------------------------------------------------------- prompts


def encode_audio(model, inputs: dict):
    """The audio of B prompts, by row, as far as it stays the same while `encoder_is_frozen`.

    Of Qwen2-Audio (B, S, D_audio), without its projector; the others' own code gives (n, D) for each prompt.
    """
    kind, count = model.config.model_type, len(inputs["input_features"])
    if kind == "qwen2_audio":
        return encode_qwen2_audio(model, inputs)
    if "qwen3" in kind and count > 1:
        # its own code lets the end of a clip under 1 s change with the clips beside it
        return tuple(encode_audio(model, select_rows(inputs, slice(n, n + 1)))[0] for n in range(count))
    wanted = inspect.signature(model.model.get_audio_features).parameters
    features = {name: value for name, value in inputs.items() if name in wanted}
    features["input_features"] = features["input_features"].to(model.model.audio_tower.dtype)
    audio = model.model.get_audio_features(**features, return_dict=True).pooler_output  # (placeholders, D)
    placeholders = (inputs["input_ids"] == model.config.audio_token_id).sum(1)  # (B,)
    check_placeholders(placeholders.sum(), audio)
    return audio.split(placeholders.tolist())


def encode_qwen2_audio(model, inputs: dict) -> torch.Tensor:
    """Its encoder's output (B, S, D_audio), as its own forward, but run only as far as there is sound."""
    tower = model.model.audio_tower
    frames = inputs["feature_attention_mask"].sum(-1)  # (B,) mel frames with sound
    convolved, _ = tower._get_feat_extract_output_lengths(frames)  # (B,) after stride 2
    longest = convolved.max()
    features = inputs["input_features"][..., : 2 * longest + 1]  # the last output looks one frame ahead
    hidden = nn.functional.gelu(tower.conv1(features.to(tower.conv1.weight.dtype)))
    hidden = nn.functional.gelu(tower.conv2(hidden))[..., :longest].transpose(1, 2)
    hidden = hidden + tower.embed_positions.weight[:longest]
    audible = torch.arange(longest, device=frames.device) < convolved[:, None]  # (B, longest)
    for layer in tower.layers:
        hidden = layer(hidden, audible[:, None, None])
    return tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))


def encoder_is_frozen(model) -> bool:
    """Whether training leaves what `encode_audio` gives as it is."""
    parts = ("audio_tower.", "multi_modal_projector.")
    if model.config.model_type == "qwen2_audio":
        parts = "audio_tower."  # its projector comes after
    return not any(p.requires_grad for name, p in model.model.named_parameters() if name.startswith(parts))


def embed_prompt(model, inputs: dict) -> torch.Tensor:
    """Prompt embeddings (B, P, D), the encoder's output written over the audio placeholders."""
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


def check_placeholders(n, audio: torch.Tensor) -> None:
    if n != len(audio):
        raise BadInput(f"the prompts have {n} audio placeholders for {len(audio)} of the encoder")


def prompt_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, P), 0 at the first real token; transformers would count the left padding too."""
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)


def additive_mask(visible: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """A mask (B, 1, queries, keys) of 0 and -inf from a bool (B, queries, keys), in the type of attention.

    A bool mask would be converted again in every layer. Rows start at multiples of 8, as the kernels want it.
    """
    device = embeds.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds.dtype
    B, queries, keys = visible.shape
    width = -(-keys // 8) * 8
    mask = torch.full((B, 1, queries, width), -torch.inf, dtype=dtype, device=embeds.device)
    return mask[..., :keys].masked_fill_(visible[:, None], 0)


# ---------------------------------------------------------------- sampling


def eos_tokens(model, processor) -> list[int]:
    """Every id that ends a completion: those of the model's generation config and the tokenizer's own."""
    ids = model.generation_config.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), processor.tokenizer.eos_token_id} - {None})


def turn_end(processor) -> int:
    """The id that ends the assistant's turn in the chat template: what an answer to imitate ends with."""
    tokenizer = processor.tokenizer
    return tokenizer.get_vocab().get("<|im_end|>", tokenizer.eos_token_id)


def completion_mask(ids: torch.Tensor, eos_ids: list[int]) -> torch.Tensor:
    """(..., T), True up to and including the first EOS: by position, for what follows may be any token."""
    is_eos = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).long()
    return is_eos.cumsum(-1) - is_eos == 0


def sampling_noise(seed: int, k: int, G: int, T: int) -> torch.Tensor:
    """Uniform numbers (G, T) in (0, 1] for prompt k; the 1 keeps their seed apart from the data order's."""
    return 1 - torch.from_numpy(np.random.default_rng((seed, k, 1)).random((G, T), np.float32))


def draw(logits: torch.Tensor, u: torch.Tensor, temperature: float) -> torch.Tensor:
    """Tokens (B, G) of logits (B, G, V): the first whose cumulative probability reaches u (B, G)."""
    # fp64, because fp32 sums of 156,000 terms err; mps has no fp64
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    cdf = torch.softmax(logits / temperature, dim=-1, dtype=dtype).cumsum(-1)
    u = u[..., None] * cdf[..., -1:]  # scaled: the cdf does not end at exactly 1
    return torch.searchsorted(cdf, u)[..., 0].clamp_max(logits.shape[-1] - 1)  # where logits are nan


class SamplingCache(DynamicCache):
    """A KV cache whose keys have the type of its values: rotary embeddings return fp32 under autocast."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


class NotFinite(Exception):
    """Logits of a prompt are nan or inf; holds its row in the batch."""


@torch.no_grad()
def sample(model, inputs: dict, eos_ids: list[int], max_new_tokens: int, temperature=1.0, noise=None):
    """Completions of B prompts: ids (B, G, T), mask (B, G, T) True up to and including the first EOS.

    noise (B, G, max_new_tokens): a uniform number in (0, 1] for each token, so that a sample depends on its
    own numbers alone and not on batch or process; None: greedy, G = 1.
    The KV cache holds a prompt once: its G completions are decoded in one row, each blind to the others.
    Raises NotFinite, with the prompt's row, if logits are not finite.
    """
    prompt_mask = inputs["attention_mask"]
    B, G = len(prompt_mask), 1 if noise is None else noise.shape[1]
    eos = torch.tensor(eos_ids, device=prompt_mask.device)
    cache = SamplingCache(config=model.config.get_text_config())
    lm = partial(model.model.language_model, past_key_values=cache, use_cache=True)
    embeds, position = embed_prompt(model, inputs), prompt_positions(prompt_mask)
    hidden = lm(inputs_embeds=embeds, attention_mask=prompt_mask, position_ids=position).last_hidden_state
    hidden = hidden[:, -1:].expand(-1, G, -1)  # (B, G, D)
    # each round appends G keys, one token of each completion; a completion sees only its own
    own = torch.eye(G, dtype=torch.bool, device=eos.device).repeat(1, max_new_tokens - 1)  # (G, G * rounds)
    visible = torch.cat([prompt_mask.bool()[:, None].expand(-1, G, -1), own.expand(B, -1, -1)], -1)
    mask = additive_mask(visible, embeds)  # (B, 1, G, P + G * rounds)
    first_position = prompt_mask.sum(1, keepdim=True).expand(-1, G)  # (B, G)
    done, tokens = torch.zeros_like(first_position, dtype=torch.bool), []
    finite = torch.ones(B, dtype=torch.bool, device=eos.device)
    while True:
        logits = model.lm_head(hidden).float()  # (B, G, V)
        token = logits.argmax(-1) if noise is None else draw(logits, noise[..., len(tokens)], temperature)
        tokens.append(token)
        finite &= logits.isfinite().flatten(1).all(1)
        done |= torch.isin(token, eos)
        if len(tokens) == max_new_tokens or done.all():
            break
        seen = mask[..., : prompt_mask.shape[1] + G * len(tokens)]
        embeds, position = model.get_input_embeddings()(token), first_position + len(tokens) - 1
        hidden = lm(inputs_embeds=embeds, attention_mask=seen, position_ids=position).last_hidden_state
    if not finite.all():
        raise NotFinite(int(finite.long().argmin()))
    ids = torch.stack(tokens, -1)  # (B, G, T)
    return ids, completion_mask(ids, eos_ids)


# ---------------------------------------------------------------- log-probs


def repeated_logps(model, inputs: dict, ids: torch.Tensor, mask: torch.Tensor, temperature: float):
    """The same as shared_prompt_logps, by the model's own forward on G copies; for the tests."""
    (B, G, T), P = ids.shape, inputs["input_ids"].shape[1]
    inputs = {name: value.repeat_interleave(G, 0) for name, value in inputs.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids.flatten(0, 1)], 1)  # (B*G, P+T)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.flatten(0, 1).long()], 1)
    logits = model(**inputs).logits[:, P - 1 : -1].float()  # (B*G, T, V)
    logps = (logits / temperature).log_softmax(-1)
    return logps.gather(2, ids.flatten(0, 1)[..., None]).view(B, G, T) * mask


def shared_prompt_logps(model, inputs: dict, ids: torch.Tensor, mask: torch.Tensor, temperature: float):
    """Log-probs (B, G, T), fp32, of completions under softmax(logits / temperature); 0 where mask is False.

    One row per prompt, [prompt, o_1, ..., o_G], without padding between. A completion sees the prompt and
    itself, and its positions continue the prompt's, so each token sees what it would see in a row of its own:

        prompt p1 p2, o_1 = a1 a2, o_2 = b1      position 0 1 2 3 2      b1 sees p1 p2 b1
    """
    (B, G, T), P = ids.shape, inputs["attention_mask"].shape[1]
    prompt_mask, flat_mask = inputs["attention_mask"].bool(), mask.flatten(1)  # (B, P), (B, G*T)
    # packed: for each row the indices into G*T of its real tokens, in order, then filler up to N columns
    # (G 2, T 3, mask 110 100: indices 0 1 3)
    packed = (~flat_mask).long().argsort(dim=1, stable=True)[:, : flat_mask.sum(1).max()]  # (B, N)
    real = flat_mask.gather(1, packed)
    completion, t = packed // T, packed % T
    tokens = ids.flatten(1).gather(1, packed)

    # segment: 0 the prompt, 1..G the completions, -1 padding, which no prompt or completion token sees
    segment = torch.cat([prompt_mask.long() - 1, torch.where(real, completion + 1, -1)], 1)  # (B, P+N)
    position = torch.cat([prompt_positions(prompt_mask), prompt_mask.sum(1, keepdim=True) + t], 1)
    query, key = segment[:, :, None], segment[:, None, :]
    # a token sees the prompt and its own completion, up to its own position
    visible = ((key == 0) | (key == query)) & (position[:, None, :] <= position[:, :, None])  # (B, P+N, P+N)

    # completions are embedded as plain tokens: a placeholder drawn by chance must not receive audio
    embeds = torch.cat([embed_prompt(model, inputs), model.get_input_embeddings()(tokens)], 1)
    lm = partial(model.model.language_model, attention_mask=additive_mask(visible, embeds), use_cache=False)
    hidden = lm(inputs_embeds=embeds, position_ids=position).last_hidden_state  # (B, P+N, D)

    # the column before a token predicts it; the prompt's last column predicts the first of every completion
    previous = torch.arange(P, P + packed.shape[1], device=ids.device) - 1
    predictor = torch.where(t == 0, P - 1, previous)  # (B, N)
    hidden = hidden.gather(1, predictor[..., None].expand(-1, -1, hidden.shape[-1]))[real]  # (real tokens, D)
    logits = model.lm_head(hidden).float() / temperature
    logps = logits.gather(1, tokens[real][:, None])[:, 0] - logits.logsumexp(-1)
    return logps.new_zeros(B, G * T).masked_scatter(flat_mask, logps).view(B, G, T)
