"""What a Redis must be like before anybody trusts it with the policy."""

from collections.abc import Iterator

import pytest
import redis

from genco.services import RedisServer
from streams.clients import require_redis
from streams.contracts.settings import ConfigurationError


@pytest.fixture(scope="module")
def client() -> Iterator[redis.Redis]:
    with RedisServer() as server, redis.Redis.from_url(server.url, socket_timeout=5.0) as connected:
        yield connected


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-ttl", "volatile-lru"])
def test_redis_that_evicts_is_refused_with_the_mending_command(client: redis.Redis, policy: str) -> None:
    client.config_set("maxmemory-policy", policy)
    port = client.connection_pool.connection_kwargs["port"]
    try:
        with pytest.raises(ConfigurationError, match=f"maxmemory-policy {policy}") as caught:
            require_redis(client)
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    assert f"redis-cli -h 127.0.0.1 -p {port} CONFIG SET maxmemory-policy noeviction" in str(caught.value)
    assert require_redis(client) == f"127.0.0.1:{port}"
