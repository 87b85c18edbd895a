"""Local servers for demos and tests: the embedded broker, Redis, a real Kafka, and what keeps their processes in order.

The names are imported when they are first used, so that `python -m genco.services.mock_broker` loads its module once
(runpy warns when the package has loaded it already) and starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genco.services.kafka_home import KafkaBroker, find_kafka_home
    from genco.services.mock_broker import MOCK_BROKER_PARTITION_BYTES, MockBroker
    from genco.services.process import ManagedProcess, ServiceError, free_port
    from genco.services.redis_server import RedisServer
    from genco.services.service import Service
    from genco.services.supervisor import EXIT_CONFIGURATION, ChildCommand, Supervisor

__all__ = [
    "EXIT_CONFIGURATION",
    "MOCK_BROKER_PARTITION_BYTES",
    "ChildCommand",
    "KafkaBroker",
    "ManagedProcess",
    "MockBroker",
    "RedisServer",
    "Service",
    "ServiceError",
    "Supervisor",
    "find_kafka_home",
    "free_port",
]

_MODULE_OF = {
    "EXIT_CONFIGURATION": "supervisor",
    "MOCK_BROKER_PARTITION_BYTES": "mock_broker",
    "ChildCommand": "supervisor",
    "KafkaBroker": "kafka_home",
    "ManagedProcess": "process",
    "MockBroker": "mock_broker",
    "RedisServer": "redis_server",
    "Service": "service",
    "ServiceError": "process",
    "Supervisor": "supervisor",
    "find_kafka_home": "kafka_home",
    "free_port": "process",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
