"""From a command line of sglang-router or vllm-router to settings, profile, workers and keys of ours; pure.

Every flag has a rule that writes what it asks for into a `Draft` and says what became of it: `same`, `changed` (done
otherwise here, and how) or `unsupported` (not to be had, and why). Defaults of theirs that differ from ours are put
through the same rules, so that what nobody said comes out the same, too.

A flag's values are what follows it up to the next flag: neither router has positional arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pointsman.config.keys_file import digest_of, key_flaw
from pointsman.config.models import ServeConfig
from pointsman.config.nearest import closest
from pointsman.config.serve_sources import flag_of
from pointsman.daemon.cli import sglang_flags
from pointsman.daemon.errors import PointsmanError

Word = Literal["same", "changed", "unsupported"]
Router = Literal["sglang-router", "vllm-router"]

PROFILE = "default"
KEY_NAME = "imported"
CHARS_PER_TOKEN = 4
ALWAYS = 1_000_000
"""factor of `sticky`: a session stays whatever that costs"""


class FlagError(PointsmanError):
    """The command line cannot be read; the message names the flag."""


class Given(NamedTuple):
    flag: str
    values: tuple[str, ...]


class Verdict(NamedTuple):
    flag: str
    shown: str
    """as it was given, without secrets"""
    word: Word
    why: str
    """where it went, or why not"""
    is_default: bool = False
    """nobody gave it"""


@dataclass(slots=True)
class Draft:
    router: Router
    settings: dict[str, str] = field(default_factory=dict)
    """key of ServeConfig → value as text"""
    origin: dict[str, str] = field(default_factory=dict)
    """key of ServeConfig → the flag that asked for it"""
    workers: list[str] = field(default_factory=list)
    prefills: dict[str, int | None] = field(default_factory=dict)
    """URL → port of its bootstrap server"""
    decodes: list[str] = field(default_factory=list)
    api_key: str | None = None
    strategy: str | None = None
    keeps_sessions: bool = False
    is_manual: bool = False
    """sessions only: the strategy is for those without, and for new ones"""
    idle_secs: float | None = None
    profile: dict[str, Any] = field(default_factory=dict)
    """further sections of the default profile"""
    metrics: dict[str, str] = field(default_factory=dict)
    """host and port of the listener for metrics"""
    probes_port: str | None = None

    def put(self, key: str, value: str, flag: str) -> None:
        self.settings[key], self.origin[key] = value, flag

    def section(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.profile.setdefault(name, {})
        return found


Rule = Callable[[Draft, Given], tuple[Word, str]]


def translate(router: Router, argv: Sequence[str]) -> tuple[Draft, list[Verdict]]:
    """Raises FlagError when `argv` cannot be read."""
    given = split(argv)
    draft = Draft(router)
    names = {_CANONICAL.get(each.flag, each.flag) for each in given}
    defaults = [Given(flag, (value,)) for flag, value in DEFAULTS[router].items() if flag not in names]
    defaults += _side_defaults(router, given)
    usual = [_judge(draft, each, is_default=True) for each in defaults]
    judged = {each: _judge(draft, each, is_default=False) for each in sorted(given, key=_order)}
    return draft, [*(judged[each] for each in given), *usual]


def _side_defaults(router: Router, given: Sequence[Given]) -> list[Given]:
    """Of prefill and decode workers, who has no policy of its own has the main one."""
    values = {each.flag: each.values for each in given}
    if _OF_PAIRS.isdisjoint(values):
        return []
    main = values.get("--policy", (DEFAULTS[router]["--policy"],))
    return [Given(flag, main) for flag in _SIDES if flag not in values and main[0] in POLICIES] if main else []


def _order(given: Given) -> int:
    """The policy first, what others mean hangs on it; the name of a connector after what asks for the usual one."""
    return {"--policy": 0, "--kv-connector": 2}.get(given.flag, 1)


def split(argv: Sequence[str]) -> list[Given]:
    """What stands before the first flag (`python -m …`, `launch`) starts the router and says nothing."""
    given: list[Given] = []
    for argument in argv:
        if re.match(r"--?[A-Za-z]", argument):
            flag, separator, value = argument.partition("=")
            given.append(Given(flag, (value,) if separator else ()))
        elif given:
            last = given.pop()
            given.append(Given(last.flag, (*last.values, argument)))
    if argv and given and given[0].flag == "-m":  # of the interpreter
        given.pop(0)
    return given


def _judge(draft: Draft, given: Given, *, is_default: bool) -> Verdict:
    word, why = _rule(given.flag)(draft, given)
    values = ("…",) if given.flag in _SECRET else given.values
    return Verdict(given.flag, " ".join((given.flag, *values)), word, why, is_default)


def _rule(flag: str) -> Rule:
    if flag in _RULES:
        return _RULES[flag]
    key = KEYS.get(flag)
    if key is not None:
        return _setting(key)
    for table, is_refused in ((sglang_flags.REFUSED, True), (sglang_flags.NO_EFFECT, False)):
        if flag in table:
            return _untaken(table[flag], is_refused=is_refused)
    return _unknown


# --- rules


def _one(given: Given) -> str:
    if len(given.values) != 1:
        raise FlagError(f"{given.flag}: expected one value, got {len(given.values)}")
    return given.values[0]


def _number(given: Given) -> float:
    try:
        return float(_one(given))
    except ValueError:
        raise FlagError(f"{given.flag}: expected a number, got {given.values[0][:60]!r}") from None


def _setting(key: str) -> Rule:
    is_switch = ServeConfig.model_fields[key].annotation is bool

    def rule(draft: Draft, given: Given) -> tuple[Word, str]:
        value = "true" if is_switch and not given.values else _one(given)
        if key == "log_level":
            value = sglang_flags.LOG_LEVELS.get(value, value)
        draft.put(key, value, given.flag)
        return "same", place_of(key)

    return rule


def _untaken(reason: str, *, is_refused: bool) -> Rule:
    """`has no effect: …` is something that is done otherwise here, `has no effect in this version: …` is missing."""
    is_missing = is_refused or reason.startswith(sglang_flags.LATER)

    def rule(_draft: Draft, _given: Given) -> tuple[Word, str]:
        return ("unsupported" if is_missing else "changed"), reason.removeprefix("has no effect: ")

    return rule


def _unknown(_draft: Draft, given: Given) -> tuple[Word, str]:
    hint = closest(given.flag, KNOWN)
    return "unsupported", f"not a flag that is known here{f' ({hint})' if hint else ''}"


def _with_scheme(text: str) -> str:
    return text if "://" in text else f"http://{text}"


def _workers(draft: Draft, given: Given) -> tuple[Word, str]:
    for url in map(_with_scheme, given.values):
        if not url.startswith(("http://", "https://")):
            return "unsupported", f"{url.partition('://')[0]} engines are not spoken to; use their HTTP port"
        draft.workers.append(url)
    return "same", "workers.json; addresses that are not private are added to worker_networks"


def _prefill(draft: Draft, given: Given) -> tuple[Word, str]:
    url, *ports = given.values or ("",)
    if len(ports) > 1 or not all(port == "none" or port.isdecimal() for port in ports):
        raise FlagError(f"{given.flag}: expected URL [PORT|none]")
    draft.prefills[_with_scheme(url)] = int(ports[0]) if ports and ports[0] != "none" else None
    return "same", "workers.json: worker_type, bootstrap_port"


def _decode(draft: Draft, given: Given) -> tuple[Word, str]:
    draft.decodes += map(_with_scheme, given.values)
    return "same", "workers.json: worker_type"


def _connector(name: str) -> Rule:
    def rule(draft: Draft, given: Given) -> tuple[Word, str]:
        draft.put("kv_connector", name, given.flag)
        return "same", place_of("kv_connector")

    return rule


def _named_connector(draft: Draft, given: Given) -> tuple[Word, str]:
    name = _one(given)
    if name not in ("nixl", "mooncake"):
        return "unsupported", f"{name[:60]} is not spoken here; nixl and mooncake are"
    draft.put("kv_connector", name, given.flag)
    return "same", place_of("kv_connector")


def _side_policy(key: str) -> Rule:
    def rule(draft: Draft, given: Given) -> tuple[Word, str]:
        name = _one(given)
        if name not in POLICIES:
            raise FlagError(f"{given.flag}: no policy {name[:60]!r}")
        strategy, keeps_sessions, why = POLICIES[name]
        if key == "decode_policy" and (keeps_sessions or strategy == "consistent_hash"):
            strategy, why = "least_request", "a session is kept at its prefill worker, which has its prefix"
        else:
            draft.keeps_sessions |= keeps_sessions
        # of the profile, whose own strategy would be the prefill workers' otherwise
        draft.section("pd")[key] = strategy
        where = f"profiles.json: {PROFILE}.pd.{key} = {strategy}"
        return ("changed", f"{where}; {why}") if why else ("same", where)

    return rule


def _policy(draft: Draft, given: Given) -> tuple[Word, str]:
    name = _one(given)
    if name not in POLICIES:
        hint = closest(name, POLICIES)
        raise FlagError(f"{given.flag}: no policy {name[:60]!r}{f' ({hint})' if hint else ''}")
    draft.strategy, keeps_sessions, why = POLICIES[name]
    draft.keeps_sessions |= keeps_sessions
    draft.is_manual = name == "manual"
    where = f"profiles.json: {PROFILE}.routingStrategy = {draft.strategy}"
    return ("changed", f"{where}; {why}") if why else ("same", where)


def _api_key(draft: Draft, given: Given) -> tuple[Word, str]:
    key = _one(given)
    flaw = key_flaw(key)
    if flaw:
        return "unsupported", f"the key {flaw}; make another one: pointsman keys new"
    draft.api_key = key
    return "changed", f"keys.json: {KEY_NAME}, by its hash; workers.json: api_key, since engines may ask for the same"


def _metrics(part: str) -> Rule:
    def rule(draft: Draft, given: Given) -> tuple[Word, str]:
        draft.metrics[part] = _one(given)
        return "same", "pointsman.toml: metrics_listen; metrics_compat has the old names"

    return rule


def _probes_port(draft: Draft, given: Given) -> tuple[Word, str]:
    draft.probes_port = _one(given)
    return "changed", "pointsman.toml: metrics_listen; /metrics is there, too"


def _sticky(draft: Draft, _given: Given) -> tuple[Word, str]:
    draft.keeps_sessions = True
    return "same", f"profiles.json: {PROFILE}.sticky"


def _idle(draft: Draft, given: Given) -> tuple[Word, str]:
    draft.idle_secs = _number(given)
    return "same", f"profiles.json: {PROFILE}.sticky.idle_secs, if sessions are kept at all"


def _key_headers(_draft: Draft, given: Given) -> tuple[Word, str]:
    strange = [name for name in given.values if name.lower() not in _SESSION_HEADERS]
    if strange:
        known = ", ".join(_SESSION_HEADERS)
        return "unsupported", f"sessions are known by {known}; not by {', '.join(strange)}"
    return "same", "these are known as they are"


def _assignment(draft: Draft, given: Given) -> tuple[Word, str]:
    mode = _one(given)
    if mode not in _ASSIGNMENTS:
        raise FlagError(f"{given.flag}: no mode {mode[:60]!r}; there are {', '.join(_ASSIGNMENTS)}")
    strategy, difference = _ASSIGNMENTS[mode]
    if strategy is None:
        return "same", "a new session goes by the policy"
    if not draft.is_manual:
        return "unsupported", "a new session goes by the policy, as any other request"
    draft.strategy = strategy
    where = f"profiles.json: {PROFILE}.routingStrategy = {strategy}"
    return ("changed", f"{where}; {difference}") if difference else ("same", where)


def _rate(draft: Draft, given: Given) -> tuple[Word, str]:
    draft.section("limits")["requests_per_second"] = _number(given)
    return "changed", f"profiles.json: {PROFILE}.limits.requests_per_second; a request over it gets 429, none waits"


def _prefix_hash(name: str, factor: float, *, is_whole: bool) -> Rule:
    def rule(draft: Draft, given: Given) -> tuple[Word, str]:
        value = _number(given) * factor
        draft.section("prefix_hash")[name] = int(value) if is_whole else value
        where = f"profiles.json: {PROFILE}.prefix_hash.{name}"
        return ("changed", f"{where}; {CHARS_PER_TOKEN} characters a token") if factor != 1 else ("same", where)

    return rule


def _window(draft: Draft, given: Given) -> tuple[Word, str]:
    draft.put("cb_window_duration_secs", _one(given), given.flag)
    where = place_of("cb_window_duration_secs")
    return "changed", f"{where}; there it does nothing, here half of all requests failing in it open the breaker"


def _enable(_draft: Draft, _given: Given) -> tuple[Word, str]:
    return "same", "that is how it is"


def _no_ranks(_draft: Draft, given: Given) -> tuple[Word, str]:
    if _one(given) == "1":
        return "same", "one URL, one worker"
    return "unsupported", sglang_flags.REFUSED[given.flag]


_ASSIGNMENTS: Mapping[str, tuple[str | None, str]] = MappingProxyType(
    {
        "random": ("random", ""),
        "min_load": ("least_request", ""),
        "min_group": ("least_request", "fewest requests, not fewest sessions"),
        "delegate": (None, ""),
    }
)
_SESSION_HEADERS = ("x-smg-routing-key", "x-session-id", "x-aibrix-session-key")
_SECRET = frozenset({"--api-key", "--tenant-api-key", "--control-plane-api-keys"})

POLICIES: Mapping[str, tuple[str, bool, str]] = MappingProxyType(
    {
        "random": ("random", False, ""),
        "round_robin": ("round_robin", False, ""),
        "cache_aware": ("cache_aware", False, ""),
        "power_of_two": ("power_of_two", False, ""),
        "prefix_hash": ("prefix_hash", False, ""),
        "consistent_hashing": ("consistent_hash", False, ""),
        "consistent_hash": ("consistent_hash", False, ""),
        "rendezvous_hash": ("consistent_hash", False, ""),
        "passthrough": ("least_request", False, "all workers get requests, not the first alone"),
        "least_load": ("expected_cost", False, "by the time to the first token: lines of prefills, and what is cached"),
        "manual": ("random", True, "sessions are kept; more of them than fit into memory go by the strategy again"),
        "sticky_least_loaded": ("least_request", True, "sessions are kept by their headers"),
        "bucket": ("least_request", False, "lengths of prompts are ranges of workers: prompt_tokens_min, _max"),
        "kv_aware": ("prefix_cache", False, "by what the gateway has sent there, not by the engines' events"),
    }
)
"""Theirs → (ours, sessions stay, what differs)."""

_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "--worker-urls": _workers,
        "--prefill": _prefill,
        "--decode": _decode,
        "--pd-disaggregation": _connector("sglang"),
        "--vllm-pd-disaggregation": _connector("nixl"),
        "--kv-connector": _named_connector,
        "--prefill-policy": _side_policy("prefill_policy"),
        "--decode-policy": _side_policy("decode_policy"),
        "--policy": _policy,
        "--api-key": _api_key,
        "--prometheus-host": _metrics("host"),
        "--prometheus-port": _metrics("port"),
        "--health-check-port": _probes_port,
        "--routing-key-override": _sticky,
        "--routing-key-headers": _key_headers,
        "--max-idle-secs": _idle,
        "--assignment-mode": _assignment,
        "--rate-limit-tokens-per-second": _rate,
        "--prefix-token-count": _prefix_hash("head_chars", CHARS_PER_TOKEN, is_whole=True),
        "--prefix-hash-load-factor": _prefix_hash("load_factor", 1, is_whole=False),
        "--prefix-hash-balance-abs-threshold": _prefix_hash("slack", 1, is_whole=True),
        "--cb-window-duration-secs": _window,
        "--enable-igw": _enable,
        "--intra-node-data-parallel-size": _no_ranks,
    }
)
_SIDES = ("--prefill-policy", "--decode-policy")
_OF_PAIRS = frozenset({"--prefill", "--decode", "--pd-disaggregation", "--vllm-pd-disaggregation"})
_EQUAL = (
    *("host", "port", "log_level", "max_payload_size", "health_failure_threshold", "health_success_threshold"),
    *("cache_threshold", "balance_abs_threshold", "balance_rel_threshold", "max_tree_size", "eviction_interval_secs"),
    *("retry_max_retries", "retry_initial_backoff_ms", "retry_max_backoff_ms", "retry_backoff_multiplier"),
    *("retry_jitter_factor", "disable_retries", "cb_failure_threshold", "cb_success_threshold"),
    *("cb_timeout_duration_secs", "disable_circuit_breaker", "max_concurrent_requests", "queue_size"),
    "queue_timeout_secs",
)
"""Keys whose flags are the same in all routers."""
KEYS: Mapping[str, str] = MappingProxyType({flag_of(key): key for key in _EQUAL} | sglang_flags.RENAMED)
KNOWN = frozenset({*_RULES, *KEYS, *sglang_flags.REFUSED, *sglang_flags.NO_EFFECT})
_CANONICAL: Mapping[str, str] = MappingProxyType(
    {flag: flag_of(key) for flag, key in KEYS.items() if flag_of(key) in KEYS}
)
"""Spellings of one flag."""

_SHARED_DEFAULTS = {
    "--policy": "cache_aware",
    "--request-timeout-secs": "1800",
    "--max-payload-size": "536870912",
    "--health-check-interval-secs": "60",
    "--health-check-timeout-secs": "5",
    "--health-success-threshold": "2",
    "--prometheus-port": "29000",
    "--port": "30000",
}
DEFAULTS: Mapping[Router, Mapping[str, str]] = MappingProxyType(
    {
        "sglang-router": _SHARED_DEFAULTS
        | {
            "--host": "0.0.0.0",
            "--prometheus-host": "0.0.0.0",
            "--shutdown-grace-period-secs": "180",
            "--upstream-pool-idle-timeout-secs": "3",
            "--stream-body-stall-timeout-secs": "300",
        },
        "vllm-router": _SHARED_DEFAULTS | {"--host": "127.0.0.1", "--prometheus-host": "127.0.0.1"},
    }
)
"""Those that differ from ours."""

# --- where a setting goes: what can be edited live stands in profiles.json

_OF_PROFILE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cache_threshold": ("cache_aware", "cache_threshold"),
        "balance_abs_threshold": ("cache_aware", "balance_abs_threshold"),
        "balance_rel_threshold": ("cache_aware", "balance_rel_threshold"),
        "request_timeout_s": ("timeouts", "total_s"),
        "body_timeout_s": ("timeouts", "client_body_s"),
        "retry_max_retries": ("retry", "max_retries"),
        "retry_initial_backoff_ms": ("retry", "initial_backoff_ms"),
        "retry_max_backoff_ms": ("retry", "max_backoff_ms"),
        "retry_backoff_multiplier": ("retry", "backoff_multiplier"),
        "retry_jitter_factor": ("retry", "jitter_factor"),
        "disable_retries": ("retry", "max_retries"),
    }
)
_OF_SHARED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "eviction_interval_secs": ("eviction_interval_secs",),
        "max_tree_size": ("max_tree_size",),
        "cb_failure_threshold": ("breaker", "failure_threshold"),
        "cb_success_threshold": ("breaker", "success_threshold"),
        "cb_timeout_duration_secs": ("breaker", "timeout_s"),
        "cb_window_duration_secs": ("breaker", "window_s"),
        "disable_circuit_breaker": ("breaker", "enabled"),
        "max_concurrent_requests": ("admission", "max_concurrent_requests"),
        "queue_size": ("admission", "queue_size"),
        "queue_timeout_secs": ("admission", "queue_timeout_s"),
        "health_interval_s": ("health", "interval_s"),
        "health_failure_threshold": ("health", "failure_threshold"),
        "health_success_threshold": ("health", "success_threshold"),
    }
)


def place_of(key: str) -> str:
    """For people."""
    if key in _OF_PROFILE:
        return f"profiles.json: {'.'.join((PROFILE, *_OF_PROFILE[key]))}"
    if key in _OF_SHARED:
        return f"profiles.json: {'.'.join(('shared', *_OF_SHARED[key]))}"
    return f"pointsman.toml: {key}"


def of_profile(key: str) -> tuple[str, ...] | None:
    """Where in the default profile; None: not there."""
    return _OF_PROFILE.get(key)


def of_shared(key: str) -> tuple[str, ...] | None:
    return _OF_SHARED.get(key)


def digest(api_key: str) -> str:
    return digest_of(api_key).hex()
