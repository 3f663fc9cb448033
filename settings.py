"""Every setting of the bundle, read once from `GLM_*` variables and the project's `.env`.

The API server, the page, the checker and the shell scripts all read their settings here. It imports no other part of the
bundle. An unknown name or an invalid value stops the program with a message that lists what is allowed. `GLM_ENV_FILE` in
the environment names another file than `.env`.

What already runs must not stop for a typo in `.env`: the page keeps what it read at its start (`keep`, `kept`), and the
checker goes on with a copy of the last file that was valid (`load_or_last_good`, `keep_last_good`).
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import os
import re
import stat
import sys
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import Field, PrivateAttr, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ROOT = Path(__file__).resolve().parent
PREFIX = "GLM_"
ENV_FILE_NAME = f"{PREFIX}ENV_FILE"
ENV_FILE = ROOT / (os.environ.get(ENV_FILE_NAME) or ".env")
ENV_LIMIT_BYTES = 2**20
ALL_SETTINGS = "Settings that exist"  # begins the last line of an error about an unknown setting
LAST_GOOD = "last-good.env"  # in the log folder, readable by its owner only
SECRETS = (
    "API_KEY", "API_KEYS", "METRICS_KEY", "ENGINE_KEY", "WEB_TOKEN", "OPERATOR_TOKEN", "PROBE_TOKEN", "DINGTALK_URL", "DINGTALK_SECRET", "FEISHU_URL",
    "FEISHU_SECRET", "WECOM_URL",
    "WEBHOOK_URL", "WEBHOOK_SECRET", "SLACK_URL", "SMTP_URL", "PING_URL", "PUSHGATEWAY_URL", "ELASTICSEARCH_URL",
)  # fmt: skip

# Of the clients of Hugging Face and ModelScope: they keep their names, and are read from the environment.
HUB_VARIABLES = (
    "HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "MODELSCOPE_ENDPOINT", "MODELSCOPE_API_TOKEN",
    "MODELSCOPE_CACHE",
)  # fmt: skip


class SettingsError(ValueError):
    """An invalid setting; the message has its name, its value and what is allowed."""


REPLICAS = "replicas"  # in the log folder: a folder for each replica
REPLICA_VARIABLE = "START_SH_REPLICA"  # in the environment of a replica: its number. Not GLM_*, because nobody sets it
FIRST_REPLICA_PORT = 10  # above GLM_API_PORT

LEAST = {"context_tokens": 64, "kv_cache_bytes": 2**20}  # of what is not 0: less holds no question

KEY_NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}")
PROBE_KEY, DEFAULT_KEY = "probe", "default"  # the names of GLM_PROBE_TOKEN and GLM_API_KEY among the named keys
HASHED = "sha256:"
SMTP_FORM = "smtps://user:password@host:465/?from=a@b.c&to=d@e.f"
ELASTICSEARCH_FORM = "https://user:password@host:9200/index"


class Settings(BaseSettings):
    """Units are in the names: `_s` seconds, `_mib`, `_bytes`, `_pixels`, `_tokens`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
    )

    _replica: int | None = PrivateAttr(None)

    # The model and where it runs.
    model: str = Field(
        "auto", description="hub id, folder, or `auto`: GLM-4.6V-Flash if the GPU can hold it, otherwise the demo"
    )
    hub: Literal["huggingface", "modelscope"] = Field(
        "huggingface", description="where hub ids are downloaded from; the other one is tried if it cannot be reached"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto`: the GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format of the arithmetic; `auto`: float32 for a small model, otherwise bfloat16 (float16 on a GPU without it)"
    )
    threads: int = Field(
        0, ge=0, le=1024, description="torch CPU threads; 0: one for a tiny model, otherwise all cores but one, which is left to HTTP"
    )
    weights: Literal["auto", "bf16", "fp8", "nf4"] = Field(
        "auto", description="number format of the weights; `auto`: the best that fits the card"
    )
    context_tokens: int = Field(
        0, ge=0, description="longest prompt plus answer; 0: by card, at most what the model allows"
    )
    max_picture_tokens: int = Field(
        0, ge=0, description="image tokens of the largest picture, to which larger ones are scaled down; 0: by card"
    )

    # The engine.
    slots: int = Field(0, ge=0, le=1024, description="requests computed at once; 0: chosen for the device")
    kv_cache_bytes: int = Field(
        0, ge=0, description="memory of the KV cache; 0: what a card has left, or a share of the free host memory"
    )
    prefill_chunk_tokens: int | None = Field(
        None, ge=16, description="longest part of a prompt computed in one step; empty: by card"
    )
    picture_cache_bytes: int | None = Field(None, ge=0, description="memory of the encoder cache; empty: by card")

    kernels: Literal["auto", "steady", "torch"] = Field(
        "auto",
        description="`auto`: compiled kernels where they are quicker, on a CPU with AVX512_BF16; `steady`: one for each "
        "product, whatever the load; `torch`: none",
    )

    # Several cards in one machine. docs/scaling.md has how the parts work together.
    replicas: int = Field(1, ge=1, le=64, description="API processes behind one nginx on `api_port`")
    gpus: str = Field(
        "", description="cards by their numbers, such as `0,1,2,3`: a replica for each; a single one: the card of the only API; empty: no choice"
    )

    # The API.
    api_host: str = Field(
        "0.0.0.0", description="address that the API listens on; `0.0.0.0`: every one, `127.0.0.1`: this machine only"
    )
    api_port: int = Field(8080, ge=1, le=65535, description="port of the API")
    api_key: SecretStr | None = Field(None, description="key that programs send; `start.sh` creates one if there is none")
    api_keys: SecretStr | None = Field(None, description="more keys, as name:key or name:sha256:digest, comma-separated")
    metrics_key: SecretStr | None = Field(None, description="opens GET /metrics and nothing else, for Prometheus")
    metrics_names: Literal["glm", "vllm"] = Field(
        "glm", description="`vllm`: what the endpoint picker of Kubernetes' Gateway API reads is there under vLLM's names too"
    )
    probe_token: SecretStr | None = Field(None, description="marks health probes, which never queue behind users")
    key_requests_per_minute: int = Field(
        0, ge=0, description="requests per minute of one key; the page's visitors share `GLM_API_KEY`; 0: no limit"
    )
    key_concurrency: int = Field(
        0, ge=0, description="requests of one key at a time; the page's visitors share `GLM_API_KEY`; 0: no limit"
    )
    strict_fields: bool = Field(False, description="refuse fields that have no effect here, instead of naming them in the answer")
    cors_origins: str = Field("", description="allowed CORS origins, comma-separated; empty: none")
    queue_tokens: int = Field(
        0, ge=0, description="tokens of prompts and answers of all requests in progress; 0: by slots and queue"
    )
    queue_image_bytes: int = Field(
        0, ge=0, description="memory of the images of all requests in progress; 0: an eighth of the memory there is"
    )
    request_timeout_s: float = Field(600.0, gt=0, description="from entering the queue to the last token")
    fetch_images: bool = Field(False, description="fetch images at http(s) URLs of public addresses")
    fetch_hosts: str = Field("", description="the only hosts to fetch from, comma-separated; empty: any public host")
    fetch_timeout_s: float = Field(
        10.0, gt=0, le=60, description="time limit for the whole fetch of one image, with its redirects and the look-up of its host"
    )
    loop_window: int = Field(256, ge=0, le=4096, description="an answer ends when this many tokens repeat one pattern; 0: never")
    log_level: Literal["debug", "info", "warning"] = Field("info", description="least level of the lines in `api.log`")
    queue_size: int = Field(0, ge=0, description="requests that may wait, further ones get 503; 0: by slots")
    max_images: int = Field(8, ge=0, description="images in one request")
    max_image_bytes: int = Field(20 * 2**20, ge=1, description="bytes of one image")
    max_image_pixels: int = Field(
        50_000_000, ge=1, description="width times height, read from the header before decoding"
    )
    max_body_bytes: int = Field(64 * 2**20, ge=1, description="bytes of one request")
    default_max_tokens: int = Field(
        0, ge=0, description="answer length if a request has no limit; 0: by card, more with thinking"
    )
    drain_s: float = Field(10.0, ge=0, description="how long running answers may continue after SIGTERM")
    drain_delay_s: float = Field(
        0.0, ge=0, le=600, description="after SIGTERM new requests are still taken for so long, while routers see that it is not ready"
    )

    # An engine behind the API, in the place of its own.
    engine_url: str = Field(
        "", description="vLLM, SGLang, llama.cpp's server or another API of this kind, without `/v1`: it answers, and the API stands in front of it"
    )
    engine_key: SecretStr | None = Field(None, description="key that the engine behind asks for")
    engine_kind: Literal["auto", "vllm", "sglang", "llama.cpp", "glm", "other"] = Field(
        "auto", description="what the engine behind is; `auto`: by what it answers"
    )
    engine_command: str = Field(
        "", description="starts the engine behind on this machine; then `start.sh`, `stop.sh` and the checker treat it as a part of their own"
    )

    # The page.
    web_host: str = Field("0.0.0.0", description="address that the page listens on")
    web_port: int = Field(8081, ge=1, le=65535, description="port of the page")
    web_token: SecretStr | None = Field(None, description="token in the page's link; `start.sh` creates one if there is none")
    operator_token: SecretStr | None = Field(None, description="enables the console's actions; without it there are none")
    chat_days: int = Field(90, ge=1, description="chats unused for this many days are deleted")
    api_url: str = Field(
        "", description="URL of the API for the page and the checker; empty: `api_port` on this machine"
    )

    # The checker: its probes, and what confirms a verdict.
    probe_timeout_s: float = Field(10.0, gt=0, description="time limit of a probe question")
    probe_credit_s: float = Field(60.0, ge=0, description="a younger answer to a user replaces the probe question; 0: always ask")
    check_period_s: float = Field(60.0, ge=1, description="how often health_check.py runs")
    check_budget_s: float = Field(45.0, ge=5, description="a run that takes longer is killed")
    check_silent_s: float = Field(300.0, ge=1, description="without a run for this long the checker is reported as silent")
    confirm_runs: int = Field(2, ge=1, description="consecutive runs that must agree before a restart")
    stall_s: float = Field(
        120.0, ge=1, description="pending work without a step for this long is a hang, unless the engine expects a longer step"
    )
    beat_limit_s: float = Field(60.0, ge=1, description="an event loop without a heartbeat for this long is blocked")
    start_deadline_s: float = Field(300.0, ge=1, description="loading may make no progress at all for this long")
    failure_share_limit: float = Field(
        0.05, ge=0, le=1, description="share of users' requests that may fail without a cause for concern"
    )
    failure_count_limit: int = Field(
        3, ge=1, description="fewer failures than this are never a cause for concern, whatever their share"
    )
    stable_s: float = Field(600.0, ge=0, description="an incident closes after this long without trouble")
    front_url: str = Field("", description="URL of the page through the reverse proxy, probed as well")

    # The cure.
    cure: Literal["restart", "shadow", "off"] = Field(
        "restart", description="what the checker does: `restart`, `shadow` (only records what it would do) or `off`"
    )
    restarts_per_hour: int = Field(
        3, ge=0, description="restarts of a target in an hour; after as many the circuit opens and a person is needed"
    )
    restarts_per_day: int = Field(6, ge=0, description="the same in a day")
    nightly_restart: str = Field("off", description="`off`, `auto` (quietest hour of the history) or an hour such as `4`")
    test_faults: bool = Field(False, description="enables fault injection for the drill; never in production")

    # Limits that warn and never restart.
    gpu_load_limit_percent: float = Field(0.0, ge=0, description="0: the load of the card is no reason to warn")
    gpu_memory_limit_mib: float = Field(0.0, ge=0, description="0: use gpu_memory_limit_percent instead")
    gpu_memory_limit_percent: float = Field(95.0, gt=0, le=100, description="memory of the fullest card")
    cpu_limit_percent: float = Field(70.0, gt=0, description="load of the processors, or of what the control group may use")
    memory_limit_percent: float = Field(80.0, gt=0, description="memory of the machine, or of the control group")
    disk_free_limit_mib: float = Field(1024.0, ge=0, description="least free space in the log folder")
    limit_window_s: float = Field(600.0, ge=0, description="a limit must be exceeded on average over this time")

    # Alerts. URLs may hold tokens, so each is a secret.
    dingtalk_url: SecretStr | None = Field(None, description="address of a DingTalk robot")
    dingtalk_secret: SecretStr | None = Field(None, description="its secret of \"additional signature\"")
    feishu_url: SecretStr | None = Field(None, description="address of a Feishu robot")
    feishu_secret: SecretStr | None = Field(None, description="its secret of \"additional signature\"")
    wecom_url: SecretStr | None = Field(None, description="address of a WeCom robot")
    webhook_url: SecretStr | None = Field(None, description="address that alerts are posted to as JSON")
    webhook_secret: SecretStr | None = Field(
        None, description="signs them: `X-GLM-Signature: sha256=HMAC(secret, timestamp + \".\" + body)`"
    )
    slack_url: SecretStr | None = Field(None, description="address of Slack, or of anything that takes `{\"text\": ...}`")
    smtp_url: SecretStr | None = Field(
        None, description=f"mail server, sender and receivers: `{SMTP_FORM}`"
    )
    ping_url: SecretStr | None = Field(
        None, description="called at the end of every run, a dead man's switch (Healthchecks, Uptime Kuma)"
    )
    pushgateway_url: SecretStr | None = Field(None, description="Prometheus Pushgateway that gets the checker's metrics")
    elasticsearch_url: SecretStr | None = Field(
        None, description=f"index that gets the checker's runs: `{ELASTICSEARCH_FORM}`"
    )
    alert_language: Literal["en", "zh", "both"] = Field("both", description="language of alerts")
    alerts_per_hour: int = Field(20, ge=1, description="messages per channel and hour; the others wait")
    quiet_hours: str = Field("", description="such as `23:00-07:00`: warnings wait until the end; other alerts do not")
    timezone: str = Field("", description="of quiet hours and the nightly restart; empty: the machine's")

    # Runtime state.
    log_dir: Path = Field(ROOT / "logs", description="logs, pid files, stores and `health.json`; relative to the project")
    start_timeout_s: float = Field(120.0, gt=0, description="how long start.sh waits for the processes to answer")

    @field_validator("context_tokens", "kv_cache_bytes")
    @classmethod
    def _none_or_enough(cls, value: int, info: ValidationInfo) -> int:
        least = LEAST[str(info.field_name)]
        if 0 < value < least:
            raise ValueError(f"must be 0 or >= {least}")
        return value

    @field_validator("api_key", "metrics_key", "probe_token", "engine_key", check_fields=False)
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _check_key(value.get_secret_value())
        return value

    @field_validator("api_keys")
    @classmethod
    def _fit_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        for entry in re.split(r"[,\n]", value.get_secret_value() if value else ""):
            name, _, key = entry.strip().partition(":")
            _check_key(key, f" (of {name})" if re.fullmatch(r"[\w.-]{1,32}", name) else "")
        return value

    @field_validator("api_url", "engine_url", "front_url", *(name.lower() for name in SECRETS if name.endswith("_URL") and name != "SMTP_URL"))
    @classmethod
    def _of_http(cls, value: SecretStr | str | None, info: ValidationInfo) -> SecretStr | str | None:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if text and not _is_url(text, ("http", "https")):
            form = ELASTICSEARCH_FORM if info.field_name == "elasticsearch_url" else "http://HOST[:PORT][/PATH] or https://..."
            raise ValueError(f"must look like {form}")
        return value

    @field_validator("smtp_url")
    @classmethod
    def _of_smtp(cls, value: SecretStr | None) -> SecretStr | None:
        text = value.get_secret_value() if value else ""
        if text and not (_is_url(text, ("smtp", "smtps")) and parse_qs(urlsplit(text).query).get("to")):
            raise ValueError(f"must look like {SMTP_FORM}, or smtp:// for a server without TLS from the start")
        return value

    @field_validator("log_dir")
    @classmethod
    def _below_the_project(cls, value: Path) -> Path:
        return ROOT / value  # relative to the project, not to the working directory; an absolute path is unchanged

    @field_validator("gpus")
    @classmethod
    def _card_numbers(cls, value: str) -> str:
        cards = [card.strip() for card in value.split(",")] if value.strip() else []
        if not all(re.fullmatch(r"\d{1,3}", card) for card in cards):
            raise ValueError("must be numbers of cards, such as 0,1,2,3")
        if len(set(cards)) < len(cards):
            raise ValueError("must name each card once")
        return ",".join(cards)

    @field_validator("quiet_hours")
    @classmethod
    def _two_times(cls, value: str) -> str:
        if value and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", value):
            raise ValueError("must look like 23:00-07:00")
        return value

    @field_validator("nightly_restart")
    @classmethod
    def _off_auto_or_hour(cls, value: str) -> str:
        if value not in ("off", "auto") and not (value.isdigit() and int(value) < 24):
            raise ValueError("must be off, auto or an hour from 0 to 23")
        return value

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            return value and ZoneInfo(value).key
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError("must be a name such as Asia/Shanghai") from None

    @model_validator(mode="after")
    def _has_an_engine_to_start(self) -> Settings:
        if self.engine_command and not self.engine_url:
            raise ValueError("GLM_ENGINE_COMMAND needs GLM_ENGINE_URL, the address at which that engine answers")
        return self

    @property
    def stop_s(self) -> float:
        """From SIGTERM to the end of the last answer of the API."""
        return self.drain_delay_s + self.drain_s

    @property
    def replica_count(self) -> int:
        """How many API processes there are: one for each card of GLM_GPUS, or GLM_REPLICAS."""
        return len(self.gpus.split(",")) if self.gpus else self.replicas

    @property
    def replica(self) -> int | None:
        """The number of the replica that these are the settings of; None for the settings of the whole."""
        return self._replica

    def replica_port(self, number: int) -> int:
        """The port of a replica, on the loopback interface only."""
        return self.api_port + FIRST_REPLICA_PORT + number

    def for_replica(self, number: int) -> Settings:
        """The settings of one replica: an API with a port and a log folder of its own, and its card."""
        one = self.model_copy(
            update={
                "replicas": 1, "gpus": self.gpus.split(",")[number] if self.gpus else "", "api_host": "127.0.0.1",
                "api_port": self.replica_port(number), "log_dir": self.log_dir / REPLICAS / str(number),
            }
        )  # fmt: skip
        one._replica = number
        return one

    @property
    def api_base_url(self) -> str:
        """URL of the API from this machine, without a trailing slash."""
        return (self.api_url or f"http://127.0.0.1:{self.api_port}").rstrip("/")

    @property
    def engine_base_url(self) -> str:
        """URL of the engine behind, without a trailing slash or `/v1`; empty: the engine is the API's own."""
        return self.engine_url.rstrip("/").removesuffix("/v1")

    @property
    def engine_host(self) -> str:
        """Host of the engine behind; empty without one."""
        return urlsplit(self.engine_url).hostname or ""

    @property
    def engine_port(self) -> int:
        """Port of the engine behind; 0 without one."""
        parts = urlsplit(self.engine_url)
        return parts.port or (0 if not self.engine_url else 443 if parts.scheme == "https" else 80)

    @property
    def watches_engine_itself(self) -> bool:
        """Whether page and checker ask the engine behind directly (GLM_API_URL is its address), with no API in between."""
        return bool(self.engine_url) and self.api_base_url.removesuffix("/v1") == self.engine_base_url


def _check_key(key: str, of: str = "") -> None:
    """Raises ValueError for a key that no program could present: only these characters pass through every HTTP client."""
    wrong = re.search(r"[^ -~]|^ | $", key)
    if wrong:
        what = "a space at its end" if wrong[0] == " " else f"U+{ord(wrong[0]):04X}"
        raise ValueError(
            f"must be of ASCII letters, digits and signs, because it travels in an HTTP header. Character {wrong.start() + 1}{of}: {what}"
        )


def _is_url(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", text)
    except ValueError:  # of brackets, or of a port that is no number
        return False


def digests_of_keys(settings: Settings) -> dict[str, bytes]:
    """The SHA-256 digests of the keys of users and of the probe token, by name. Raises SettingsError for entries that do not parse."""
    digests: dict[str, bytes] = {}
    if settings.api_key:
        digests[DEFAULT_KEY] = _digest(settings.api_key.get_secret_value(), "API_KEY")
    if settings.probe_token:
        digests[PROBE_KEY] = _digest(settings.probe_token.get_secret_value(), "PROBE_TOKEN")
    listed = settings.api_keys.get_secret_value() if settings.api_keys else ""
    for entry in filter(None, (part.strip() for part in re.split(r"[,\n]", listed))):
        name, _, key = entry.partition(":")
        if not KEY_NAME.fullmatch(name) or not key:
            raise SettingsError(f"{PREFIX}API_KEYS: each entry must be name:key, the name of A-Z a-z 0-9 _ . - only.")
        if name in digests:
            raise SettingsError(f"{PREFIX}API_KEYS: the name {name!r} is taken.")
        digests[name] = _digest(key, "API_KEYS")
    return digests


def digest_of_metrics_key(settings: Settings) -> bytes | None:
    """None without one. Raises SettingsError, also if it is a key that opens more."""
    if settings.metrics_key is None:
        return None
    digest = _digest(settings.metrics_key.get_secret_value(), "METRICS_KEY")
    if digest in digests_of_keys(settings).values():
        raise SettingsError(f"{PREFIX}METRICS_KEY: must differ from every other key, because it opens /metrics only.")
    return digest


def _digest(key: str, setting: str) -> bytes:
    """The SHA-256 digest of a key, or the one given after `sha256:`. Raises SettingsError, which names the setting."""
    if not key.startswith(HASHED):
        return hashlib.sha256(key.encode()).digest()
    try:
        digest = bytes.fromhex(key.removeprefix(HASHED))
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise SettingsError(f"{PREFIX}{setting}: sha256: must be followed by the 64 hex digits of a key's digest.")
    return digest


def load(**overrides: object) -> Settings:
    """Reads the settings; keyword arguments override the environment. Raises SettingsError with one line per problem."""
    return _load(ENV_FILE, overrides)


def load_file(file: Path) -> Settings:
    """What `load` would return if this file were `.env`. Raises SettingsError."""
    return _load(file, {})


_kept: Settings | None = None


def keep(settings: Settings) -> None:
    """Lets `kept` return these settings in this process, whatever becomes of the file."""
    global _kept
    _kept = settings


def kept() -> Settings:
    """What `keep` was given; without it, what `load` reads now. Raises SettingsError."""
    return _kept or load()


def load_or_last_good() -> tuple[Settings, str]:
    """(settings, what is wrong with `.env`): the last valid file's settings if it is invalid now, or gone.

    The problem is empty if the file is fine. Raises SettingsError if there is no last valid file either.
    """
    copy = last_good_path()
    problem = f"{ENV_FILE} is gone. Restore it; or delete {copy} if the settings shall be the defaults"
    if os.path.lexists(ENV_FILE) or not copy.is_file() or copy == ENV_FILE:
        try:
            return load(), ""
        except SettingsError as error:
            problem = str(error)
    if not copy.is_file():
        raise SettingsError(problem)
    try:
        return _load(copy, {}), problem
    except SettingsError:
        raise SettingsError(problem) from None


def keep_last_good() -> None:
    """Copies a valid `.env`, with the contents of its secret files, for `load_or_last_good`. Raises OSError, SettingsError."""
    copy = last_good_path()
    if copy == ENV_FILE or not os.path.lexists(ENV_FILE):
        return
    text = f"# The last valid {ENV_FILE.name}. Written by health_check.py; changes are lost.\n{self_contained_env()}"
    with contextlib.suppress(OSError, SettingsError):
        if _text_of(copy) == text and stat.S_IMODE(copy.stat().st_mode) == 0o600:
            return
    copy.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=copy.parent, prefix=f".{copy.name}.")  # 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, copy)
    except BaseException:
        os.unlink(temporary)
        raise


def self_contained_env() -> str:
    """The lines of a valid `.env`, with the contents of its secret files in the place of their names. Raises SettingsError."""
    settings = load()
    lines = []
    for name, value in _values_of(_text_of(ENV_FILE), ENV_FILE, interpolate=False).items():
        if name.startswith(PREFIX) and name.endswith("_FILE"):
            secret = getattr(settings, name.removeprefix(PREFIX).removesuffix("_FILE").lower())
            name, value = name.removesuffix("_FILE"), secret.get_secret_value()
        lines.append(f"{name}={_quoted(value)}\n")
    return "".join(lines)


def export_hub_variables() -> None:
    """Puts what `.env` says of the hubs into the environment, where it is not set, for this process. Raises SettingsError."""
    values = _values_of(_text_of(ENV_FILE), ENV_FILE) if os.path.lexists(ENV_FILE) else {}
    for name in HUB_VARIABLES:
        if values.get(name) and not os.environ.get(name):
            os.environ[name] = values[name]


def environment_for_children() -> dict[str, str]:
    """Variables with which start.sh reads the same settings as the checker: none while `.env` is valid."""
    return {ENV_FILE_NAME: str(last_good_path())} if load_or_last_good()[1] else {}


def last_good_path() -> Path:
    """Where the copy of the last valid file is: in the log folder, which an invalid file may still name."""
    folder = os.environ.get(f"{PREFIX}LOG_DIR", "")
    if not folder:
        with contextlib.suppress(SettingsError):
            text = _text_of(ENV_FILE) if os.path.lexists(ENV_FILE) else ""
            bindings = list(parse_stream(io.StringIO(text)))
            folder = next((b.value for b in reversed(bindings) if b.key == f"{PREFIX}LOG_DIR" and b.value), "")
    return ROOT / (folder or Settings.model_fields["log_dir"].default) / LAST_GOOD


def _load(file: Path, overrides: Mapping[str, object]) -> Settings:
    if file == ENV_FILE and os.environ.get(ENV_FILE_NAME) and not os.path.lexists(file):
        raise SettingsError(f"{ENV_FILE_NAME} names {file}, which does not exist. Create it, or unset the variable")
    from_file = _values_of(_text_of(file), file) if os.path.lexists(file) else {}
    if ENV_FILE_NAME in from_file:
        raise SettingsError(f"{ENV_FILE_NAME}: belongs in the environment, not in {file}, because it names that file")
    # As for the environment, an empty value is none.
    given = {**from_file, **{name: value for name, value in os.environ.items() if value}}
    given = {name: value for name, value in given.items() if name.startswith(PREFIX) and name != ENV_FILE_NAME}
    _refuse_unknown(given)
    fields = {name.removeprefix(PREFIX).lower(): value for name, value in given.items() if value}
    values: dict[str, Any] = {name: value for name, value in fields.items() if name in Settings.model_fields}
    values |= {name.lower(): _read_secret_file(name, given) for name in SECRETS if f"{PREFIX}{name}_FILE" in given}
    values |= {name: value for name, value in overrides.items() if value is not None}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem) for problem in error.errors())) from None
    # Here rather than at the start of the API, which would find it only after the one before it was stopped.
    digests_of_keys(settings)
    digest_of_metrics_key(settings)
    _check_replicas(settings)
    number = os.environ.get(REPLICA_VARIABLE, "")
    return settings.for_replica(int(number)) if number else settings


