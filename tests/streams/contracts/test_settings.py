"""Settings come from the environment, and what is wrong there is said in one line before anything starts."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from streams.contracts.settings import (
    ALL,
    ArchiveSettings,
    ConfigurationError,
    JoinSettings,
    LearnSettings,
    ServeSettings,
    WindowSettings,
    load,
    variable_names,
)

KEY = "0123456789abcdef" * 4
PASSWORD = "hunter2-hunter2"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The least that every process needs, and nothing from outside."""
    for name in list(os.environ):
        if name.upper().startswith("GENCO_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GENCO_KAFKA_BOOTSTRAP_SERVERS", "localhost:9092")
    monkeypatch.setenv("GENCO_REDIS_URL", f"redis://:{PASSWORD}@localhost:6379/0")
    monkeypatch.setenv("GENCO_SIGNING_KEY", KEY)
    monkeypatch.setenv("GENCO_ARCHIVE_URL", "archive")
    return monkeypatch


def fault(settings: type[JoinSettings | LearnSettings | ServeSettings] = JoinSettings) -> str:
    with pytest.raises(ConfigurationError) as error:
        load(settings)
    message = str(error.value)
    assert message.startswith("wrong settings: ")
    assert "\n" not in message
    return message


def test_values_come_from_the_prefix_alone(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("PARTITIONS", "99")
    environment.setenv("GENCO_LABEL_WAIT_MS", "5000")
    settings = load(JoinSettings)
    assert (settings.partitions, settings.label_wait_ms) == (4, 5000)
    assert settings.kafka_bootstrap_servers == "localhost:9092"


@pytest.mark.parametrize("settings", ALL)
def test_least_environment_is_enough_and_defaults_hold(settings: type[JoinSettings]) -> None:
    loaded = load(settings)
    assert (loaded.kafka_session_timeout_ms, loaded.partitions) == (30_000, 4)
    if issubclass(settings, WindowSettings):
        assert (loaded.attribution_window_ms, loaded.label_wait_ms) == (600_000, 60_000)


@pytest.mark.parametrize("settings", ALL)
def test_every_setting_has_a_description_and_every_variable_one_meaning(settings: type[JoinSettings]) -> None:
    names = variable_names()
    for name, info in settings.model_fields.items():
        assert info.description, name
        assert names[f"GENCO_{name.upper()}"] == " ".join(info.description.split())


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load(JoinSettings).partitions = 5  # type: ignore[misc]


def test_override_wins_and_none_means_not_given(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_PARTITIONS", "8")
    assert load(JoinSettings, partitions=2).partitions == 2
    assert load(JoinSettings, partitions=None).partitions == 8


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (JoinSettings, {"GENCO_KAFKA_BOOTSTRAP_SERVERS"}),
        (LearnSettings, {"GENCO_KAFKA_BOOTSTRAP_SERVERS", "GENCO_REDIS_URL", "GENCO_SIGNING_KEY"}),
        (ServeSettings, {"GENCO_KAFKA_BOOTSTRAP_SERVERS", "GENCO_REDIS_URL", "GENCO_SIGNING_KEY"}),
        (ArchiveSettings, {"GENCO_KAFKA_BOOTSTRAP_SERVERS", "GENCO_ARCHIVE_URL"}),
    ],
)
def test_every_missing_setting_is_named_at_once_with_what_it_is(
    environment: pytest.MonkeyPatch, settings: type[JoinSettings], missing: set[str]
) -> None:
    for name in missing:
        environment.delenv(name)
    message = fault(settings)
    for name in missing:
        assert f"{name}: not set; {variable_names()[name]}" in message


