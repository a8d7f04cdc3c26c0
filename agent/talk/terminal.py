"""A conversation in a terminal: finished lines above, and below them one status line that is redrawn (rich).

Without a terminal, or with --plain, words are printed as they are heard and no line is redrawn.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import IO, Self

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from agent import events
from agent.events import Event
from agent.marks import Mark

REFRESH = 8  # times a second
METER, FLOOR, LOUD = 16, -60.0, -6.0  # characters; dB below which it is empty, and at which it is full
STYLES = {"you": "bold", "attend": "bold cyan", "mark": "yellow", "times": "dim", "note": "magenta"}


class Terminal:
    """`lively`: with the status line. `times`: the latency of each turn is printed."""

    def __init__(self, out: IO[str], lively: bool, times: bool = True) -> None:
        self._out, self._times = out, times
        self._console = Console(file=out, highlight=False, soft_wrap=True)
        self._lively = lively
        self.state = "listening"
        self.level = 0.0  # of the microphone, sinking slowly
        self._answer: int | None = None
        self._text, self._shown = "", 0  # of the answer: its text so far, and how many characters of it were shown
        self._words: list[events.WordTiming] = []
        self._heard = 0  # the sample up to which it was played
        self._sound = False  # it has sound
        self._later: list[tuple[str, str]] = []  # lines that wait until the answer's line is complete
        self._begun = False  # the answer's line
        self._live = Live(get_renderable=self._bottom, console=self._console, refresh_per_second=REFRESH, transient=True)

    def __enter__(self) -> Self:
        if self._lively:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._begun and not self._lively:
            self._out.write("\n")
            self._out.flush()
        if self._lively:
            self._live.stop()

    # -- what is told

    def hear(self, frame: np.ndarray) -> None:
        """A frame [samples] of the microphone, for the level meter."""
        self.level = max(float(np.sqrt(np.mean(frame * frame))), self.level * 0.7)

    def note(self, message: str) -> None:
        self._line("note", message)

    def tell(self, event: Event) -> None:
        match event:
            case events.TurnStarted():
                self.state = "you speak"
            case events.TurnStopped() | events.TurnDiscarded():
                self.state = "listening"
            case events.InputTranscribed() if event.text:
                self._line("you", event.text)
            case events.AnswerStarted():
                self.state, self._answer = "thinking", event.answer
                self._text, self._shown, self._words, self._heard, self._sound = "", 0, [], 0, False
            case events.TextDelta():
                self._text += event.text
                self._grow()
            case events.AudioDelta():
                self.state, self._sound = "speaking", True
                known = {(word.start, word.sample) for word in self._words}
                self._words += [word for word in event.words if (word.start, word.sample) not in known]
                self._grow()
            case events.MarkAdded():
                self._line("mark", words(event.mark))
            case events.AnswerDone():
                self._over(event)
            case events.AnswerTimings() if self._times and (told := times(event)):
                self._line("times", told)
            case events.Notice() | events.SessionFailed():
                self.note(event.message)

    def heard(self, answer: int, sample: int) -> None:
        """The sound of `answer` was played up to `sample`."""
        if answer == self._answer:
            self._heard = sample
            self._grow()

    # -- lines

    def _reached(self) -> int:
        """How many characters of the answer are shown: words that have begun to sound; without word times, all of the text."""
        if not self._words:
            return 0 if self._sound else len(self._text)
        return max((word.end for word in self._words if word.sample <= self._heard and self._heard), default=0)

    def _grow(self) -> None:
        reached = len(self._text[: self._reached()].rstrip())
        if reached <= self._shown or (not self._sound and not self._begun and not self._text.strip()):
            return
        if not self._lively:
            if not self._begun:
                self._out.write(f"{'attend':<9}")
            piece = self._text[self._shown : reached]
            self._out.write(piece.lstrip() if not self._begun else piece)
            self._out.flush()
        self._begun, self._shown = True, reached

    def _over(self, event: events.AnswerDone) -> None:
        self._text, heard = event.text, event.heard
        unheard = event.text[heard:].strip()
        if self._lively:
            line = Text(f"{'attend':<9}", STYLES["attend"]) + Text(event.text[:heard].strip())
            self._console.print(line + Text(f" {unheard}" if unheard else "", "dim strike"))
        else:
            head = "" if self._begun else f"{'attend':<9}"
            rest = event.text[self._shown : heard].rstrip()
            tail = f"   (not heard: {unheard})" if unheard else ""
            self._out.write(f"{head}{rest if self._begun else rest.lstrip()}{tail}\n")
            self._out.flush()
        self.state, self._answer, self._begun = "listening", None, False
        later, self._later = self._later, []
        for kind, text in later:
            self._line(kind, text)

    def _line(self, kind: str, text: str) -> None:
        if self._begun and not self._lively:
            self._later.append((kind, text))
        elif self._lively:
            self._console.print(Text(f"{kind:<9}", STYLES[kind]) + Text(text))
        else:
            self._out.write(f"{kind:<9}{text}\n")
            self._out.flush()

    def _bottom(self) -> Text:
        text = self._text[: self._shown].strip() if self._answer is not None else ""
        return (
            Text(meter(self.level), "green") + Text(f" {self.state:<10}", "dim") + Text(text[-self._console.width + METER + 14 :])
        )


def meter(level: float) -> str:
    """A level meter, for sound with this root mean square."""
    decibels = 20 * math.log10(max(level, 1e-6))
    full = round(METER * (min(max(decibels, FLOOR), LOUD) - FLOOR) / (LOUD - FLOOR))
    return "▮" * full + "▯" * (METER - full)


def words(mark: Mark) -> str:
    """A mark in words: its label, where it is in the picture, and its box."""
    top, left, bottom, right = mark.box
    down, across = (top + bottom) / 2, (left + right) / 2
    vertical = "at the top" if down < 333 else "at the bottom" if down > 667 else "in the middle"
    side = "left" if across < 333 else "right" if across > 667 else ""
    place = f"{vertical} {side}".strip() if vertical != "in the middle" or not side else f"on the {side}"
    return f"{mark.label or 'something'} {place}: {list(mark.box)}"


def times(event: events.AnswerTimings) -> str:
    """The latency of a turn: the silence that ended it, first token, first sound."""
    stages = event.stages
    silence = [f"{-stages['speech_end']:.0f} ms of silence ended the turn"] if "speech_end" in stages else []
    named = (("first_token", "first token"), ("first_sound", "first sound"))
    return ", ".join([*silence, *(f"{name} after {stages[stage]:.0f} ms" for stage, name in named if stage in stages)])