def _check_replicas(settings: Settings) -> None:
    """Raises SettingsError for what contradicts several replicas."""
    count, cards = settings.replica_count, f"{PREFIX}GPUS={settings.gpus}"
    if settings.gpus and "replicas" in settings.model_fields_set and settings.replicas != count:
        raise SettingsError(
            f"{PREFIX}REPLICAS: must be {count}, or not be set, because there is a replica for each card of {cards}. Given: {settings.replicas}"
        )
    if settings.gpus and settings.device == "cpu":
        raise SettingsError(f"{PREFIX}GPUS: must be empty with {PREFIX}DEVICE=cpu. Given: {settings.gpus!r}")
    if count == 1:
        return
    several = cards if settings.gpus else f"{PREFIX}REPLICAS={count}"
    for name in ("api_url", "engine_url"):
        if getattr(settings, name):
            raise SettingsError(f"{PREFIX}{name.upper()}: must be empty with {several}, whose replicas run on this machine. Given: a URL")
    ports = range(settings.replica_port(0), settings.replica_port(count))
    if ports[-1] > 65535:
        raise SettingsError(
            f"{PREFIX}API_PORT: must be <= {65535 - count - FIRST_REPLICA_PORT + 1} with {several}, because the replicas listen on the ports"
            f" from {FIRST_REPLICA_PORT} above it. Given: {settings.api_port}"
        )
    if settings.web_port in ports:
        raise SettingsError(
            f"{PREFIX}WEB_PORT: must not be from {ports[0]} to {ports[-1]}, which are the ports of the replicas ({several}). Given: {settings.web_port}"
        )


