"""No prompt, no answer and no key ever shows in a log line, a status, a metric or a file but the workers' state."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway

PROMPT, CLIENT_KEY, WORKER_KEY, QUERY = "the-secret-prompt", "sk-client-secret", "sk-worker-secret", "query-secret"


def ask(url: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {CLIENT_KEY}", "Cookie": "cookie-secret"}
    request = urllib.request.Request(f"{url}?q={QUERY}", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        error.close()


def exercise(gate: Gateway, engine: str) -> None:
    message = {"role": "user", "content": PROMPT}
    for stream in (False, True):
        ask(f"{gate.url}/v1/chat/completions", json.dumps({"messages": [message], "stream": stream}).encode())
    ask(f"{gate.url}/v1/chat/completions", f'{{"messages": "{PROMPT}'.encode())
    ask(f"{gate.url}/nowhere", PROMPT.encode())
    gate.add_worker(engine, api_key=WORKER_KEY)
    ask(f"{gate.url}/v1/completions", json.dumps({"prompt": PROMPT}).encode())
    gate.admin("GET", f"/workers?model={QUERY}")
    gate.admin("DELETE", "/workers/" + gate.workers()[0]["id"])


def test_nothing_secret_is_told_anywhere() -> None:
    with launch_engines(2) as engines, gateway("--log-level", "debug", workers=[engines[0].url]) as gate:
        exercise(gate, engines[1].url)
        token = gate.token
        told = json.dumps([gate.admin("GET", path)[1] for path in ("/status", "/config", "/workers", "/metrics")])
        gate.wait_until("an access line per request", lambda: sum(line["event"] == "request" for line in gate.log) >= 5)
    told += json.dumps(gate.log)
    for secret in (PROMPT, CLIENT_KEY, WORKER_KEY, QUERY, "cookie-secret", token):
        assert secret not in told, f"{secret} was told"
