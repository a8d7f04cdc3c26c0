"""Who has the floor: a table of cases, played first as probabilities and then as sound through the real VAD."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.turns import (
    BargeIn,
    IdleTimeout,
    OutputPaused,
    OutputResumed,
    PauseEnded,
    PauseStarted,
    SpeechDiscarded,
    SpeechEnded,
    SpeechStarted,
    TurnDetectionConfig,
    TurnDetector,
)
from model.vad import Vad
from streams.espeak import Espeak

FRAME = 640
MS = 16  # samples


# ---- the steps of a case: sounds that last, and things that happen


@dataclass(frozen=True)
class Sound:
    kind: str
    ms: int  # as probabilities; a spoken text lasts as long as it lasts
    text: str = ""


def quiet(ms):
    return Sound("quiet", ms)


def talk(text, ms):
    return Sound("talk", ms, text)


def noise(ms):
    return Sound("noise", ms)


def music(ms):
    return Sound("music", ms)


COUGH = Sound("cough", 120)
QUESTION = talk("What colour is the large circle on the left?", 2000)
TAIL = quiet(800)


def heard(samples):
    return ("heard", samples)


HANDS_FREE = TurnDetectionConfig()


@dataclass(frozen=True)
class Case:
    name: str
    steps: tuple
    expected: str  # the decisions in order, as probabilities give them
    detection: TurnDetectionConfig = HANDS_FREE


BUTTON = TurnDetectionConfig(hands_free=False)

CASES = [
    Case("a sentence", (quiet(600), QUESTION, TAIL), "SpeechStarted PauseStarted SpeechEnded:silence"),
    Case("yes", (quiet(600), talk("Yes.", 320), TAIL), "SpeechStarted PauseStarted SpeechEnded:silence"),
    Case("no", (quiet(600), talk("No.", 240), TAIL), "SpeechStarted PauseStarted SpeechEnded:silence"),
    Case("two", (quiet(600), talk("Two.", 240), TAIL), "SpeechStarted PauseStarted SpeechEnded:silence"),
    Case(
        "pauses inside a sentence",
        (quiet(600), talk("What colour", 600), quiet(280), talk("is the large", 600), quiet(360), talk("circle", 480), TAIL),
        "SpeechStarted PauseStarted PauseEnded PauseStarted PauseEnded PauseStarted SpeechEnded:silence",
    ),
    Case(
        "a hesitation longer than the timer, and the rest before the answer is heard",
        (
            quiet(600),
            talk("Show me the large", 900),
            quiet(720),
            "answering",
            quiet(80),
            talk("blue circle on the left", 1400),
            TAIL,
        ),
        "SpeechStarted PauseStarted SpeechEnded:silence OutputPaused BargeIn SpeechStarted PauseStarted SpeechEnded:silence",
    ),
    Case(
        "two quick turns",
        (quiet(600), talk("Hello there", 600), quiet(760), talk("What do you see?", 800), TAIL),
        "SpeechStarted PauseStarted SpeechEnded:silence SpeechStarted PauseStarted SpeechEnded:silence",
    ),
    Case("a cough", (quiet(600), COUGH, TAIL), "SpeechStarted PauseStarted SpeechDiscarded"),
    Case(
        "a cough, then a sentence",
        (quiet(600), COUGH, quiet(240), QUESTION, TAIL),
        "SpeechStarted PauseStarted PauseEnded PauseStarted SpeechEnded:silence",
    ),
    Case("silence", (quiet(4000),), ""),
    Case("noise", (noise(4000),), ""),
    Case("music", (music(6000),), ""),
    Case("silence over an answer", ("answering", heard(8000), quiet(3000), "answered", quiet(1000)), ""),
    Case("noise over an answer", ("answering", heard(8000), noise(3000), "answered", quiet(1000)), ""),
    Case("music over an answer", ("answering", heard(8000), music(4000), "answered", quiet(1000)), ""),
    Case("a cough over an answer", ("answering", heard(8000), quiet(600), COUGH, TAIL, "answered"), "OutputPaused OutputResumed"),
    Case(
        "coughs one after the other over an answer",
        ("answering", heard(8000), quiet(600), COUGH, quiet(400), COUGH, quiet(600), COUGH, TAIL, "answered"),
        "OutputPaused OutputResumed OutputPaused OutputResumed OutputPaused OutputResumed",
    ),
    Case(
        "mm-hmm over an answer",
        ("answering", heard(8000), quiet(600), talk("mm-hmm", 600), TAIL, "answered"),
        "OutputPaused OutputResumed",
    ),
    Case(
        "uh-huh and yeah over an answer",
        ("answering", heard(8000), quiet(600), talk("uh huh", 400), quiet(900), talk("yeah", 360), TAIL, "answered"),
        "OutputPaused OutputResumed OutputPaused OutputResumed",
    ),
    Case(
        "overlapping talk",
        ("answering", heard(8000), quiet(600), talk("No, wait, I mean the other one.", 1700), TAIL),
        "OutputPaused BargeIn SpeechStarted PauseStarted SpeechEnded:silence",
    ),
    Case(
        "talk straight after the answer starts",
        (quiet(600), QUESTION, quiet(720), "answering", quiet(40), talk("and what shape has it got?", 1300), TAIL),
        "SpeechStarted PauseStarted SpeechEnded:silence OutputPaused BargeIn SpeechStarted PauseStarted SpeechEnded:silence",
    ),
    Case(
        "talk that outlasts the answer",
        ("answering", heard(8000), quiet(600), talk("And what", 400), "answered", talk("about the other one?", 1000), TAIL),
        "OutputPaused SpeechStarted PauseStarted SpeechEnded:silence",
    ),
    Case(
        "talk over an answer that cannot be interrupted",
        ("answering", heard(8000), quiet(600), QUESTION, quiet(400), "answered", quiet(200), talk("What do you see?", 800), TAIL),
        "SpeechStarted PauseStarted SpeechEnded:silence",
        TurnDetectionConfig(interrupt=False),
    ),
    Case(
        "push to talk, with a long pause",
        (
            quiet(400),
            talk("nobody listens", 800),
            quiet(700),
            "press",
            QUESTION,
            quiet(1500),
            talk("on the left", 600),
            "release",
            quiet(900),
        ),
        "SpeechStarted PauseStarted PauseEnded SpeechEnded:released",
        BUTTON,
    ),
    Case(
        "push to talk, released before the last sound is over",
        (quiet(400), "press", QUESTION, "release", talk("left", 200), TAIL),
        "SpeechStarted SpeechEnded:released",
    ),
    Case("a tap on the button", (quiet(400), "press", quiet(80), "release", TAIL), "SpeechStarted SpeechDiscarded", BUTTON),
    Case(
        "push to talk over an answer",
        ("answering", heard(8000), quiet(600), "press", talk("Stop", 280), quiet(40), "release", TAIL),
        "BargeIn SpeechStarted SpeechEnded:released",
        BUTTON,
    ),
    Case(
        "a pause that somebody judges to be the end",
        (quiet(600), QUESTION, quiet(200), "commit", TAIL),
        "SpeechStarted PauseStarted SpeechEnded:committed",
    ),
    Case(
        "a turn that is taken back",
        (quiet(600), talk("What colour", 600), "cancel", talk("is it?", 300), TAIL),
        "SpeechStarted SpeechDiscarded",
    ),
    Case(
        "nobody speaks after an answer",
        ("answering", heard(8000), quiet(600), "answered", quiet(5000)),
        "IdleTimeout",
        TurnDetectionConfig(idle=2000),
    ),
]


def name(event):
    return f"SpeechEnded:{event.why}" if isinstance(event, SpeechEnded) else type(event).__name__


def names(events):
    return " ".join(map(name, events))


def play(turns, steps, probabilities):
    """All decisions. `probabilities(sound)` gives one for each frame."""
    events = []
    for step in steps:
        if isinstance(step, Sound):
            for probability in probabilities(step):
                events += turns.hear(FRAME, float(probability))
        else:
            what, *arguments = (step,) if isinstance(step, str) else step
            events += getattr(turns, what)(*arguments) or []
    return events


LIKELY = {"talk": (0.95,), "cough": (0.7,), "quiet": (0.02,), "noise": (0.1, 0.3, 0.05), "music": (0.2, 0.45, 0.1, 0.4)}


def as_probabilities(sound):
    levels = LIKELY[sound.kind]
    return [levels[i % len(levels)] for i in range(-(-sound.ms // 40))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_table(case):
    assert names(play(TurnDetector(case.detection), case.steps, as_probabilities)) == case.expected


# ---- the same table as sound


class Room:
    """The steps as sound, and what the VAD says to it: espeak's speech, and a cough, noise and music made of numbers."""

    def __init__(self, vad, voice, snr):
        self.vad, self.ear = vad, vad.start()
        self.espeak, self.voice, self.snr = Espeak(), voice, snr
        self.random = np.random.default_rng(0)
        self.spoken = 0  # samples of the last speech

    def __call__(self, step):
        sound = self.sound(step)
        sound = np.concatenate([sound, np.zeros(-len(sound) % FRAME)])
        sound += self.pink(len(sound), 0.1 / 10 ** (self.snr / 20))  # espeak's speech has an RMS of about 0.1
        return [self.vad.hear(frame, self.ear) for frame in sound.clip(-1, 1).astype(np.float32).reshape(-1, FRAME)]

    def sound(self, step):
        match step.kind:
            case "talk":
                said = self.espeak.say(step.text, voice=self.voice, fresh=True)
                pcm = soxr.resample(said.pcm, said.rate, 16000)
                loud = np.flatnonzero(np.abs(pcm) > 0.01)
                self.spoken = loud[-1] + 1 - loud[0]  # the silence between two texts is what the case says
                return pcm[loud[0] : loud[-1] + 1]
            case "cough":
                return self.cough()
            case "noise":
                return self.pink(step.ms * MS, 0.1)
            case "music":
                return self.music(step.ms * MS)
        return np.zeros(step.ms * MS)

    def pink(self, count, rms):
        spectrum = np.fft.rfft(self.random.standard_normal(count))
        sound = np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), count)
        return sound * rms / max(1e-9, np.sqrt(np.mean(sound**2)))

    def cough(self):
        """A burst of breath through three resonances, and a weaker one after it."""
        count = 350 * MS
        t = np.arange(count) / 16000
        breath = np.fft.rfft(self.random.standard_normal(count))
        pitch = np.fft.rfftfreq(count, 1 / 16000)
        shaped = sum(
            gain * np.fft.irfft(breath * np.exp(-(((pitch - centre) / width) ** 2)), count)
            for centre, width, gain in ((500, 300, 1), (1400, 500, 0.8), (3000, 1500, 0.5))
        )
        sound = shaped * (np.minimum(1, t / 0.008) * np.exp(-t / 0.05) + 0.35 * np.exp(-(((t - 0.22) / 0.05) ** 2)))
        return 0.6 * sound / np.abs(sound).max()

    def music(self, count):
        """A tune of plucked notes over a bass."""
        t = np.arange(count) / 16000
        beat, within = (t // 0.4).astype(int), t % 0.4
        tune = np.array([261.6, 329.6, 392.0, 523.3, 440.0, 349.2, 293.7, 392.0])
        note, bass = tune[beat % 8], tune[beat // 4 % 8] / 2
        sound = sum(np.sin(2 * np.pi * note * k * within) * np.exp(-5 * within) / k for k in range(1, 6))
        sound = sound + 0.5 * np.sin(2 * np.pi * bass * t)
        return 0.5 * sound / np.abs(sound).max()


ROOMS = [("en-us", 60), ("en-gb+f3", 60), ("en-gb-scotland+m3", 60), ("en-us+f2", 15)]  # voice, dB of speech over the noise


@pytest.fixture(scope="module")
def vad():
    return Vad()


def test_the_table_as_sound(vad, capsys):
    """What a user would notice: turns cut in the wrong place, answers that stop for nothing, and talk that is not heard."""
    rate, wrong = Counter(), []
    for case in CASES:
        due = [word for word in case.expected.split() if word.startswith(("SpeechEnded", "BargeIn", "IdleTimeout"))]
        for voice, snr in ROOMS:
            events = play(TurnDetector(case.detection), case.steps, Room(vad, voice, snr))
            got = [name(event) for event in events if isinstance(event, SpeechEnded | BargeIn | IdleTimeout)]
            more, less = Counter(got) - Counter(due), Counter(due) - Counter(got)
            rate["interrupted"] += more.pop("BargeIn", 0)
            rate["cut"] += more.total()
            rate["missed"] += less.total()
            if got != due:
                wrong.append((case.name, voice, snr, got, due))
    turns, answers = (sum(len(ROOMS) * case.expected.count(word) for case in CASES) for word in ("SpeechEnded", "OutputResumed"))
    with capsys.disabled():
        print(
            f"\n{len(CASES)} cases × {len(ROOMS)} rooms as sound: {rate['cut']} wrong cuts in {turns} turns, "
            f"{rate['interrupted']} wrong interruptions by {answers} coughs and backchannels, {rate['missed']} decisions missed"
        )
    assert not wrong, wrong


def test_an_answer_is_hushed_within_200_ms_and_a_turn_ends_soon_after_the_timer(vad, capsys):
    onsets, ends = [], []
    for voice, snr in ROOMS:
        for text in ("No, wait, stop it!", "What about the other one?", "Show me the triangle.", "Hold on a second."):
            room = Room(vad, voice, snr)
            hushed, *_, ended = play(TurnDetector(), ("answering", heard(8000), quiet(1000), talk(text, 0), TAIL), room)
            assert isinstance(hushed, OutputPaused) and isinstance(ended, SpeechEnded), (text, voice)
            onsets.append(hushed.at / MS - 1000)
            ends.append(ended.at / MS - 1000 - room.spoken / MS)
    with capsys.disabled():
        for what, delays in (("onset → hushed", onsets), ("end of speech → turn ended", ends)):
            print(f"\n{what}: {min(delays):.0f} to {max(delays):.0f} ms, median {np.median(delays):.0f} of {len(delays)}", end="")
    assert max(onsets) <= 200
    assert max(ends) <= TurnDetectionConfig().silence + 200


# ---- what a decision says


def run(turns, *levels):
    """(milliseconds, probability) of each stretch."""
    return [event for ms, level in levels for _ in range(ms // 40) for event in turns.hear(FRAME, level)]


def test_the_first_syllable_is_kept():
    began = run(TurnDetector(), (1000, 0), (200, 0.9))[0]
    assert began == SpeechStarted(at=1080 * MS, start=700 * MS)


def test_the_kept_sound_begins_with_the_conversation_at_the_earliest():
    assert run(TurnDetector(at=5000), (200, 0.9))[0].start == 5000


def test_a_turn_ends_500_ms_after_the_last_word():
    *_, paused, ended = run(TurnDetector(), (1000, 0.9), (1000, 0))
    assert paused == PauseStarted(at=1120 * MS, end=1000 * MS)
    assert ended == SpeechEnded(at=1520 * MS, end=1000 * MS, why="silence")  # the frame in which 500 ms are over


def test_what_falls_between_the_thresholds_is_talk_only_after_talk():
    assert run(TurnDetector(), (2000, 0.4)) == []
    assert names(run(TurnDetector(), (200, 0.9), (2000, 0.4), (600, 0.3))) == "SpeechStarted PauseStarted SpeechEnded:silence"
    assert (
        names(run(TurnDetector(), (400, 0.9), (200, 0), (600, 0.4))) == "SpeechStarted PauseStarted SpeechEnded:silence"
    )  # once quiet, it does not count


def test_an_answer_is_taken_up_at_the_word_that_was_cut():
    turns = TurnDetector()
    turns.answering()
    turns.heard(9000)
    turns.heard(24000)
    events = run(turns, (1000, 0), (200, 0.9))
    turns.heard(25000)  # the speaker's news of what was played before it stopped
    events += run(turns, (400, 0))

    assert events == [
        OutputPaused(1080 * MS),
        OutputResumed(1520 * MS, heard=25000, start=1000 * MS, end=1200 * MS),
    ]
    assert turns.floor == "agent"


def test_an_interruption_says_what_was_heard_and_keeps_all_that_was_said():
    turns = TurnDetector()
    turns.answering()
    turns.heard(24000)
    events = run(turns, (1000, 0), (1000, 0.9))

    assert events == [
        OutputPaused(1080 * MS),
        BargeIn(1800 * MS, heard=24000),
        SpeechStarted(1800 * MS, start=700 * MS),
    ]
    assert turns.floor == "user"


def test_a_sentence_cut_too_early_goes_on_without_a_gap():
    turns = TurnDetector()
    ended = run(turns, (1000, 0.9), (520, 0))[-1]
    turns.answering()
    events = run(turns, (120, 0), (400, 0.9))

    assert events[1:] == [BargeIn(events[0].at + 80 * MS, heard=0), SpeechStarted(events[0].at + 80 * MS, start=ended.at)]


def test_a_television_gets_one_turn():
    turns = TurnDetector(TurnDetectionConfig(pre_roll=40, longest=120_000))
    events = run(turns, (150_000, 0.97))
    assert names(events[-1:]) == "SpeechEnded:long" and events[-1].at == 120_000 * MS
    turns.answering()
    assert run(turns, (20_000, 0.97)) == []  # what was going on anyway interrupts nothing
    assert names(run(turns, (200, 0), (1000, 0.9))) == "OutputPaused BargeIn SpeechStarted"


def test_idle_is_said_once_and_counts_from_the_last_sound():
    turns = TurnDetector(TurnDetectionConfig(idle=2000))
    assert run(turns, (5000, 0)) == []  # there was no answer yet
    turns.answering()
    assert run(turns, (5000, 0)) == []
    turns.answered()
    assert names(run(turns, (1000, 0), (120, 0.9), (600, 0))) == "SpeechStarted PauseStarted SpeechDiscarded"
    assert run(turns, (1360, 0)) == [] and run(turns, (9000, 0)) == [IdleTimeout(13_120 * MS)]


def test_an_answer_cannot_begin_while_the_user_has_the_floor():
    turns = TurnDetector()
    run(turns, (400, 0.9))
    with pytest.raises(AssertionError, match="user's"):
        turns.answering()


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(probability):
    with pytest.raises(AssertionError):
        TurnDetector().hear(FRAME, probability)


# ---- whatever is heard


class Watch:
    """Keeps its own account of the floor, from the decisions alone, and checks each of them against it."""

    def __init__(self, detection):
        self.turns, self.detection = TurnDetector(detection), detection
        self.open = self.paused = self.hushed = self.answering = False
        self.heard = self.start = self.run = self.taken = self.last = 0

    def do(self, what, *arguments):
        if what == "answering":
            if self.open or self.answering:
                return
            self.answering, self.heard = True, 0
        for event in getattr(self.turns, what)(*arguments) or []:
            assert event.at == self.turns.now >= self.last
            self.last = event.at
            self.check(event)
        if what == "heard" and self.answering:
            self.heard = max(self.heard, *arguments)
        if what == "answered":
            self.answering = self.hushed = False
        assert self.turns.floor == ("user" if self.open else "agent" if self.answering else None)
        if self.open:
            assert self.turns.now - self.start <= self.detection.longest * MS

    def check(self, event):
        match event:
            case SpeechStarted():
                assert not self.open and (not self.answering or self.turns.floor != "agent")
                assert self.taken <= event.start <= event.at and event.at - event.start <= self.detection.keep
                self.open, self.paused, self.answering, self.start = True, False, False, event.start
            case PauseStarted():
                assert self.open and not self.paused and self.start <= event.end < event.at
                self.paused = True
            case PauseEnded():
                assert self.open and self.paused
                self.paused = False
            case SpeechEnded():
                assert self.open and self.start <= event.end <= event.at
                self.open, self.taken = False, event.at
            case SpeechDiscarded():
                assert self.open and event.start == self.start
                self.open = False
            case OutputPaused():
                assert self.answering and not self.hushed and not self.open
                self.hushed = True
            case OutputResumed():
                assert self.answering and self.hushed and event.heard == self.heard and event.start < event.end <= event.at
                self.hushed = False
            case BargeIn():
                assert self.answering and not self.open and event.heard == self.heard
                self.answering = self.hushed = False
            case IdleTimeout():
                assert not self.open and not self.answering


SMALL = [  # short times, so that everything is reached
    TurnDetectionConfig(longest=5000, idle=1000),
    TurnDetectionConfig(longest=5000, interrupt=False),
    TurnDetectionConfig(longest=5000, hands_free=False),
    TurnDetectionConfig(longest=1200, silence=80, pre_roll=100, threshold=0.3),
]
STEPS = st.one_of(
    st.tuples(st.just("hear"), st.integers(1, 25), st.floats(0, 1)),
    st.tuples(st.just("hear"), st.integers(1, 25), st.sampled_from([0.0, 0.02, 0.4, 0.9, 1.0])),
    st.sampled_from(["press", "release", "commit", "cancel", "answering", "answering", "answered"]).map(lambda what: (what,)),
    st.tuples(st.just("heard"), st.integers(0, 50_000)),
)


@settings(max_examples=100)
@given(st.sampled_from(SMALL), st.lists(STEPS, min_size=15, max_size=40))
def test_whatever_happens_the_floor_is_somebodys_or_nobodys(detection, steps):
    watch = Watch(detection)
    for what, *arguments in steps:
        if what == "hear":
            times, probability = arguments
            for _ in range(times):
                watch.do("hear", FRAME, probability)
        else:
            watch.do(what, *arguments)

    watch.do("release")
    for _ in range(25):
        watch.do("hear", FRAME, 0.0)
    assert not watch.open and not watch.hushed, "a second of silence leaves nothing undecided"
