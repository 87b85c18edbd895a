"""The loop's own promises: closed against the caller's settings, and refused where it cannot work."""

import os

import pytest

from genco.loop import Loop, LoopOptions
from streams.contracts.settings import ConfigurationError, LearnSettings


def test_local_loop_ignores_the_settings_of_a_real_system(monkeypatch: pytest.MonkeyPatch) -> None:
    real = {
        "GENCO_KAFKA_BOOTSTRAP_SERVERS": "kafka.example:9092",
        "GENCO_REDIS_URL": "redis://:secret@redis.example:6379/0",
        "GENCO_SIGNING_KEY": "the key of the real system, 32 characters",
        "GENCO_MODEL_ID": "real",
        "GENCO_KAFKA_SECURITY_PROTOCOL": "SSL",
    }
    for name, value in real.items():
        monkeypatch.setenv(name, value)
    with Loop(LoopOptions(roles=())) as loop:
        loop._start_redis()
        settings = loop.settings(LearnSettings)
        assert settings.kafka_bootstrap_servers.startswith("127.0.0.1:")
        assert settings.redis_url.get_secret_value().endswith("/0")
        assert "127.0.0.1" in settings.redis_url.get_secret_value()
        assert settings.signing_key.get_secret_value() != real["GENCO_SIGNING_KEY"]
        assert settings.model_id == "default"
        assert settings.kafka_security_protocol == "PLAINTEXT"
        assert not set(real) & set(os.environ), "children inherit the environment"
    assert {name: os.environ[name] for name in real} == real


def test_rate_that_the_embedded_broker_cannot_keep_is_refused() -> None:
    with (
        pytest.raises(ConfigurationError, match="do not fit the embedded broker"),
        Loop(LoopOptions(roles=(), rate=50_000)),
    ):
        pass
