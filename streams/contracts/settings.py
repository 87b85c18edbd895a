"""Every setting of every process: environment variables with the prefix `GENCO_`.

A setting of type secret may also be given as a file: `GENCO_SIGNING_KEY_FILE=/run/secrets/key`. `load` is the one way
in: it fails with one clear line on a value that is wrong, missing or unknown, before anything is started.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from streams.contracts.secret_files import SecretFile

PREFIX: Final = "GENCO_"
EX_CONFIG: Final = 78
"""Exit code of a process whose settings are wrong (sysexits.h); a supervisor does not restart it."""


class ConfigurationError(ValueError):
    """A setting is wrong, missing or unknown. The message is one line that says what to do."""


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", use_attribute_docstrings=True, env_ignore_empty=True
    )
    _files: dict[str, Path] = PrivateAttr(default_factory=dict)

    def keep_files(self, files: Mapping[str, Path]) -> None:
        """Remember in which files secrets stood."""
        self._files.update(files)

    def file_of(self, name: str) -> SecretFile | None:
        """Return the file in which a secret stands; None: it stood in the environment, and does not change."""
        path = self._files.get(name)
        return None if path is None else SecretFile(path)

    def secret(self, name: str) -> str | None:
        """Return a secret as it is now: its file is read anew.

        Raises:
            OSError: If the file cannot be read any more.
        """
        file, value = self.file_of(name), getattr(self, name)
        if file is not None:
            return file.read()
        return None if value is None else str(value.get_secret_value())


def _redis_url(value: SecretStr) -> SecretStr:
    try:
        parts = urlsplit(value.get_secret_value())
        is_good = parts.scheme in ("redis", "rediss") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        is_good = False
    if not is_good:
        raise ValueError("expected redis://[user:password@]host:port/db, or rediss:// for TLS")
    return value


class KafkaSettings(_Settings):
    """How every Kafka client connects."""

    kafka_bootstrap_servers: str
    """Brokers as host:port, separated by commas."""
    kafka_api_version: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")] | None = None
    """Protocol version to assume instead of asking the broker; the embedded broker of the demo needs 2.1."""
    kafka_fetch_max_wait_ms: Annotated[int, Field(ge=1, le=10_000)] = 500
    """How long the broker may wait for records before it answers that there are none."""
    kafka_session_timeout_ms: Annotated[int, Field(ge=6_000, le=300_000)] = 30_000
    """A consumer that is silent this long has died, and its partitions go to others. At least 6 s: Kafka's limit."""
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How the connection is secured."""
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    """Needed with SASL_PLAINTEXT and SASL_SSL."""
    kafka_sasl_username: str | None = None
    """User for SASL."""
    kafka_sasl_password: SecretStr | None = None
    """Password for SASL."""
    kafka_ssl_cafile: Path | None = None
    """Certificate authority that signed the brokers' certificates; default: those of the system."""
    partitions: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Partitions of the topics impressions, clicks, examples and dead_letters, which must all have the same count."""

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _servers(cls, value: str) -> str:
        for server in value.split(","):
            host, _, port = server.rpartition(":")
            if not (host and port.isdecimal() and 0 < int(port) < 65536) or any(c.isspace() for c in server):
                raise ValueError(f"{server!r} is no host:port; expected host:port[,host:port...]")
        return value

    @model_validator(mode="after")
    def _sasl(self) -> Self:
        if self.kafka_security_protocol.startswith("SASL") and not (
            self.kafka_sasl_mechanism and self.kafka_sasl_username and self.kafka_sasl_password
        ):
            raise ValueError(
                f"GENCO_KAFKA_SECURITY_PROTOCOL is {self.kafka_security_protocol}; "
                "set also GENCO_KAFKA_SASL_MECHANISM, GENCO_KAFKA_SASL_USERNAME and GENCO_KAFKA_SASL_PASSWORD"
            )
        return self


class ModelSettings(_Settings):
    """Which model this is about."""

    model_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "default"
    """Which model is learned and served; one registry can hold several."""


class RedisSettings(ModelSettings):
    """How every Redis client connects."""

    redis_url: SecretStr
    """redis://[user:password@]host:port/db, rediss:// for TLS. A secret, as it may hold a password. The joiner needs
    none, and carries out GENCO_ALERT_ACTIONS with it."""

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, value: SecretStr) -> SecretStr:
        return _redis_url(value)


class ActionSettings(_Settings):
    """What is done by itself when an alert fires."""

    alert_actions: str = "JoinRateDrop=freeze-learning"
    """What to do when an alert fires, as ALERT=ACTION[+ACTION...],ALERT=...: freeze-learning (until it is resolved),
    freeze-publication, rollback (to the newest version made before it fired), shrink-exploration. Undone by hand, see
    `genco policy`."""
    shrunk_exploration: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25
    """Share of the traffic beside the uniform one that still explores after shrink-exploration."""
    # Needed for the action rollback alone: servers go back by signed moves only.
    signing_key: Annotated[SecretStr, Field(min_length=32)] | None = None
    """At least 32 characters; the same in every process. Make one with: openssl rand -hex 32. The joiner needs it for
    rollbacks in GENCO_ALERT_ACTIONS alone."""


class SigningSettings(_Settings):
    """The secret behind decision ids and manifests."""

    signing_key: Annotated[SecretStr, Field(min_length=32)]
    """At least 32 characters; the same in every process. Make one with: openssl rand -hex 32. The joiner needs it for
    rollbacks in GENCO_ALERT_ACTIONS alone."""

    def signing_key_bytes(self) -> bytes:
        """Return the key, at most 64 bytes (the limit of keyed BLAKE2b)."""
        return self.signing_key.get_secret_value().encode()[:64]


class MetricsSettings(_Settings):
    """Where a process shows its metrics."""

    metrics_host: str = "127.0.0.1"
    """Address of /metrics."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of /metrics; 0: none is opened."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lines below this level are not written."""


class WindowSettings(_Settings):
    """When a click counts, and how long an impression waits for it."""

    attribution_window_ms: Annotated[int, Field(ge=1_000, le=7 * 86_400_000)] = 600_000
    """A click this long after its impression still counts. The same in every process."""
    label_wait_ms: Annotated[int, Field(ge=0, le=7 * 86_400_000)] = 60_000
    """An impression leaves the joiner this long after it was shown, clicked or not (yet). The same in every process."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.label_wait_ms > self.attribution_window_ms:
            raise ValueError(
                f"GENCO_LABEL_WAIT_MS is {self.label_wait_ms}; "
                f"at most GENCO_ATTRIBUTION_WINDOW_MS ({self.attribution_window_ms})"
            )
        return self


