"""The command line. Each verb imports what it needs when it is called, so that `genco serve` loads no torch.

Exit codes: 0 done; 1 failed, with one line on standard error; 2 wrong usage; 78 wrong settings.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from benchmarks.decide.command import add_parser as add_bench_decide
from benchmarks.learn.command import add_parser as add_bench_learn
from benchmarks.regret.command import add_parser as add_bench_regret
from benchmarks.search.command import add_parser as add_bench_search
from genco.credits import add_parser as add_credits
from genco.learn_arguments import add_once
from genco.policy import add_parser as add_policy
from streams.contracts.settings import EX_CONFIG, ConfigurationError, MetricsSettings, load, variable_names
from streams.contracts.topics import CLICKS, IMPRESSIONS
from streams.telemetry import configure_logging

ONE_LINERS: Final = ("dead-letters", "policy", "check")
"""Verbs that say in one line what has failed; what the client of Kafka logs on its way there only hides it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int | None] = arguments.command
    try:
        settings = load(MetricsSettings)
        configure_logging(settings.log_level)
        if arguments.verb in ONE_LINERS and settings.log_level != "DEBUG":
            logging.getLogger("kafka").setLevel("CRITICAL")
        return command(arguments) or 0
    except ConfigurationError as error:
        print(f"genco {arguments.verb}: {error}", file=sys.stderr)
        return EX_CONFIG
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("genco", "streams", "learner", "serving"):
            raise
        package = error.name.split(".")[0]
        print(f"genco {arguments.verb}: needs the package {package}; {_extra(package)}", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        print(f"genco {arguments.verb}: {error}", file=sys.stderr)
        return 1


def _extra(package: str) -> str:
    """Return how to install what is missing."""
    extras = {"fastapi": "serving", "uvicorn": "serving", "torch": "learner", "matplotlib": "plot", "river": "monitor"}
    extras |= dict.fromkeys(("faust", "aiokafka", "fsspec"), "streams")
    extras |= dict.fromkeys(("numba", "psutil", "vowpalwabbit"), "bench")
    return f"install it with the extra {extras.get(package, 'local')}: pip install '.[{extras.get(package, 'local')}]'"


def _join(_: argparse.Namespace) -> None:
    from streams.contracts.settings import JoinSettings
    from streams.joiner import run

    run(load(JoinSettings))


def _learn(arguments: argparse.Namespace) -> None:
    if arguments.once is not None:
        from rich.console import Console

        from genco.learn_once import run as run_once

        report = run_once(arguments, Console(stderr=True))
        if report is not None:
            _write_json(arguments.json, report)
        return
    if arguments.out is not None or arguments.resume:
        raise ValueError("--out and --resume belong to --once LOG; without it the live learner starts")
    from learner.agents import run
    from streams.contracts.settings import LearnSettings

    run(load(LearnSettings))


def _serve(_: argparse.Namespace) -> int:
    from serving.main import run
    from streams.contracts.settings import ServeSettings

    return run(load(ServeSettings))


def _archive(_: argparse.Namespace) -> None:
    from streams.archive import run
    from streams.contracts.settings import ArchiveSettings

    run(load(ArchiveSettings))


def _monitor(_: argparse.Namespace) -> None:
    from genco.outlook import RegistryOutlook
    from streams.contracts.settings import MonitorSettings
    from streams.monitor.agent import run

    settings = load(MonitorSettings)
    run(settings, RegistryOutlook(settings))


def _demo(arguments: argparse.Namespace) -> int:
    from genco.demo import run

    return run(
        kafka=arguments.kafka,
        seconds=arguments.seconds,
        rate=arguments.rate,
        seed=arguments.seed,
        report=arguments.report,
        directory=arguments.dir,
    )


def _simulate(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from genco.scenarios import SCENARIOS
    from genco.shoppers import run
    from genco.world_config import DEMO_WORLD

    world = DEMO_WORLD if arguments.world_seed is None else replace(DEMO_WORLD, seed=arguments.world_seed)
    if arguments.drift_every is not None:
        world = replace(world, drift_every_s=arguments.drift_every)
    if arguments.new_elements_every is not None:
        world = replace(world, new_elements_every_s=arguments.new_elements_every)
    scenario = None
    if arguments.scenario is not None:
        scenario = SCENARIOS[arguments.scenario](arguments.at, arguments.at + arguments.lasting)
    return run(
        arguments.url,
        world,
        scenario=scenario,
        rate=arguments.rate,
        seconds=arguments.seconds,
        seed=arguments.seed,
        token=arguments.token_file.read_text().strip() if arguments.token_file else None,
        status=arguments.status,
    )


def _check(_: argparse.Namespace) -> int:
    from genco.check import run

    return run()


def _topics(_: argparse.Namespace) -> None:
    from streams.clients import create_topics
    from streams.contracts.settings import KafkaSettings

    created = create_topics(load(KafkaSettings))
    print("created: " + ", ".join(created) if created else "all topics exist")


def _import_obd(arguments: argparse.Namespace) -> None:
    from genco.obd import write_log

    for summary in write_log(arguments.dir, arguments.out):
        print(
            f"{summary.out}: {summary.rows} rows, {summary.impressions} impressions, {summary.clicks} clicks, "
            f"left out: {dict(summary.skipped) or 'none'}"
        )


def _replay(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from genco.folders import require_folder
    from genco.replay import run

    require_folder(arguments.json)
    # As an exception, so that the local services are stopped and their directories removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report = run(
        arguments.log,
        kafka=arguments.kafka,
        partitions=arguments.partitions,
        attribution_window_ms=int(arguments.window * 1000),
        label_wait_ms=int(arguments.label_wait * 1000),
        timeout_s=arguments.timeout,
        console=Console(stderr=True),
    )
    _write_json(arguments.json, report)
    return 0 if report["ledger"]["imbalance"] == 0 else 1


def _list_dead_letters(arguments: argparse.Namespace) -> int:
    from genco.dead_letters import show

    return show(_selection(arguments), as_json=arguments.json)


def _replay_dead_letters(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from genco.dead_letters import replay

    selection = _selection(arguments)
    if not (arguments.all or selection.is_narrowed):
        arguments.wrong_usage("nothing is selected; expected --all, or one of --topic, --reason, --since, ...")
    return replay(
        selection if arguments.again else replace(selection, is_replayed=False),
        edit=arguments.edit,
        force=arguments.force,
        dry_run=arguments.dry_run,
    )


def _selection(arguments: argparse.Namespace) -> Any:
    from streams.dead_letters import Selection

    return Selection(
        topic=arguments.topic,
        reason=arguments.reason,
        partition=arguments.partition,
        since_ms=arguments.since,
        until_ms=arguments.until,
        limit=arguments.limit,
    )


def _bench_codec(arguments: argparse.Namespace) -> None:
    from benchmarks.codec import run

    result = run()
    for name, value in result.items():
        print(f"{name} {value:,.0f}" if isinstance(value, float) else f"{name} {value}")
    _write_json(arguments.json, result)


def _bench_join(arguments: argparse.Namespace) -> None:
    from benchmarks.join import run
    from genco.folders import require_folder

    require_folder(arguments.json)
    # As an exception, so that the broker and the processes are stopped and their directories removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result = run(
        impressions=arguments.impressions,
        kafka=arguments.kafka,
        peers=arguments.peers,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for name, value in result.items():
        print(f"{name} {_figure(value)}")
    _write_json(arguments.json, result)


def _figure(value: Any) -> str:
    """Return a figure for people."""
    if isinstance(value, list):
        return " ".join(_figure(item) for item in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return "-" if value is None else str(value)


def _write_json(path: Path | None, value: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000")
    return int(text)


def _whole(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 15):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _time_ms(text: str) -> int:
    """Read a time, or how long ago it was, as Unix milliseconds."""
    unit = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}.get(text[-1:])
    if unit and text[:-1].isdecimal():
        return int((time.time() - int(text[:-1]) * unit) * 1000)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time; expected such as 2026-01-31T12:00 (UTC), 2026-01-31T12:00+01:00, 90m, 2h or 3d"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _log_size(text: str) -> int:
    if not (text.isdecimal() and 2_000 <= int(text) <= 50_000_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 2000 to 50000000")
    return int(text)


def _settings_help() -> str:
    """Return the settings of the processes, for the end of their help."""
    lines = [f"  {name}\n      {text}" for name, text in sorted(variable_names().items())]
    return "settings, read from the environment (docs/settings.md has the defaults):\n\n" + "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="genco", description="Real-time creative optimisation.")
    try:
        number = version("genco-online")
    except PackageNotFoundError:
        number = "not installed"
    parser.add_argument("--version", action="version", version=f"genco-online {number}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, command: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        return added

    demo = verb("demo", _demo, "the whole loop on this machine, with simulated shoppers and a live view")
    demo.add_argument(
        "--kafka", choices=["embedded", "home"], help="broker: embedded (default), or the Kafka at KAFKA_HOME"
    )
    demo.add_argument("--seconds", type=_positive, help="stop after this long; default: at Ctrl-C")
    demo.add_argument("--rate", type=_positive, default=500, help="impressions a second (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the shoppers (%(default)s)")
    demo.add_argument("--report", type=Path, help="write one JSON object here at the end")
    demo.add_argument("--dir", type=Path, help="keep logs, checkpoints and snapshots here")

    learn = verb("learn", _learn, "learns from examples and publishes policies, or learns a log and stops")
    add_once(learn, _positive, _whole)
    for process in (
        verb("serve", _serve, "the HTTP API: decisions and clicks"),
        verb("join", _join, "joins impressions and clicks into examples"),
        learn,
        verb("archive", _archive, "writes examples to Parquet files"),
        verb("monitor", _monitor, "tells what went wrong, the world or us"),
    ):
        process.formatter_class = argparse.RawDescriptionHelpFormatter
        process.epilog = _settings_help()

    simulate = verb("simulate", _simulate, "simulated shoppers behind a server's API")
    simulate.add_argument("--url", required=True, help="of the server, such as http://127.0.0.1:8080")
    simulate.add_argument("--rate", type=_positive, default=500, help="visits a second (%(default)s)")
    simulate.add_argument("--seconds", type=_positive, help="stop after this long")
    simulate.add_argument("--seed", type=int, default=0, help="seed of the shoppers (%(default)s)")
    simulate.add_argument("--world-seed", type=int, help="another world than the demo's")
    simulate.add_argument("--drift-every", type=_positive, metavar="S", help="tastes move every S seconds")
    simulate.add_argument("--new-elements-every", type=_positive, metavar="S", help="elements change every S seconds")
    simulate.add_argument(
        "--scenario",
        choices=["clicks-stop", "clicks-lost", "clock-skew", "world-drift", "mix-shift"],
        help="what goes wrong, as a drill: clicks are stuck and come late, are lost, have wrong clocks; tastes move at "
        "once; few products are asked for",
    )
    simulate.add_argument("--at", type=_positive, default=20.0, metavar="S", help="when it begins (%(default)s)")
    simulate.add_argument(
        "--lasting", type=_positive, default=20.0, metavar="S", help="how long it lasts (%(default)s)"
    )
    simulate.add_argument("--token-file", type=Path, help="file with a bearer token of scopes decide and feedback")
    simulate.add_argument("--status", type=Path, help="keep the newest status in this file, as JSON")

    verb("check", _check, "what is configured, what answers, and what to do about the rest")
    verb("topics", _topics, "create the topics that do not exist yet")

    importer = verbs.add_parser("import", help="turn a log of another system into ours", description="Logs in.")
    sources = importer.add_subparsers(dest="source", required=True, metavar="SOURCE")
    obd = sources.add_parser("obd", help="the Open Bandit dataset")
    obd.add_argument("dir", type=Path, metavar="DIR", help="folder of the dataset, or of one policy or campaign of it")
    obd.add_argument("out", type=Path, metavar="OUT", help="folder, or .ndjson file if DIR holds one log")
    obd.set_defaults(command=_import_obd)

    replay = verb("replay", _replay, "send a log through Kafka, the joiner and the learner")
    replay.add_argument("log", type=Path, metavar="LOG", help=".ndjson file, or folder of them")
    replay.add_argument(
        "--kafka",
        choices=["embedded", "home", "configured"],
        default="embedded",
        help="broker: %(default)s, that of KAFKA_HOME, or that of the settings, if its topics are empty",
    )
    replay.add_argument("--partitions", type=_count, default=4, help="of a broker started here (%(default)s)")
    replay.add_argument("--window", type=_positive, default=600, help="attribution window in seconds (%(default)s)")
    replay.add_argument("--label-wait", type=_positive, default=60, help="label wait in seconds (%(default)s)")
    replay.add_argument("--timeout", type=_positive, default=120, help="give up after so long without progress")
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the report here")

    _add_dead_letters(verbs)
    add_credits(verbs)
    add_policy(verbs)

    bench = verbs.add_parser("bench", help="benchmarks", description="Benchmarks.")
    benches = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
    codec = benches.add_parser("codec", help="decoding impressions, against json and one pydantic model a line")
    codec.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object here")
    codec.set_defaults(command=_bench_codec)
    join = benches.add_parser("join", help="one joiner from Kafka to Kafka, beside plain Faust and Quix Streams")
    join.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object here")
    join.add_argument("--impressions", type=_log_size, help="in the log (1000000; embedded broker: 60000)")
    join.add_argument(
        "--kafka", choices=["home", "embedded"], help="broker: the Kafka at KAFKA_HOME (default where there is one)"
    )
    join.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="run the peers too (default)"
    )
    join.set_defaults(command=_bench_join)
    add_bench_decide(benches)
    add_bench_regret(benches)
    add_bench_learn(benches)
    add_bench_search(benches)
    return parser


def _add_dead_letters(verbs: Any) -> None:
    dead_letters = verbs.add_parser("dead-letters", help="what the joiner could not read", description="Dead letters.")
    actions = dead_letters.add_subparsers(dest="action", required=True, metavar="ACTION")
    listed = actions.add_parser("list", help="count them by topic and cause")
    listed.add_argument("--json", action="store_true", help="one JSON object for each letter instead of a table")
    listed.set_defaults(command=_list_dead_letters)
    replayed = actions.add_parser("replay", help="send them back to the topics they came from")
    replayed.add_argument("--all", action="store_true", help="needed when nothing else selects")
    replayed.add_argument("--edit", metavar="COMMAND", help="program that gets the lines and prints one for each")
    replayed.add_argument("--dry-run", action="store_true", help="only say what would be sent and left out")
    replayed.add_argument("--again", action="store_true", help="those too that were replayed before")
    replayed.add_argument("--force", action="store_true", help="those too that will be dead letters again")
    replayed.set_defaults(command=_replay_dead_letters, wrong_usage=replayed.error)
    for parser in (listed, replayed):
        parser.add_argument("--topic", choices=[IMPRESSIONS, CLICKS], help="where they came from")
        parser.add_argument("--reason", metavar="TEXT", help="those whose reason holds this text")
        parser.add_argument("--since", type=_time_ms, metavar="TIME", help="written then or later: ISO time, or 2h ago")
        parser.add_argument("--until", type=_time_ms, metavar="TIME", help="written before")
        parser.add_argument("--partition", type=_whole, metavar="N", help="those of one partition")
        parser.add_argument("--limit", type=_whole, metavar="N", help="at most so many")
