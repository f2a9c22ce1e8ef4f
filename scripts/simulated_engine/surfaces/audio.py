from email import message_from_bytes
from email.message import Message

from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call
from pointsman.scripts.simulated_engine.prompts import plan_prompt_only


async def transcribe(call: Call) -> web.StreamResponse:
    """Takes a multipart form and says how large its file was; a second of audio costs 50 tokens."""
    form = _read_form(call)
    file = form.get("file")
    if file is None:
        raise ApiError(400, "file is missing")
    audio = file.get_payload(decode=True)
    size_bytes = len(audio) if isinstance(audio, bytes) else 0
    seconds = max(size_bytes // 32_000, 1)
    await call.run([plan_prompt_only(call, b"\0" * (4 * 50 * seconds))])
    return await call.send_json(
        {
            "text": f"{size_bytes} bytes of audio",
            "size_bytes": size_bytes,
            "filename": file.get_filename(),
            "usage": {"type": "duration", "seconds": seconds},
        }
    )


def _read_form(call: Call) -> dict[str, Message]:
    content_type = call.headers.get("Content-Type", "")
    if not content_type.startswith("multipart/form-data"):
        raise ApiError(400, "the body has to be multipart/form-data")
    message = message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + call.body)
    parts = message.get_payload()
    if not isinstance(parts, list):
        raise ApiError(400, "the form has no parts")
    return {
        str(part.get_param("name", header="Content-Disposition")): part for part in parts if isinstance(part, Message)
    }