class JoinSettings(KafkaSettings, ModelSettings, ActionSettings, WindowSettings, MetricsSettings):
    """Settings of `genco join`."""

    redis_url: SecretStr | None = None
    """redis://[user:password@]host:port/db, rediss:// for TLS. A secret, as it may hold a password. The joiner needs
    none, and carries out GENCO_ALERT_ACTIONS with it."""
    joiner_group: str = "genco-joiner"
    """Consumer group; processes with the same group share the partitions."""
    joiner_instance_id: str | None = None
    """Stable name of this process for static group membership; a restart within the session then moves nothing."""
    idle_timeout_ms: Annotated[int, Field(ge=0, le=600_000)] = 500
    """An event may be this late on its way to Kafka: a topic that has been read to its end holds the clock back by no
    more. 0: it does until its next event or mark, for logs whose clocks go on by marks alone."""
    max_future_skew_ms: Annotated[int, Field(ge=0, le=86_400_000)] = 60_000
    """An event this far ahead of its record's own time has a wrong clock and goes to the dead letters."""
    max_event_age_ms: Annotated[int, Field(ge=0)] = 30 * 86_400_000
    """An event this much older than its record has a wrong clock, or its time is in seconds, and goes to the dead
    letters. 0: any age, for old logs."""
    emit_linger_ms: Annotated[int, Field(ge=0, le=10_000)] = 200
    """Examples are collected this long into one record."""
    join_memory_mb: Annotated[int, Field(ge=16, le=1_000_000)] = 2_048
    """What open impressions and waiting clicks may take, in MiB. At the limit nothing more is read until some are
    closed; the process needs about 300 MiB beside."""
    dead_letter_max_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """When more than this share of a topic's newest 500 to 1,000 events is bad, the joiner stops reading: it is another
    schema, not a bad line. 1: never."""
    join_drop_ratio: Annotated[float, Field(ge=0.0, le=0.9)] = 0.4
    """When fewer than this share of the expected clicks meet their impressions, click delivery is taken for broken:
    the watermark is held. Higher, a smaller drop is found, and a change of the world is sooner taken for one. 0: never.
    Not watched with GENCO_IDLE_TIMEOUT_MS=0."""
    join_hold_max_ms: Annotated[int, Field(ge=1_000, le=7 * 86_400_000)] = 600_000
    """A watermark is held this long; then impressions leave as unknown, which nobody learns, until clicks come again or
    `genco policy accept-clicks`. Meanwhile memory must fit what is shown, or less is read."""
    stall_timeout_ms: Annotated[int, Field(ge=10_000, le=3_600_000)] = 60_000
    """A joiner that makes no progress for so long ends itself, to be started anew."""

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        return None if value is None else _redis_url(value)


