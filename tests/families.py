"""Tiny random models of every supported kind, using the family's own classes, saved in the hub's layout."""

import base64
import json

import pytest
import transformers
from transformers import GenerationConfig, Qwen2Tokenizer, WhisperFeatureExtractor, set_seed
from transformers import Qwen2VLImageProcessorPil as ImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

import toy
from toy import SECONDS

MELS = 64
NAMES = "qwen2_5_omni qwen3_omni_moe audioflamingo3 musicflamingo voxtral glmasr".split()
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2)
OMNI_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Videos(transformers.BaseImageProcessor):
    """Stand-in for Omni's video processor, which needs torchvision."""


def without_torchvision(monkeypatch):
    """Omni's own processor, with a stand-in for its video part."""
    monkeypatch.setattr(transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *args: object)
    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *args, **kwargs: Videos())


def make_tokenizer(folder, **tokens):
    """The toy's tokenizer with a family's special tokens."""
    toy.make_processor(MELS, SECONDS).tokenizer.save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=tokens)


def make_tekken(folder):
    """Voxtral's tokenizer: bytes, and the special tokens with [AUDIO] as token 24."""
    special = (
        "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
    )
    special += " [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT]"
    special += (
        " [/SYSTEM_PROMPT] [TOOL_CONTENT] <20> <21> <22> <23> [AUDIO] [BEGIN_AUDIO] <26> <27> <28> <29>"
    )
    special += " <30> <31> <32> <33> [TRANSCRIBE]"
    special = [{"rank": n, "token_str": text, "is_control": True} for n, text in enumerate(special.split())]
    code = [base64.b64encode(bytes([n])).decode() for n in range(256)]
    config = {"pattern": r"\s+|\S+", "num_vocab_tokens": 256, "version": "v7"}
    config |= {"default_vocab_size": 320, "default_num_special_tokens": 64}
    encoding = {"num_mel_bins": MELS, "hop_length": 160, "window_size": 400}
    tekken = {
        "config": config,
        "vocab": [{"rank": n, "token_bytes": text, "token_str": None} for n, text in enumerate(code)],
        "special_tokens": special,
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": 12.5,
            "audio_encoding_config": encoding,
            "chunk_length_s": 30,
        },
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))
    return transformers.MistralCommonBackend.from_pretrained(folder)


def save(folder, kind, config, tokenizer, processor, end="<|im_end|>"):
    """Save a random model of a class, and its processor; returns the class."""
    set_seed(0)
    config["text_config"]["vocab_size"] = len(tokenizer)
    model = kind(kind.config_class(**config))
    end = tokenizer.convert_tokens_to_ids(end)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0, do_sample=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return kind


def language(size, **more):
    text = dict(hidden_size=size, intermediate_size=3 * size, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=4, head_dim=size // 4, max_position_embeddings=2048)
    return text | dict(initializer_range=0.08) | more


def make_omni(name, folder, size=32, seconds=300, window=20):
    """A thinker. Its extractor pads to `seconds`, its encoder attends over two windows of frames."""
    tokenizer = make_tokenizer(folder, **OMNI_TOKENS)
    audio = dict(d_model=size, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=3 * size)
    audio |= dict(num_mel_bins=MELS, max_source_positions=100, initializer_range=0.12, output_dim=size)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=size)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    rope["mrope_section"] = [size // 16, size // 32, size // 32]
    text = language(size, rope_parameters=rope)
    ids = dict(zip(OMNI_TOKENS, tokenizer.convert_tokens_to_ids(list(OMNI_TOKENS.values()))))
    config = {
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
    }
    if name == "qwen2_5_omni":
        prefix, id_key = "Qwen2_5Omni", "token_index"
        audio |= dict(n_window=window)
        vision |= dict(fullatt_block_indexes=[0])
    else:
        prefix, id_key = "Qwen3OmniMoe", "token_id"
        audio |= dict(n_window_infer=100, downsample_hidden_size=8)
        vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    config |= {f"{modality}_{id_key}": ids[f"{modality}_token"] for modality in ("audio", "image", "video")}
    config |= dict(audio_config=audio, vision_config=vision, text_config=text, initializer_range=0.08)
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=seconds)
    chat = CHAT.replace("PLACEHOLDER", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    parts = (ImageProcessor(), Videos(), extractor, tokenizer)
    processor = getattr(transformers, f"{prefix}Processor")(*parts, chat_template=chat)
    kind = getattr(transformers, f"{prefix}ThinkerForConditionalGeneration")
    return save(folder, kind, config, tokenizer, processor)


def make_voxtral(folder, size=32):
    """Voxtral. Its processor pads to 30 s, whatever the extractor says."""
    pytest.importorskip("mistral_common")
    tokenizer = make_tekken(folder)
    processor = transformers.VoxtralProcessor(WhisperFeatureExtractor(feature_size=MELS), tokenizer)
    # four frames make a token
    audio = dict(hidden_size=size, intermediate_size=4 * size, num_hidden_layers=2, num_attention_heads=4)
    audio |= dict(num_mel_bins=MELS, initializer_range=0.12)
    config = dict(audio_config=audio, text_config=language(size, model_type="llama"), audio_token_id=24)
    kind = transformers.VoxtralForConditionalGeneration
    return save(folder, kind, config, tokenizer, processor, end="</s>")


def make_flamingo(name, folder, size=32):
    """Audio Flamingo 3, Music Flamingo, and GLM-ASR, which is built the same way."""
    prefix = {"audioflamingo3": "AudioFlamingo3", "musicflamingo": "MusicFlamingo", "glmasr": "GlmAsr"}[name]
    chat = CHAT.replace("PLACEHOLDER", "<sound>")
    audio = dict(hidden_size=size, intermediate_size=4 * size, num_hidden_layers=2, num_attention_heads=4)
    audio |= dict(num_mel_bins=MELS, max_source_positions=SECONDS * 50, initializer_range=0.12)
    text = language(size, model_type="llama" if name == "glmasr" else "qwen2")
    tokens, config = {"sound_token": "<sound>"}, dict(audio_config=audio, text_config=text)
    if name == "musicflamingo":
        audio["model_type"] = "audioflamingo3_encoder"
        tokens |= {"bos_token_of_sound": "<|sound_bos|>", "eos_token_of_sound": "<|sound_eos|>"}
        chat = CHAT.replace("PLACEHOLDER", "<|sound_bos|><sound><|sound_eos|>")
    tokenizer = make_tokenizer(folder, **tokens)
    ids = tokenizer.convert_tokens_to_ids(list(tokens.values()))
    config |= dict(zip(("audio_token_id", "audio_bos_token_id", "audio_eos_token_id"), ids))
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS)
    parts = dict(feature_extractor=extractor, tokenizer=tokenizer, chat_template=chat, audio_token="<sound>")
    processor = getattr(transformers, f"{prefix}Processor")(**parts)
    kind = getattr(transformers, f"{prefix}ForConditionalGeneration")
    return save(folder, kind, config, tokenizer, processor)


def make(name, folder):
    """Save a tiny random model of a family with its processor; returns its class."""
    if "omni" in name:
        return make_omni(name, folder)
    return make_voxtral(folder) if name == "voxtral" else make_flamingo(name, folder)
