"""The settings of the Faust app that keep it from losing data, where Faust's defaults would."""

from streams.app import MAX_HOLD_S, create_app
from streams.contracts.settings import KafkaSettings


def test_app_that_reads_nothing_for_hours_stays_in_its_group() -> None:
    app = create_app(KafkaSettings(kafka_bootstrap_servers="localhost:9092"), "group")
    assert app.conf.broker_max_poll_interval == MAX_HOLD_S
