"""From request documents to prompts, and from prompts to the work of an engine."""

from dataclasses import dataclass
from typing import Any

import orjson

from pointsman.scripts.simulated_engine.context import ApiError, Call, JsonObject
from pointsman.scripts.simulated_engine.driver import Work
from pointsman.scripts.simulated_engine.text import chain_blocks, count_tokens, generate_output, pack_tokens


@dataclass(slots=True, frozen=True)
class Sampling:
    max_tokens: int
    choices: int = 1
    stop: tuple[str, ...] = ()


def read_sampling(call: Call, document: JsonObject, *max_tokens_keys: str) -> Sampling:
    default = call.context.settings.default_max_tokens
    max_tokens = next((document[k] for k in max_tokens_keys if document.get(k) is not None), default)
    choices = document.get("n") or 1
    if not isinstance(max_tokens, int) or max_tokens < 0 or not isinstance(choices, int):
        raise ApiError(400, f"{' / '.join(max_tokens_keys)} and n have to be natural numbers")
    stop = document.get("stop") or ()
    return Sampling(max_tokens, choices, (stop,) if isinstance(stop, str) else tuple(stop))


def render_content(content: Any) -> str:
    """Text parts as they are, any other part as its JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(_render_part, content))
    return orjson.dumps(content).decode()


def _render_part(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return part if isinstance(part, str) else orjson.dumps(part).decode()


def render_chat(document: JsonObject) -> bytes:
    """A chat template that is prefix-stable: a conversation's next turn begins with all of this one."""
    messages = document.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages has to be a non-empty list")
    pieces = []
    if document.get("tools"):
        pieces.append(f"<|tools|>{orjson.dumps(document['tools']).decode()}<|end|>")
    for message in messages:
        if not isinstance(message, dict):
            raise ApiError(400, "every message has to be an object")
        role = message.get("role", "user")
        pieces.append(f"<|{role}|>\n{render_content(message.get('content'))}<|end|>\n")
    if document.get("continue_final_message"):
        pieces[-1] = pieces[-1].removesuffix("<|end|>\n")
    elif document.get("add_generation_prompt", True):
        pieces.append("<|assistant|>\n")
    return "".join(pieces).encode()


def read_prompts(prompt: Any) -> list[bytes]:
    """OpenAI's `prompt` or `input`: a text, texts, a list of token ids or lists of token ids."""
    if isinstance(prompt, str):
        return [prompt.encode()]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, int) for item in prompt):
            return [pack_tokens(prompt)]
        return [_read_prompt(item) for item in prompt]
    raise ApiError(400, "the prompt has to be a text, token ids, or a list of those")


def _read_prompt(item: Any) -> bytes:
    if isinstance(item, str):
        return item.encode()
    if isinstance(item, list) and all(isinstance(token, int) for token in item):
        return pack_tokens(item)
    return orjson.dumps(item)


def plan_generation(call: Call, prompt: bytes, sampling: Sampling) -> Work:
    settings = call.context.settings
    prompt_tokens = max(count_tokens(prompt), 1)
    room = settings.max_model_tokens - prompt_tokens
    if room < 1:
        raise ApiError(
            400,
            f"This model's maximum context length is {settings.max_model_tokens} tokens, "
            f"the prompt has {prompt_tokens}.",
        )
    tokens = generate_output(prompt, min(sampling.max_tokens, room))
    tokens, natural_end = _apply_stop(tokens, sampling.stop)
    text = prompt + "".join(tokens).encode()
    blocks = chain_blocks(text, settings.limits.block_tokens)
    return Work(prompt, prompt_tokens, tokens, natural_end, blocks)


def plan_prompt_only(call: Call, prompt: bytes) -> Work:
    """Embeddings, scores: the request ends with its prompt."""
    return plan_generation(call, prompt, Sampling(max_tokens=0))


def _apply_stop(tokens: list[str], stop: tuple[str, ...]) -> tuple[list[str], str]:
    if not stop:
        return tokens, "length"
    text = "".join(tokens)
    ends = [position for word in stop if word and (position := text.find(word)) >= 0]
    if not ends:
        return tokens, "length"
    kept = text[: min(ends)]
    # Tokens are four characters; the last one kept may be cut.
    return [kept[i : i + 4] for i in range(0, len(kept), 4)], "stop"
