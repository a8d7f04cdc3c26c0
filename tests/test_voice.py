import importlib.util
import os
import signal
import subprocess
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest

from streams import espeak as module
from streams.espeak import RATE, Espeak
from streams.voice import SpeechChunk, Stream, VoiceMissing, open_voice, words_in

TEXT = "Look at the end of the day, there are three red circles. Two of them are small!"


@pytest.fixture(scope="module")
def espeak():
    try:
        return Espeak()
    except VoiceMissing as missing:
        pytest.skip(str(missing))


def spoken(text, words):
    return [text[word.start : word.end] for word in words]


def test_a_stream_is_the_whole_sound_in_pieces(espeak):
    whole = espeak.say(TEXT, fresh=True)
    chunks = list(espeak.speak(TEXT, fresh=True))

    assert len(chunks) > 20
    assert np.array_equal(np.concatenate([chunk.pcm for chunk in chunks]), whole.pcm)
    assert [word for chunk in chunks for word in chunk.words] == list(whole.words)
    assert [chunk.sample for chunk in chunks] == [0, *np.cumsum([len(chunk.pcm) for chunk in chunks])[:-1]]


def test_sound_is_float32_within_one_and_loud_enough(espeak):
    speech = espeak.say(TEXT)

    assert speech.rate == RATE and speech.pcm.dtype == np.float32
    assert 0.1 < np.abs(speech.pcm).max() <= 1
    assert 3 < len(speech.pcm) / RATE < 8


def test_stop_ends_the_stream_and_the_work_behind_it(espeak):
    stream = espeak.speak(TEXT * 100)  # ten minutes of sound
    next(stream)
    stream.stop()

    assert list(stream) == []
    stream._thread.join(1)
    assert not stream._thread.is_alive()
    assert stream._chunks.qsize() < 500  # of more than 10,000


def chunk(sample=0):
    return SpeechChunk(np.zeros(4, np.float32), sample, ())


def test_a_voice_that_crashes_mid_way_raises_in_the_reader_after_what_it_had_made():
    ended = threading.Event()

    def make(take, over):
        threading.Thread(target=lambda: (over.wait(10), ended.set())).start()  # as a voice may start threads of its own
        take(chunk())
        raise RuntimeError("no more breath")

    stream = Stream(make)
    assert next(stream).sample == 0
    with pytest.raises(RuntimeError, match="no more breath"):
        next(stream)

    assert list(stream) == []  # raised once
    stream._thread.join(1)
    assert not stream._thread.is_alive() and ended.wait(1)


