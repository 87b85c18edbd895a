"""Who may import whom (design, section 3), and what nobody may: a checker of syntax trees, and tests of the checker."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("streams", "learner", "serving", "genco", "benchmarks")

# What a package may import of the project: exactly this module, or with `.*` what is below it too. First match counts.
ALLOWED = {
    "streams.contracts": ("streams.contracts.*",),
    "streams": ("streams.*",),
    "learner": (
        "learner.*",
        "streams.contracts.*",
        "streams.telemetry",
        "streams.app",
        "streams.clients",
        "streams.registry",
        "streams.control_log",
        "serving.policy",
        "serving.golden",
    ),
    "serving": (
        "serving.*",
        "streams.contracts.*",
        "streams.telemetry",
        "streams.clients",
        "streams.registry",
        "streams.registry_actions",
        "streams.registry_listing",
        "streams.control_log",
    ),
    # `genco bench` starts the benchmarks, which may themselves need the local services of genco.
    "genco.cli": ("genco.*", "streams.*", "learner.*", "serving.*", "benchmarks.*"),
    "genco": ("genco.*", "streams.*", "learner.*", "serving.*"),
    "benchmarks": ("benchmarks.*", "genco.*", "streams.*", "learner.*", "serving.*"),
}
FORBIDDEN_LIBRARIES = {
    "streams.contracts": ("torch", "faust", "aiokafka", "kafka", "redis"),
    "streams": ("torch",),
    "serving": ("torch", "faust", "aiokafka"),
}
UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
UNSAFE_CALLS = {("torch", "load"), ("torch", "save"), ("pandas", "read_pickle")}


def modules() -> dict[str, Path]:
    """Return every module of the project by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(tree: ast.AST, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Yield the modules that a source imports anywhere: at the top, in functions, for types only, by name at run time.

    `from a import b` is `a.b` if that is a module of ours, else `a`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")
                parent = parent[: len(parent) - node.level + is_package]
                base = ".".join([*parent, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base
        elif isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            target = node.args[0]
            if name in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield str(target.value)


def package_of(module: str) -> str:
    """Return the key of the rules that a module stands under."""
    return next((key for key in ALLOWED if is_within(module, key)), module.partition(".")[0])


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def is_allowed(package: str, target: str) -> bool:
    return any(
        is_within(target, rule.removesuffix(".*")) if rule.endswith(".*") else target == rule
        for rule in ALLOWED[package]
    )


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return what a module's source may not do, a line each."""
    tree = ast.parse(source)
    package = package_of(module)
    found = []
    for target in imported(tree, module, is_package=is_package):
        if target.partition(".")[0] in PACKAGES and not is_allowed(package, target):
            found.append(f"{module} imports {target}")
        if any(is_within(target, library) for library in FORBIDDEN_LIBRARIES.get(package, ())):
            found.append(f"{module} imports the library {target}")
        if any(is_within(target, name) for name in UNSAFE_MODULES):
            found.append(f"{module} imports {target}, which executes what it reads")
    names = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id, node.value.id)
            if (owner, node.attr) in UNSAFE_CALLS:
                found.append(f"{module} uses {owner}.{node.attr}, which is pickle")
        elif isinstance(node, ast.ImportFrom):
            found += [
                f"{module} uses {node.module}.{alias.name}, which is pickle"
                for alias in node.names
                if (node.module, alias.name) in UNSAFE_CALLS
            ]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"{module} allows pickle")
    return found


def test_there_is_something_to_check() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(PACKAGES)
    assert {"streams.contracts.codec", "learner.publisher", "serving.policy", "genco"} <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_package_may(module: str) -> None:
    path = MODULES[module]
    assert violations(path.read_text("utf-8"), module, is_package=path.name == "__init__.py") == []


def test_no_two_packages_import_each_other() -> None:
    edges = {
        (package_of(module), package_of(target).replace("genco.cli", "genco"))
        for module, path in MODULES.items()
        for target in imported(ast.parse(path.read_text("utf-8")), module, is_package=path.name == "__init__.py")
        if target.partition(".")[0] in PACKAGES
    }
    assert ("serving", "learner") not in edges
    for first, second in edges:
        assert first == second or (second, first) not in edges, f"{first} and {second} import each other"


ALLOWED_SAMPLES = [
    ("streams.contracts.codec", "from streams.contracts.events import Click"),
    ("streams.contracts.codec", "from streams.contracts import events"),
    ("streams.joiner", "import faust, aiokafka\nfrom streams.contracts import codec\nfrom streams import telemetry"),
    ("learner.worker", "from serving.policy import Policy\nimport torch, faust\nfrom streams.app import create_app"),
    ("learner.worker", "from serving import policy\nfrom streams import telemetry, clients\nimport learner.updates"),
    ("serving.api", "from streams.registry_actions import Operator\nfrom streams.control_log import ControlLog"),
    ("serving.main", "from streams.clients import redis_client\nfrom streams.contracts.snapshot import verify"),
    ("genco.demo", "import streams.joiner, learner.worker, serving.main"),
    ("benchmarks.codec", "import genco.demo, streams.codec, learner, serving"),
    ("serving.main", "import torchlike, faustian, json\nx = np.load(f, allow_pickle=False)\ntorch = y.load()"),
]
FORBIDDEN_SAMPLES = [
    ("streams.contracts.codec", "import streams.telemetry"),
    ("streams.contracts.codec", "from streams import telemetry"),
    ("streams.contracts.codec", "from streams.clients import redis_client"),
    ("streams.contracts.codec", "import redis"),
    ("streams.contracts.codec", "from .. import telemetry"),
    ("streams.joiner", "import serving.policy"),
    ("streams.joiner", "from learner import updates"),
    ("streams.joiner", "def f():\n    from genco.audit import Audit"),
    ("streams.joiner", "import torch.nn as nn"),
    ("streams.joiner", "from ..learner import updates"),
    ("learner.worker", "from streams.attribution import Record"),
    ("learner.worker", "from streams import joiner"),
    ("learner.publisher", "from streams.registry_actions import Operator"),
    ("learner.worker", "import streams"),
    ("learner.worker", "import serving.policy_holder"),
    ("learner.worker", "from serving import main"),
    ("learner.worker", "import genco"),
    ("serving.main", "import learner"),
    ("serving.main", "from streams.app import create_app"),
    ("serving.main", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from learner.gate import Gate"),
    ("serving.main", "import torch"),
    ("serving.main", "from torch import nn"),
    ("serving.main", "def f():\n    import faust"),
    ("serving.main", "import aiokafka.errors"),
    ("serving.main", "import importlib\nimportlib.import_module('torch')"),
    ("serving.main", "__import__('learner.worker')"),
    ("genco.demo", "import benchmarks.codec"),
    ("learner.checkpoint", "import pickle"),
    ("learner.checkpoint", "from pickle import loads"),
    ("benchmarks.codec", "import dill as json"),
    ("genco.demo", "import marshal"),
    ("genco.demo", "import shelve"),
    ("learner.checkpoint", "import torch\nx = torch.load(path)"),
    ("learner.checkpoint", "import torch as t\nread = t.load"),
    ("learner.checkpoint", "from torch import load"),
    ("learner.checkpoint", "import numpy as np\nnp.load(path, allow_pickle=True)"),
]


@pytest.mark.parametrize(("module", "source"), ALLOWED_SAMPLES)
def test_checker_lets_pass_what_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize(("module", "source"), FORBIDDEN_SAMPLES)
def test_checker_finds_what_is_not(module: str, source: str) -> None:
    assert violations(source, module) != []


def test_checker_resolves_relative_imports() -> None:
    def names(source: str, module: str, is_package: bool) -> list[str]:
        return list(imported(ast.parse(source), module, is_package=is_package))

    assert names("from . import codec", "streams.contracts.events", False) == ["streams.contracts.codec"]
    assert names("from .codec import x", "streams.contracts", True) == ["streams.contracts.codec"]
    assert names("from .. import telemetry", "streams.contracts", True) == ["streams.telemetry"]
    assert names("from .. import nothing", "streams.contracts.codec", False) == ["streams"]