def test_empty_variable_counts_as_not_set(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_PARTITIONS", "")
    assert load(JoinSettings).partitions == 4
    environment.setenv("GENCO_KAFKA_BOOTSTRAP_SERVERS", "")
    assert "GENCO_KAFKA_BOOTSTRAP_SERVERS: not set" in fault()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KAFKA_BOOTSTRAP_SERVERS", "localhost"),
        ("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092,"),
        ("KAFKA_BOOTSTRAP_SERVERS", "a b:1"),
        ("KAFKA_API_VERSION", "new"),
        ("KAFKA_SECURITY_PROTOCOL", "TLS"),
        ("KAFKA_FETCH_MAX_WAIT_MS", "0"),
        ("KAFKA_SESSION_TIMEOUT_MS", "5999"),
        ("PARTITIONS", "0"),
        ("PARTITIONS", "four"),
        ("PARTITIONS", "10001"),
        ("ATTRIBUTION_WINDOW_MS", "999"),
        ("LABEL_WAIT_MS", "-1"),
        ("METRICS_PORT", "65536"),
        ("LOG_LEVEL", "LOUD"),
        ("IDLE_TIMEOUT_MS", "-1"),
        ("MAX_FUTURE_SKEW_MS", "-1"),
        ("EMIT_LINGER_MS", "10001"),
        ("MODEL_ID", "a:b"),
        ("MODEL_ID", "x" * 65),
        ("SIGNING_KEY", "x" * 31),
        ("EPSILON", "0"),
        ("EPSILON", "1.5"),
        ("PARTICLES", "0"),
        ("SEED", str(2**32)),
        ("LEASE_MS", "999"),
        ("CHECKPOINT_INTERVAL_MS", "499"),
        ("HTTP_PORT", "-1"),
        ("ROUTES", "5"),
        ("ROUTES", "9-3"),
        ("ROUTES", "0-65536"),
        ("EVENT_QUEUE_SIZE", "99"),
        ("EVENT_BATCH_SIZE", "5001"),
        ("ARCHIVE_INTERVAL_MS", "99"),
        ("ARCHIVE_MAX_BYTES", "1048575"),
    ],
)
def test_wrong_value_is_named(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(f"GENCO_{name}", value)
    owner = next(settings for settings in ALL if name.lower() in settings.model_fields)
    message = fault(owner)
    assert f"GENCO_{name}: " in message or f"GENCO_{name} is {value}; " in message


def test_right_values_at_their_limits_load(environment: pytest.MonkeyPatch) -> None:
    for name, value in {
        "KAFKA_BOOTSTRAP_SERVERS": "a:1,b-2.example:65000",
        "KAFKA_API_VERSION": "0.11",
        "ROUTES": "65535-65535",
        "MODEL_ID": "A_b-9",
        "EPSILON": "1",
        "LABEL_WAIT_MS": "600000",
        "SIGNING_KEY": "x" * 32,
    }.items():
        environment.setenv(f"GENCO_{name}", value)
    settings = load(ServeSettings)
    assert settings.signing_key_bytes() == b"x" * 32
    assert load(LearnSettings).epsilon == 1


def test_long_signing_key_fits_the_keyed_hash(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_SIGNING_KEY", "k" * 100)
    assert load(ServeSettings).signing_key_bytes() == b"k" * 64


# -- unknown variables -------------------------------------------------------------------------------------------------


def test_unknown_variable_is_refused_with_a_suggestion(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_LABEL_WAIT", "5000")
    assert "GENCO_LABEL_WAIT: no such setting; did you mean GENCO_LABEL_WAIT_MS?" in fault()


def test_unknown_variable_like_nothing_is_refused_without_one(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_" + "Q" * 30, "1")
    message = fault()
    assert f"GENCO_{'Q' * 30}: no such setting" in message
    assert "did you mean" not in message


def test_variable_of_another_process_is_known(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_HTTP_PORT", "1234")
    environment.setenv("GENCO_CHECKPOINT_DIR", "/x")
    load(JoinSettings)


def test_all_faults_come_in_one_line(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_PARTITONS", "8")
    environment.setenv("GENCO_LABEL_WAIT_MS", "soon")
    environment.delenv("GENCO_KAFKA_BOOTSTRAP_SERVERS")
    message = fault()
    for name in ("GENCO_PARTITONS", "GENCO_LABEL_WAIT_MS", "GENCO_KAFKA_BOOTSTRAP_SERVERS"):
        assert f"{name}: " in message
    assert "did you mean GENCO_PARTITIONS?" in message


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_secret_may_come_from_a_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("file-" + KEY + "\n")
    environment.delenv("GENCO_SIGNING_KEY")
    environment.setenv("GENCO_SIGNING_KEY_FILE", str(path))
    assert load(ServeSettings).signing_key.get_secret_value() == "file-" + KEY
    load(JoinSettings)  # knows the variable, needs it not


def test_optional_secret_may_come_from_a_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("decide:" + "0" * 64)
    environment.setenv("GENCO_API_TOKENS_FILE", str(path))
    tokens = load(ServeSettings).api_tokens
    assert tokens is not None
    assert tokens.get_secret_value() == "decide:" + "0" * 64


def test_secret_file_that_cannot_be_read_is_named(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("GENCO_SIGNING_KEY_FILE", str(tmp_path / "none"))
    message = fault(ServeSettings)
    assert "GENCO_SIGNING_KEY_FILE: cannot read" in message
    assert "No such file" in message


def test_secret_in_a_file_is_checked_like_any_other(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("short")
    environment.delenv("GENCO_SIGNING_KEY")
    environment.setenv("GENCO_SIGNING_KEY_FILE", str(path))
    message = fault(ServeSettings)
    assert "GENCO_SIGNING_KEY: " in message
    assert "short" not in message.replace("too short", "")


@pytest.mark.parametrize("settings", [LearnSettings, ServeSettings])
def test_secrets_are_in_no_representation(settings: type[ServeSettings], environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_KAFKA_SASL_PASSWORD", PASSWORD)
    environment.setenv("GENCO_API_TOKENS", f"admin:{PASSWORD}")
    loaded = load(settings)
    for text in (repr(loaded), str(loaded), loaded.model_dump_json(), repr(loaded.model_dump())):
        assert PASSWORD not in text
        assert KEY not in text


def test_secrets_are_in_no_error(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_SIGNING_KEY", PASSWORD)  # too short
    environment.setenv("GENCO_PARTITIONS", "0")
    message = fault(ServeSettings)
    assert "GENCO_SIGNING_KEY: " in message
    assert PASSWORD not in message


# -- settings that depend on each other --------------------------------------------------------------------------------


def test_label_wait_is_at_most_the_window(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_ATTRIBUTION_WINDOW_MS", "30000")
    assert "GENCO_LABEL_WAIT_MS is 60000; at most GENCO_ATTRIBUTION_WINDOW_MS (30000)" in fault()
    environment.setenv("GENCO_LABEL_WAIT_MS", "30000")
    assert load(JoinSettings).label_wait_ms == 30_000


@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_sasl_needs_mechanism_user_and_password(environment: pytest.MonkeyPatch, protocol: str) -> None:
    environment.setenv("GENCO_KAFKA_SECURITY_PROTOCOL", protocol)
    for name, value in (("MECHANISM", "PLAIN"), ("USERNAME", "u"), ("PASSWORD", PASSWORD)):
        message = fault()
        assert f"GENCO_KAFKA_SECURITY_PROTOCOL is {protocol}; set also" in message
        assert PASSWORD not in message
        environment.setenv(f"GENCO_KAFKA_SASL_{name}", value)
    load(JoinSettings)


# -- known gaps --------------------------------------------------------------------------------------------------------


def test_file_of_a_setting_that_is_no_secret_is_not_ignored(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GENCO_PARTITIONS_FILE", "/run/secrets/partitions")
    assert "GENCO_PARTITIONS_FILE" in fault()


def test_secret_file_that_is_no_text_is_named(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"\xff" * 40)
    environment.setenv("GENCO_SIGNING_KEY_FILE", str(path))
    assert "GENCO_SIGNING_KEY_FILE" in fault(ServeSettings)


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost"])
def test_redis_url_of_another_form_is_named(environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("GENCO_REDIS_URL", url)
    assert "GENCO_REDIS_URL" in fault(ServeSettings)


def test_unknown_override_is_refused() -> None:
    with pytest.raises((ConfigurationError, TypeError), match="partitons"):
        load(JoinSettings, partitons=3)