def test_espeak_speaks_on_after_a_crash_in_the_middle(espeak, monkeypatch):
    monkeypatch.setattr(module._WordTimes, "known", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(espeak.speak(TEXT))
    monkeypatch.undo()

    assert list(espeak.speak(TEXT))


def test_a_stalled_voice_can_be_stopped():
    stalled, go_on = threading.Event(), threading.Event()

    def make(take, over):
        take(chunk())
        stalled.set()
        assert go_on.wait(10)
        take(chunk(4))

    stream = Stream(make)
    assert stalled.wait(1)
    heard = []
    reader = threading.Thread(target=lambda: heard.extend(stream))
    reader.start()
    stream.stop()
    reader.join(1)
    assert not reader.is_alive() and len(heard) <= 1

    go_on.set()
    stream._thread.join(1)
    assert not stream._thread.is_alive() and list(stream) == []


def test_stop_wakes_a_reader_in_another_thread(espeak):
    with module._library()._lock:  # another conversation is speaking
        stream = espeak.speak(TEXT)
        reader = threading.Thread(target=lambda: list(stream))
        reader.start()
        stream.stop()
        reader.join(1)
        assert not reader.is_alive()


def test_every_word_is_told_once_in_order_and_within_the_sound(espeak):
    speech = espeak.say(TEXT)
    samples = [word.sample for word in speech.words]

    assert spoken(TEXT, speech.words) == TEXT.replace(",", "").replace(".", "").replace("!", "").split()
    assert all(a < b for a, b in pairwise(samples))
    assert samples[0] >= 0 and samples[-1] < len(speech.pcm)


def test_word_places_count_characters_not_bytes(espeak):
    text = "Café naïve über 日 don't “quoted” – $5.50 is it."

    words = spoken(text, espeak.say(text).words)

    assert words[:3] == ["Café", "naïve", "über"]
    assert words[-6:] == ["don't", "quoted", "$", "5.50", "is", "it"]


def test_a_word_begins_where_its_sound_does(espeak):
    text = "Stop. Red."

    speech = espeak.say(text)
    second = speech.words[1].sample
    pause, sound = speech.pcm[second - RATE // 10 : second], speech.pcm[second : second + RATE // 10]

    assert np.abs(sound).max() > 20 * np.abs(pause).max()


def test_a_long_text_keeps_places_and_words_across_its_parts(espeak):
    text = "We count the small red stars, and we sort them. " * 60
    assert len(text) > 2 * module.PART

    speech = espeak.say(text, rate=400)
    samples = [word.sample for word in speech.words]

    assert spoken(text, speech.words) == text.replace(",", "").replace(".", "").split()
    assert samples == sorted(samples) and samples[-1] < len(speech.pcm)


def test_fresh_speech_does_not_depend_on_what_was_said_before(espeak):
    first = espeak.say(TEXT, voice="en-gb-scotland+f3", fresh=True)
    espeak.say("Something else.", voice="en-us", pitch=90)

    assert np.array_equal(espeak.say(TEXT, voice="en-gb-scotland+f3", fresh=True).pcm, first.pcm)


def test_settings_are_heard_and_do_not_stick(espeak):
    plain = espeak.say(TEXT, fresh=True)

    assert len(espeak.say(TEXT, rate=300).pcm) < 0.7 * len(plain.pcm)
    assert np.abs(espeak.say(TEXT, volume=30).pcm).max() < 0.5 * np.abs(plain.pcm).max()
    assert np.array_equal(espeak.say(TEXT, fresh=True).pcm, plain.pcm)


@pytest.mark.parametrize("text", ["", "  \n", "...", "\0"])
def test_nothing_to_say_is_no_words_and_hardly_a_sound(espeak, text):
    speech = espeak.say(text)

    assert speech.words == ()
    assert len(speech.pcm) < RATE


def test_control_characters_and_broken_text_are_no_commands(espeak):
    plain = espeak.say("red  circle", fresh=True)

    assert len(espeak.say("red\x01400S circle", fresh=True).pcm) > len(plain.pcm)  # read out, not a new speed
    assert spoken("red\0circle", espeak.say("red\0circle").words) == ["red", "circle"]
    assert espeak.say("red \ud800 circle").words


def test_accents_and_variants_are_listed_and_all_accents_speak(espeak):
    accents = espeak.voices("en")

    assert {"en-gb", "en-us", "en-gb-scotland", "en-029"} <= set(accents)
    assert {"f3", "m3"} <= set(espeak.variants())
    assert all(len(espeak.say("red circle", voice=f"{accent}+f3").words) == 2 for accent in accents)


@pytest.mark.parametrize("name", ["en-nowhere", "en-us+nobody", "../en-us", ""])
def test_an_unknown_voice_is_refused_before_a_stream_begins(espeak, name):
    with pytest.raises(ValueError, match="no voice"):
        espeak.speak(TEXT, voice=name)


def test_conversations_in_many_threads_do_not_mix(espeak):
    alone = {name: len(espeak.say(TEXT, voice=name, fresh=True).pcm) for name in ("en-us+klatt2", "en-029+f2")}
    heard = {}

    def speak(name):
        heard[name] = [sum(len(chunk.pcm) for chunk in espeak.speak(TEXT, voice=name, fresh=True)) for _ in range(10)]

    threads = [threading.Thread(target=speak, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert heard == {name: [length] * 10 for name, length in alone.items()}


def test_a_forked_child_speaks_though_its_parent_was_speaking(espeak):
    same = len(espeak.say(TEXT, fresh=True).pcm)
    with module._library()._lock:  # as a thread of the parent would hold it, that the child does not have
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            os._exit(0 if len(espeak.say(TEXT, fresh=True).pcm) == same else 1)

    assert os.waitpid(child, 0)[1] == 0
    assert len(espeak.say(TEXT, fresh=True).pcm) == same


def test_a_machine_without_espeak_is_told_what_to_install():
    code = (
        "import sys, streams.espeak as espeak\n"
        "espeak.find_library = lambda name: 'libno-such-thing.so'\n"
        "sys.modules['espeakng_loader'] = None\n"
        "espeak.importlib.util.find_spec = lambda name: None\n"
        "espeak.Espeak()\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert "VoiceMissing" in done.stderr
    assert "libespeak-ng1" in done.stderr and "pip install attend[espeak]" in done.stderr


# ---- a voice by name


@pytest.fixture
def without_espeak(monkeypatch):
    def nothing():
        raise VoiceMissing("There is no voice: install something.")

    monkeypatch.setattr(module, "_library", nothing)


@pytest.fixture
def without_pocket(monkeypatch):
    """Neither installed nor on the disk; what is looked for besides is left as it is."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if name == "pocket_tts" else find(name, *of))


def test_none_is_text_only():
    assert open_voice("none") is None


def test_auto_without_a_voice_is_text_only(without_espeak, without_pocket):
    assert open_voice() is None
    assert open_voice("auto", "de") is None


def test_auto_without_pocket_is_espeak_in_the_language(espeak, without_pocket):
    assert open_voice().settings["voice"] == "en-us"
    assert open_voice("auto", "de").settings["voice"] == "de"
    assert open_voice("auto", "de_AT").settings["voice"] == "de"
    assert open_voice("auto", "en-GB").settings["voice"] == "en-gb"
    assert open_voice("auto", "xx") is None


@pytest.mark.parametrize(("name", "accent"), [("espeak", "en-us"), ("en-us+f2", "en-us+f2"), ("de", "de")])
def test_espeak_is_opened_by_name_and_speaks_as_the_voice_that_was_named(espeak, name, accent):
    opened = open_voice(name)

    with opened.speak(TEXT) as stream:
        chunks = list(stream)
    assert opened.rate == RATE
    assert spoken(TEXT, [word for chunk in chunks for word in chunk.words])[:2] == ["Look", "at"]
    assert opened.settings["voice"] == accent


def test_a_bound_voice_keeps_its_settings(espeak):
    bound = espeak.bound(voice="en-gb", rate=300, fresh=True)

    pcm = np.concatenate([chunk.pcm for chunk in bound.speak(TEXT)])

    assert np.array_equal(pcm, espeak.say(TEXT, voice="en-gb", rate=300, fresh=True).pcm)
    with pytest.raises(ValueError, match="no voice"):
        espeak.bound(voice="en-nowhere")


@pytest.mark.parametrize("name", ["en-nowhere", "en-us+nobody", ""])
def test_a_voice_of_an_unknown_name_is_missing(espeak, name):
    with pytest.raises(VoiceMissing, match=r"no voice .*say auto, none, pocket, espeak"):
        open_voice(name)


def test_espeak_does_not_speak_every_language(espeak):
    with pytest.raises(VoiceMissing, match="language 'xx'"):
        open_voice("espeak", "xx")


def test_a_voice_that_is_named_and_missing_says_what_to_install(without_espeak, without_pocket):
    with pytest.raises(VoiceMissing, match="install"):
        open_voice("espeak")
    with pytest.raises(VoiceMissing, match="install"):
        open_voice("en-us+f2")
    with pytest.raises(VoiceMissing, match=r"pip install attend\[voice\]"):
        open_voice("pocket")


def test_words_are_found_where_there_is_something_to_say():
    assert spoken_spans("“Don't” – 5.50, é!") == ["Don't", "5.50", "é"]
    assert words_in("... – !") == []


def spoken_spans(text):
    return [text[start:end] for start, end in words_in(text)]


# ---- the language of what is said


def test_espeak_says_an_answer_in_its_own_language_and_what_is_too_short_to_tell_in_the_usual_one():
    voice = open_voice("espeak")
    chosen = {text: voice._settings(text)["voice"] for text in SAID}
    assert chosen == SAID
    assert voice._settings("Das Quadrat ist ganz oben. Ja, OK")["voice"] == "de", "by what was said before it"
    assert open_voice("en-gb")._settings(next(iter(SAID)))["voice"] == "en-gb", "who names a voice gets that one"


SAID = {
    "Das orange Quadrat ist oben.": "de",
    "Le carré orange est en haut.": "fr",
    "El cuadrado naranja está arriba.": "es",
    "The orange square is at the top.": "en-us",
    "Ja, OK": "en-us",
    "オレンジの四角は上にあります。": "ja",
}


def test_a_german_clause_sounds_as_the_german_voice_says_it():
    text = "Das orange Quadrat ist ganz oben."
    sound = np.concatenate([chunk.pcm for chunk in open_voice("espeak").speak(text)])
    german, english = (Espeak().say(text, voice=name).pcm for name in ("de", "en-us"))
    assert abs(len(sound) - len(german)) < 0.02 * len(german) < abs(len(sound) - len(english))
