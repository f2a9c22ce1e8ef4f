from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call
from pointsman.scripts.simulated_engine.prompts import render_chat
from pointsman.scripts.simulated_engine.text import decode_tokens, encode_tokens


async def tokenize(call: Call) -> web.StreamResponse:
    """A `prompt`, or `messages` after the chat template."""
    document = call.json()
    prompt = document.get("prompt", document.get("content"))
    text = prompt.encode() if isinstance(prompt, str) else render_chat(document)
    tokens = encode_tokens(text)
    return await call.send_json(
        {
            "count": len(tokens),
            "max_model_len": call.context.settings.max_model_tokens,
            "tokens": tokens,
            "token_strs": None,
        }
    )


async def detokenize(call: Call) -> web.StreamResponse:
    tokens = call.json().get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, int) and t >= 0 for t in tokens):
        raise ApiError(400, "tokens has to be a list of token ids")
    return await call.send_json({"prompt": decode_tokens(tokens).decode(errors="replace")})