class LearnSettings(KafkaSettings, RedisSettings, SigningSettings, WindowSettings, MetricsSettings):
    """Settings of `genco learn`."""

    learner_group: str = "genco-learner"
    """Consumer group of the learner."""
    checkpoint_dir: Path = Path("data/checkpoints")
    """Where checkpoints are written; must survive a restart."""
    checkpoint_interval_ms: Annotated[int, Field(ge=500, le=3_600_000)] = 10_000
    """A checkpoint is due this long after the last one."""
    update_interval_ms: Annotated[int, Field(ge=100, le=600_000)] = 1_000
    """An update is due this long after the last one, if examples have come."""
    update_max_examples: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    """An update is due at once when so many examples wait."""
    epsilon: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Share of the traffic that stays uniform."""
    particles: Annotated[int, Field(ge=1, le=1024)] = 32
    """Posterior draws in a snapshot."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random in the learner."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:1."""
    text_encoder: Literal["hash", "ngrams", "minilm"] = "hash"
    """What makes numbers of elements' texts: their words and word parts hashed straight into the numbers that features
    leave free, the same hashed wide and reduced by what differs in the catalog, or sentence embeddings so reduced
    (needs the extra `text`, in the servers too)."""
    max_products: Annotated[int, Field(ge=1, le=1_000_000)] = 16_384
    """Products with effects of their own; beyond them a product has the average appeal until another one expires."""
    max_elements: Annotated[int, Field(ge=1, le=1_000_000)] = 4_096
    """The same for elements; beyond them an element is what its content says."""
    min_seen: Annotated[int, Field(ge=1, le=1_000)] = 3
    """How often a name must have been seen to get a row, unless the catalog holds it; keeps a flood of names out."""
    lease_ms: Annotated[int, Field(ge=1_000, le=600_000)] = 15_000
    """How long the right to learn and publish outlives a learner that died; longer than an update may take."""


class ServeSettings(KafkaSettings, RedisSettings, SigningSettings, WindowSettings, MetricsSettings):
    """Settings of `genco serve`."""

    http_host: str = "127.0.0.1"
    """Address of the API. Beyond loopback, tokens are required."""
    http_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of the API; 0: any free one, printed at start."""
    api_tokens: SecretStr | None = None
    """Bearer tokens as scope:sha256hex, separated by commas; scopes decide, feedback, admin. Needed beyond loopback."""
    operator_redis_url: SecretStr | None = None
    """Redis as its user `operator`: with it, callers with the scope admin can pin, freeze and roll back over HTTP."""
    last_good_dir: Path = Path("data/last_good")
    """Where the last verified snapshot is kept for a start without Redis."""
    refresh_interval_ms: Annotated[int, Field(ge=50, le=600_000)] = 500
    """Redis is asked this often for a newer snapshot, besides its announcements."""
    routes: Annotated[str, Field(pattern=r"^\d+-\d+$")] = "0-1023"
    """Range of routes that this server gives to its decisions, first-last."""
    event_queue_size: Annotated[int, Field(ge=100, le=10_000_000)] = 50_000
    """Events that may wait for Kafka; beyond it events are dropped with a known probability."""
    event_linger_ms: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Events are collected this long into one record."""
    event_batch_size: Annotated[int, Field(ge=1, le=5_000)] = 256
    """At most so many events in one record."""
    uniform_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Fixed seed of the decisions, for tests; default: from the operating system."""

    @field_validator("operator_redis_url")
    @classmethod
    def _operator_redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value is None else _redis_url(value)

    @model_validator(mode="after")
    def _routes(self) -> Self:
        first, last = (int(n) for n in self.routes.split("-"))
        if not first <= last < 65536:
            raise ValueError(f"GENCO_ROUTES is {self.routes}; expected first-last with first <= last < 65536")
        return self


class ArchiveSettings(KafkaSettings, MetricsSettings):
    """Settings of `genco archive`."""

    archive_url: str
    """Folder of the archive: a path, or any fsspec URL such as s3://bucket/examples. One folder for each group."""
    archive_group: str = "genco-archive"
    """Consumer group; archivers with the same group share the partitions and write to the same folder."""
    archive_interval_ms: Annotated[int, Field(ge=100, le=3_600_000)] = 60_000
    """Examples of a partition are written this long after the first of them has been read."""
    archive_max_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 256 * 2**20
    """Memory for examples, over all partitions; beyond it the fullest is written at once, which takes as much again."""


