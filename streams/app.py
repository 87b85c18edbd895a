"""The Faust app factory: the settings under which Faust loses nothing.

Faust reads and acknowledges; everything else is ours. Values are raw bytes that our code decodes (Faust acknowledges
what it cannot decode), no tables, no joins, no `take()` (it acknowledges what it has not processed), concurrency 1
(with out-of-order acknowledgement Faust 0.15 commits past records in flight), and a crash ends the process, for its
supervisor to start it again from the log.
"""

from __future__ import annotations

import ssl
from typing import Any

import faust
import mode
from aiokafka import AIOKafkaConsumer
from faust.auth import SASLCredentials, SSLCredentials
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport

from streams.contracts.settings import KafkaSettings


class _ConsumerThread(AIOKafkaConsumerThread):
    """Faust asks the broker to wait 1.5 s for records; the embedded broker then does, even when some have come."""

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = transport.fetch_max_wait_ms  # noqa: SLF001 - no setting
        return consumer


class _Consumer(Consumer):
    def _new_consumer_thread(self) -> AIOKafkaConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)


class _Transport(Transport):
    Consumer = _Consumer
    fetch_max_wait_ms: int


def create_app(settings: KafkaSettings, group: str, *, instance_id: str | None = None) -> faust.App:
    """Return an app that is not started yet.

    Args:
        settings: Which brokers, and how.
        group: Consumer group.
        instance_id: Stable name for static membership, or None.
    """
    session_s = settings.kafka_session_timeout_ms / 1000
    options: dict[str, Any] = {}
    if credentials := _credentials(settings):
        options["broker_credentials"] = credentials
    if instance_id:
        options["consumer_group_instance_id"] = instance_id
    app = faust.App(
        group,
        broker=[f"kafka://{server}" for server in settings.kafka_bootstrap_servers.split(",")],
        autodiscover=False,
        processing_guarantee="at_least_once",
        key_serializer="raw",
        value_serializer="raw",
        agent_supervisor=mode.CrashingSupervisor,
        # The default waits for every unacknowledged record at each rebalance and at SIGTERM; we hold them for a window.
        stream_wait_empty=False,
        stream_buffer_maxsize=128,
        broker_commit_interval=2.0,
        broker_max_poll_records=200,
        broker_session_timeout=session_s,
        broker_request_timeout=max(60.0, 2 * session_s),
        broker_heartbeat_interval=session_s / 10,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=4 * 2**20,
        producer_request_timeout=30.0,
        producer_acks=-1,
        # Selects Faust's own assignor, which gives partition p of all our topics to the same worker. aiokafka's
        # round-robin would part impressions from their clicks.
        table_standby_replicas=1,
        topic_disable_leader=True,
        topic_allow_declare=False,
        store="memory://",
        web_enabled=False,
        **options,
    )
    transport = _Transport(app.conf.broker_consumer, app)
    transport.fetch_max_wait_ms = settings.kafka_fetch_max_wait_ms
    app.transport = transport
    return app


def _credentials(settings: KafkaSettings) -> SASLCredentials | SSLCredentials | None:
    protocol = settings.kafka_security_protocol
    context = None
    if protocol.endswith("SSL"):
        context = ssl.create_default_context(cafile=settings.kafka_ssl_cafile)
    if protocol.startswith("SASL") and settings.kafka_sasl_password is not None:
        return SASLCredentials(
            username=settings.kafka_sasl_username,
            password=settings.kafka_sasl_password.get_secret_value(),
            mechanism=settings.kafka_sasl_mechanism,
            ssl_context=context,
        )
    return None if context is None else SSLCredentials(context)


def aiokafka_options(settings: KafkaSettings) -> dict[str, Any]:
    """Return the connection options of an aiokafka client beside the app, such as our idempotent producer."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers.split(","),
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_security_protocol.endswith("SSL"):
        options["ssl_context"] = ssl.create_default_context(cafile=settings.kafka_ssl_cafile)
    if settings.kafka_sasl_mechanism and settings.kafka_sasl_password:
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_sasl_username
        options["sasl_plain_password"] = settings.kafka_sasl_password.get_secret_value()
    return options


def run_worker(app: faust.App) -> None:
    """Run the app until SIGTERM, SIGINT or a crash. Does not return: it exits with 0, or 1 after a crash."""
    worker = faust.Worker(app, loglevel=None, override_logging=False, redirect_stdouts=False, quiet=True)
    worker.execute_from_commandline()
