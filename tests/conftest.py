"""The rules of a run: what needs a GPU waits for one, and nothing else is skipped unnoticed."""

import os
import signal

import pytest
from hypothesis import settings

STRICT = os.environ.get("CI", "").lower() in ("1", "true")
skipped: list[str] = []  # but for want of a GPU

settings.register_profile("attend", deadline=None, derandomize=STRICT)  # a busy machine is no failure
settings.load_profile("attend")


def pytest_collection_modifyitems(items):
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not has_cuda():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def has_cuda():
    import torch

    return torch.cuda.is_available()


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in report.keywords:
        skipped.append(report.nodeid)


def pytest_collectreport(report):
    if report.skipped:
        skipped.append(report.nodeid)


def pytest_sessionfinish(session):
    """In CI a skip is an error: a test that never runs where it counts is no test."""
    if STRICT and skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if STRICT and skipped:
        terminalreporter.section("skipped, which is an error here", red=True)
        for name in skipped:
            terminalreporter.line(name)


@pytest.fixture
def mind():
    """What the tiny model says, for an engine whose sampler it is."""
    from tests.talk import Mind

    mind = Mind()
    yield mind
    mind.go_on()


@pytest.fixture
def engine(request):
    """Room for two conversations with the tiny model, which says what `mind` has it say where a test asks for that too."""
    from agent.engine import Engine
    from tests.serving import LOADED

    with Engine(LOADED, rows=2, length=3200) as engine:
        if "mind" in request.fixturenames:
            engine.sampler = request.getfixturevalue("mind")
        yield engine


@pytest.fixture
def broker(tmp_path):
    """A mosquitto that is running."""
    from tests.broker import Mosquitto

    it = Mosquitto(tmp_path)
    it.start()
    yield it
    it.stop(signal.SIGKILL)


@pytest.fixture
def impatient(monkeypatch):
    """A lost broker is tried again at once."""
    from streams import mqtt

    monkeypatch.setattr(mqtt, "PAUSES", (0.05, 0.5))