class MonitorSettings(KafkaSettings, RedisSettings, SigningSettings, WindowSettings, MetricsSettings):
    """Settings of `genco monitor`."""

    monitor_group: str = "genco-monitor"
    """Consumer group of the monitor. One process of a group watches; each start reads the last attribution window."""
    monitor_interval_ms: Annotated[int, Field(ge=1_000, le=60_000)] = 10_000
    """What has come is judged this often, and the registry is asked for the policy that serves."""
    monitor_warm_examples: Annotated[int, Field(ge=0, le=100_000_000)] = 20_000
    """Matured decisions with a prediction that pass before labels are judged: a young model is wrong, and learns."""
    monitor_stale_ms: Annotated[int, Field(ge=1_000, le=86_400_000)] = 60_000
    """A policy that is this far behind the newest example is a ticket, five times as far a page."""
    monitor_late_ms: Annotated[int, Field(ge=1_000, le=86_400_000)] = 60_000
    """Examples that are written this long after they were due are late."""
    monitor_ignored_fields: str = "hour,minute,weekday,day"
    """Fields of the context that move by themselves, separated by commas: their mix is not watched."""


ALL: Final[tuple[type[_Settings], ...]] = (JoinSettings, LearnSettings, ServeSettings, ArchiveSettings, MonitorSettings)

SettingsT = TypeVar("SettingsT", bound=_Settings)


def variable_names() -> dict[str, str]:
    """Return every environment variable that some process reads, with its description."""
    return {
        f"{PREFIX}{name.upper()}": " ".join((info.description or "").split())
        for settings in ALL
        for name, info in settings.model_fields.items()
    }


def load(settings: type[SettingsT], **overrides: Any) -> SettingsT:
    """Read the settings of a process from the environment.

    Args:
        settings: The class of the process.
        **overrides: Values from the command line, which win; None means not given.

    Raises:
        ConfigurationError: One line with every wrong, missing or unknown setting and what to do.
    """
    faults = list(_unknown_variables())
    values: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    if unknown := values.keys() - settings.model_fields.keys():
        raise TypeError(f"{settings.__name__} has no fields {sorted(unknown)}")
    files: dict[str, Path] = {}
    for name in settings.model_fields:
        path = os.environ.get(f"{PREFIX}{name.upper()}_FILE")
        if path and _is_secret(settings, name) and name not in values:
            files[name] = Path(path)
            try:
                values[name] = SecretFile(files[name]).read()
            except OSError as error:
                cause = error.strerror or "it is not text"
                faults.append(f"{PREFIX}{name.upper()}_FILE: cannot read {path} ({cause}); put the secret there")
    try:
        loaded = settings(**values)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            name = ".".join(str(part) for part in fault["loc"])
            message = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "missing":
                message = f"not set; {' '.join((settings.model_fields[name].description or '').split())}"
            faults.append(f"{PREFIX}{name.upper()}: {message}" if name else message)
    if faults:
        raise ConfigurationError("wrong settings: " + "; ".join(faults))
    loaded.keep_files(files)
    return loaded


def _is_secret(settings: type[_Settings], name: str) -> bool:
    return "SecretStr" in str(settings.model_fields[name].annotation)


def _unknown_variables() -> Iterator[str]:
    known = set(variable_names())
    known |= {
        f"{PREFIX}{name.upper()}_FILE"
        for settings in ALL
        for name in settings.model_fields
        if _is_secret(settings, name)
    }
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            # Without the prefix, or everything would look alike.
            near = difflib.get_close_matches(
                name[len(PREFIX) :], [known_name[len(PREFIX) :] for known_name in known], 1
            )
            yield f"{name}: no such setting" + (f"; did you mean {PREFIX}{near[0]}?" if near else "")


def document() -> str:
    """Return the table of all settings, the text of docs/settings.md."""
    readers: dict[str, type[_Settings]] = {
        "join": JoinSettings,
        "learn": LearnSettings,
        "serve": ServeSettings,
        "archive": ArchiveSettings,
        "monitor": MonitorSettings,
    }
    fields = {name: info for settings in ALL for name, info in settings.model_fields.items()}
    lines = [
        "# Settings",
        "",
        "Environment variables. A secret may also be given as a file: the name with `_FILE` at its end. A wrong,",
        "missing or unknown one ends the process at its start with one line and exit code 78.",
        "",
        "When such a file changes, it is read again: the URL of Redis by every process with its next connection, the",
        "password of Kafka by the server, which connects anew at once, the API tokens within a second (ones that",
        "cannot be read leave those before, and are logged). A signing key, and the password of Kafka in joiner,",
        "learner and archive, need a restart.",
        "",
        "| variable | default | read by | meaning |",
        "|---|---|---|---|",
    ]
    for name, info in fields.items():
        default = "required" if info.is_required() else "-" if info.default is None else f"`{info.default}`"
        by = ", ".join(verb for verb, settings in readers.items() if name in settings.model_fields)
        meaning = " ".join((info.description or "").split())
        lines.append(f"| `{PREFIX}{name.upper()}` | {default} | {by} | {meaning} |")
    return "\n".join(lines) + "\n"
