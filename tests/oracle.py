"""The plain way, which the fast way must equal: no packing, no padding, one completion at a time, the model's own forward."""

import torch

from data import load_audio, make_batch


def inputs_of(processor, examples, prompt="answer"):
    return make_batch(processor, examples, [load_audio(example.audio) for example in examples], prompt)


def prompt_alone(processor, example, prompt="answer"):
    inputs = inputs_of(processor, [example], prompt)
    assert inputs["attention_mask"].all()  # alone, a prompt has no padding
    return inputs


def logps_repeated(model, processor, examples, completions, temperature=1.0):
    """Lists [B][G] of log-probs (length,): audio, prompt and completion run anew for each, logits over every position."""
    result = []
    for example, group in zip(examples, completions):
        inputs, rows = prompt_alone(processor, example), []
        P = inputs["input_ids"].shape[1]
        for tokens in group:
            ids = torch.cat([inputs["input_ids"], tokens[None]], 1)
            logits = model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, P - 1 : -1]
            rows.append(torch.log_softmax(logits / temperature, -1)[range(len(tokens)), tokens])
        result.append(rows)
    return result


@torch.no_grad()
def logps_one_by_one(model, processor, example, tokens):
    """Log-probs (length,) from decoding token by token, where the model reads a placeholder as the token that it is."""
    inputs = prompt_alone(processor, example)
    out, logps = model(**inputs, use_cache=True), []
    for i, token in enumerate(tokens):
        logps.append(torch.log_softmax(out.logits[0, -1], -1)[token])
        position = torch.tensor([[inputs["input_ids"].shape[1] + i]])
        out = model(input_ids=token.view(1, 1), position_ids=position, past_key_values=out.past_key_values, use_cache=True)
    return torch.stack(logps)


def pad(completions):
    """Lists [B][G] of tokens (length,) as ids and mask (B, G, T); the filler is a real token, to be told by the mask."""
    T = max(len(o) for group in completions for o in group)
    ids = torch.full((len(completions), len(completions[0]), T), 7)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for b, group in enumerate(completions):
        for g, o in enumerate(group):
            ids[b, g, : len(o)] = o
            mask[b, g, : len(o)] = True
    return ids, mask
