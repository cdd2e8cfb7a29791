"""Continue a prompt, in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stretto.models import Transformer


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: Sequence[int],
    n: int,
    *,
    context: int,
    vocab: int,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    end: int | None = None,
) -> list[int]:
    """`n` more tokens after `prompt`, fewer if `end` comes up; temperature 0 takes the likeliest each time.

    The model sees the last `context` tokens. `top_k` > 0 draws from so many likeliest alone. Raises ValueError for
    an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens: give at least one")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(n):
        window = torch.tensor([tokens[-context:]], device=device)
        logits = model.logits(window)[-1, 0, :vocab].double().cpu()
        if top_k:
            logits[logits < logits.topk(min(top_k, vocab)).values[-1]] = -torch.inf
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
