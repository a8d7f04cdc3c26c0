"""The Prometheus metrics of /metrics. Times are in seconds."""

from __future__ import annotations

from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from agent import events
from agent.engine import Engine
from agent.events import Event
from agent.session import Session

BUCKETS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)


class Metrics:
    """Counters and gauges of a server. `sessions`: those that run now."""

    def __init__(self, sessions: Collection[Session]) -> None:
        self._registry = registry = CollectorRegistry()
        self._sessions = sessions

        def times(name: str, what: str) -> Histogram:
            return Histogram(f"attend_{name}_seconds", what, buckets=BUCKETS, registry=registry)

        self._stages = {
            "first_token": times("first_token", "From the frame that ended the turn to the first token"),
            "first_sound": times("first_sound", "From the frame that ended the turn to the first sound"),
        }
        self._silence = times("turn_end_to_first_sound", "From the end of speech to the first sound")
        self.conversations = Counter("attend_conversations", "Conversations that began", registry=registry)
        self.errors = Counter("attend_errors", "What went wrong", ["kind"], registry=registry)
        self.refused = Counter("attend_refused", "Requests that were not let in", ["why"], registry=registry)
        self._interruptions = Counter("attend_interruptions", "Answers that were cut short", registry=registry)
        self.dropped = Counter("attend_frames_dropped", "Frames lost to a model that is too slow", registry=registry)

    def watch(self, engine: Engine) -> None:
        """Adds the engine's gauges, once the model is loaded."""
        sessions = self._sessions

        def gauge(name: str, what: str, value: Callable[[], float]) -> None:
            Gauge(f"attend_{name}", what, registry=self._registry).set_function(value)

        gauge("rows", "Conversations that can be held at once", lambda: engine.rows)
        gauge("rows_free", "Conversations that can begin", lambda: engine.free)
        gauge("positions", "Positions in all rows", lambda: sum(session.record.positions for session in sessions))
        gauge("positions_waiting", "Positions not yet in a row", lambda: sum(session.record.row.waiting for session in sessions))
        gauge("frame_lag_seconds", "The median time of the last frames to their row", lambda: _median(engine.lags))
        gauge("step_seconds", "The median time of the last steps, of one position for each row", lambda: _median(engine.steps))

    def count(self, event: Event) -> None:
        """Counts one event of a session."""
        match event:
            case events.AnswerTimings():
                for name, times in self._stages.items():
                    if name in event.stages:
                        times.observe(event.stages[name] / 1000)
                if {"first_sound", "speech_end"} <= event.stages.keys():
                    self._silence.observe((event.stages["first_sound"] - event.stages["speech_end"]) / 1000)
            case events.AnswerDone(finish="interrupted"):
                self._interruptions.inc()
            case events.InputTranscriptionFailed():
                self.errors.labels("caption").inc()
            case events.Notice():
                self.errors.labels("noted").inc()
            case events.SessionFailed():
                self.errors.labels("failed").inc()

    def page(self) -> bytes:
        return generate_latest(self._registry)


def _median(seconds: Collection[float]) -> float:
    recent = sorted(list(seconds)[-1000:])
    return recent[len(recent) // 2] if recent else 0.0
