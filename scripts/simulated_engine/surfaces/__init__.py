"""The HTTP surfaces of an engine. A route is (method, path) → handler."""

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call
from pointsman.scripts.simulated_engine.surfaces import (
    audio,
    chat,
    completions,
    control,
    generate,
    info,
    messages,
    operations,
    pooling,
    responses,
    tokens,
)

Handler = Callable[[Call], Awaitable[web.StreamResponse]]

CONTROL_PREFIX = "/_sim/"

# These count as requests, and are what a fault without a path strikes.
INFERENCE_ROUTES: Mapping[str, Handler] = MappingProxyType(
    {
        "/v1/chat/completions": chat.complete_chat,
        "/v1/completions": completions.complete,
        "/v1/responses": responses.respond,
        "/v1/messages": messages.create_message,
        "/generate": generate.generate,
        "/v1/embeddings": pooling.embed,
        "/v1/rerank": pooling.rerank,
        "/rerank": pooling.rerank,
        "/v2/rerank": pooling.rerank,
        "/v1/score": pooling.score,
        "/score": pooling.score,
        "/pooling": pooling.pool,
        "/v1/classify": pooling.classify,
        "/classify": pooling.classify,
        "/tokenize": tokens.tokenize,
        "/detokenize": tokens.detokenize,
        "/v1/audio/transcriptions": audio.transcribe,
    }
)

_GET: Mapping[str, Handler] = MappingProxyType(
    {
        "/health": info.health,
        "/health_generate": info.health_generate,
        "/ping": info.health,
        "/ready": info.health,
        "/version": info.version,
        "/load": info.server_load,
        "/metrics": info.metrics,
        "/props": info.props,
        "/v1/models": info.models,
        "/get_model_info": info.model_info,
        "/model_info": info.model_info,
        "/get_server_info": info.server_info,
        "/server_info": info.server_info,
        "/get_load": info.rank_loads,
        "/v1/loads": info.detailed_loads,
        "/flush_cache": operations.flush_cache,
        "/_sim/state": control.state,
        "/_sim/faults": control.list_faults,
    }
)

_POST: Mapping[str, Handler] = MappingProxyType(
    {
        **INFERENCE_ROUTES,
        "/ping": info.health,
        "/flush_cache": operations.flush_cache,
        "/reset_prefix_cache": operations.flush_cache,
        "/abort_request": operations.abort_request,
        "/pause_generation": operations.pause_generation,
        "/continue_generation": operations.continue_generation,
        "/update_weights_from_disk": operations.update_weights,
        "/update_weights_from_distributed": operations.update_weights_of_sglang,
        "/update_weights_from_tensor": operations.update_weights_of_sglang,
        "/release_memory_occupation": operations.release_memory,
        "/resume_memory_occupation": operations.resume_memory,
        "/pause": operations.pause,
        "/resume": operations.resume,
        "/abort_requests": operations.abort_requests,
        "/inference/v1/abort_requests": operations.abort_named_requests,
        "/sleep": operations.sleep,
        "/wake_up": operations.wake_up,
        "/start_profile": operations.start_profile,
        "/stop_profile": operations.stop_profile,
        "/_sim/faults": control.replace_faults,
        "/_sim/reset": control.reset,
        "/_sim/restart": control.restart,
    }
)

_ROUTES: Mapping[str, Mapping[str, Handler]] = MappingProxyType({"GET": _GET, "HEAD": _GET, "POST": _POST})


def find_handler(method: str, path: str) -> Handler:
    """Raises 404 for an unknown path, 405 for a known one with the wrong method."""
    handler = _ROUTES.get(method, {}).get(path)
    if handler is not None:
        return handler
    if path.startswith("/v1/models/") and method in ("GET", "HEAD"):
        return info.model
    if path in _GET or path in _POST:
        raise ApiError(405, "Method Not Allowed", "MethodNotAllowedError")
    raise ApiError(404, "Not Found", "NotFoundError")