def _text_of(file: Path) -> str:
    """The file's text without a byte order mark. Raises SettingsError that says what to do."""
    try:
        # Without blocking: a pipe in the place of the file would hold every program that reads its settings.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise SettingsError(f"{file} is not a file. Move it away and write the settings into a file of that name")
            data = opened.read(ENV_LIMIT_BYTES + 1)
    except PermissionError:
        raise SettingsError(f"{file} may not be read by {_user()}. Run: chown {_user()} {file}; chmod 600 {file}") from None
    except IsADirectoryError:
        raise SettingsError(f"{file} is a folder. Move it away and write the settings into a file of that name") from None
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}. Check that the path leads to a file") from None
    if len(data) > ENV_LIMIT_BYTES:
        raise SettingsError(f"{file} has more than {ENV_LIMIT_BYTES} bytes. It should hold only lines NAME=value")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise SettingsError(f"{file} is not UTF-8 but looks like UTF-16. Save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingsError(f"{file}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}). Save the file as UTF-8") from None


def _values_of(text: str, file: Path, interpolate: bool = True) -> dict[str, str]:
    """Raises SettingsError for a line that dotenv would leave out in silence."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    problems = []
    for binding in parse_stream(io.StringIO(lines)):
        source = binding.original.string
        # A binding begins with the blank lines before it.
        number = binding.original.line + len(source) - len(source.lstrip("\n"))
        named = binding.key or source.strip().split("=")[0]
        named = named[:40] if re.fullmatch(r"[\w.\- ]+", named) else "this line"  # never the value, which may be a secret
        if binding.error:
            unclosed = re.search(r"=\s*['\"]", source) is not None
            why = "a quote is not closed, or text follows it" if unclosed else "it is not NAME=value"
            problems.append(f"{file}, line {number}: {named}: {why}. Write NAME=value, or put # before the line")
        elif binding.key and binding.value is None:
            problems.append(f"{file}, line {number}: {named}: there is no `=`. Write NAME=value, or put # before the line")
        elif binding.key and binding.key.upper().startswith(PREFIX) and binding.key != binding.key.upper():
            problems.append(f"{file}, line {number}: {named}: names are in upper case. Write {named.upper()}")
        elif binding.value is not None and "\n" in binding.value and re.search(rf"\n\s*(export\s+)?{PREFIX}\w+=", binding.value):
            problems.append(f"{file}, line {number}: {named}: a quote is not closed before the next setting. Close it on its line")
    if problems:
        raise SettingsError("\n".join(problems))
    values = dotenv_values(stream=io.StringIO(lines), interpolate=interpolate)
    return {name: value or "" for name, value in values.items()}


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _refuse_unknown(given: dict[str, str]) -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {f"{PREFIX}{name}_FILE" for name in SECRETS}
    unknown = sorted(set(given) - known)
    if not unknown:
        return
    lines = []
    for name in unknown:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        lines.append(f"{name}: no such setting.{hint}")
    lines.append(f"{ALL_SETTINGS}: " + ", ".join(sorted(known)))
    raise SettingsError("\n".join(lines))


def _read_secret_file(name: str, given: dict[str, str]) -> str:
    path = Path(given[f"{PREFIX}{name}_FILE"])
    try:
        # Without blocking, as a pipe would.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SettingsError(f"{PREFIX}{name}_FILE: {path} is not a file")
            value = file.read(ENV_LIMIT_BYTES).strip()
    except OSError as error:
        raise SettingsError(f"{PREFIX}{name}_FILE: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{PREFIX}{name}_FILE: {path} is not UTF-8. Save it as UTF-8") from None
    if not value:
        raise SettingsError(f"{PREFIX}{name}_FILE: {path} is empty")
    return value


def _explain(problem: Mapping[str, Any]) -> str:
    if not problem["loc"]:  # of several settings together
        return str(problem["msg"]).removeprefix("Value error, ")
    field = str(problem["loc"][0])
    shown = "***" if field.upper() in SECRETS else repr(problem.get("input"))
    return f"{PREFIX}{field.upper()}: {str(problem['msg']).removeprefix('Value error, ')}. Given: {shown}"


def main() -> int:
    """`python settings.py NAME...` prints values for a shell script; without names it only validates."""
    try:
        settings = load()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    for name in sys.argv[1:]:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        print("" if value is None else value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
