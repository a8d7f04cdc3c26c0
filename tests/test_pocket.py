import importlib.util
import json
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams import pocket
from streams.pocket import PACE, SLOW, PocketVoice
from streams.voice import VoiceMissing, open_voice

TEXT = "Look at the end of the day, there are three red circles. Two of them are small!"
RATE = 24000
FRAME = RATE * 2 // 25  # 80 ms, as the real one makes


def spoken(text, words):
    return [text[word.start : word.end] for word in words]


def words_of(chunks):
    return [word for chunk in chunks for word in chunk.words]


class Dummy:
    """Speaks as pocket-tts does: so many frames, one at a time, until it is stopped."""

    sample_rate = RATE

    def __init__(self, frames=40, frame=FRAME, before=lambda index: None):
        self.frames, self.frame, self.before = frames, frame, before
        self.texts, self.made, self.speaking, self.most = [], 0, 0, 0

    def generate_audio_stream(self, state, text, /, *, stop):
        self.texts.append(text)
        self.speaking += 1
        self.most = max(self.most, self.speaking)
        try:
            for index in range(self.frames):
                if stop.is_set():
                    return
                self.before(index)
                self.made += 1
                yield np.full(self.frame, 2.0, np.float32)
        finally:
            self.speaking -= 1


def test_a_stream_is_the_whole_sound_in_pieces_within_one():
    chunks = list(PocketVoice(Dummy(), None).speak(TEXT))

    assert [chunk.sample for chunk in chunks] == [0, *np.cumsum([len(chunk.pcm) for chunk in chunks])[:-1]]
    assert sum(len(chunk.pcm) for chunk in chunks) == 40 * FRAME
    assert all(chunk.pcm.dtype == np.float32 and np.abs(chunk.pcm).max(initial=0) <= 1 for chunk in chunks)


# ---- the words


@given(text=st.text(st.sampled_from("ab, .é5'\n"), max_size=80), frames=st.integers(1, 60), frame=st.integers(1, 2 * FRAME))
def test_every_word_is_told_once_in_order_and_never_later_than_the_sound_it_is_in(text, frames, frame):
    chunks = list(PocketVoice(Dummy(frames, frame), None).speak(text))
    words = words_of(chunks)

    assert [(word.start, word.end) for word in words] == pocket.words_in(text)
    assert all(a.sample <= b.sample for a, b in pairwise(words))
    for chunk in chunks:
        assert all(0 <= word.sample < chunk.sample + max(1, len(chunk.pcm)) for word in chunk.words)
    assert all(word.sample < frames * frame for word in words)


def test_a_word_is_told_when_even_slow_speech_would_have_begun_it():
    chunks = list(PocketVoice(Dummy(frames=50), None).speak(TEXT))
    known, letters = 0, np.cumsum([0] + [len(word) for word in spoken(TEXT, words_of(chunks))])
    for chunk in chunks[:-1]:
        known += len(chunk.words)
        made = chunk.sample + len(chunk.pcm)
        assert known == sum(letters[:-1] * SLOW * RATE < made)
    assert 5 < known < len(letters) - 1  # so the last chunk, without sound, has the rest


def test_the_last_words_end_with_the_sound():
    """Spoken at PACE to the end, the words that are told last are where the first ones said they would be."""
    letters = sum(map(len, spoken(TEXT, words_of(PocketVoice(Dummy(), None).speak(TEXT)))))
    length = round(letters * PACE * RATE)

    words = words_of(PocketVoice(Dummy(length // 100, 100), None).speak(TEXT))

    at = 0
    for word in words:
        assert abs(word.sample - at * PACE * RATE) < 300
        at += word.end - word.start


def test_who_stops_is_told_of_no_word_to_come():
    stream = PocketVoice(Dummy(frames=200), None).speak(TEXT)
    chunks = [next(stream) for _ in range(5)]
    stream.stop()

    assert list(stream) == []
    assert 1 <= len(words_of(chunks)) <= 2  # 0.4 s


@pytest.mark.parametrize("text", ["", "  \n", "...", "\0"])
def test_nothing_to_say_is_no_sound(text):
    model = Dummy()

    assert list(PocketVoice(model, None).speak(text)) == []
    assert model.texts == []


def test_control_characters_and_broken_text_do_not_reach_the_model():
    model = Dummy(frames=1)
    list(PocketVoice(model, None).speak("red\0circle \ud800"))

    assert model.texts == ["red circle ?"]


# ---- stop, crash, stall


def test_stop_ends_the_work_behind_the_stream():
    started = threading.Event()
    model = Dummy(frames=1_000_000, before=lambda index: started.set())
    stream = PocketVoice(model, None).speak(TEXT)
    assert started.wait(1)
    stream.stop()
    stream._thread.join(5)

    assert not stream._thread.is_alive() and model.speaking == 0
    assert model.made < 1_000_000


def test_a_crash_mid_way_raises_in_the_reader_and_the_voice_speaks_again():
    def fail(index):
        if index == 3:
            raise RuntimeError("no more breath")

    model = Dummy(before=fail)
    voice = PocketVoice(model, None)
    stream = voice.speak(TEXT)
    heard = []
    with pytest.raises(RuntimeError, match="no more breath"):
        heard += iter(lambda: next(stream), None)

    stream._thread.join(1)
    assert not stream._thread.is_alive() and model.speaking == 0
    model.before = lambda index: None
    assert len(words_of(voice.speak(TEXT))) == 17


def test_a_stalled_voice_can_be_stopped_and_so_can_the_stream_that_waits_for_it():
    stalled, go_on = threading.Event(), threading.Event()

    def stall(index):
        stalled.set()
        assert go_on.wait(10)

    model = Dummy(before=stall)
    voice = PocketVoice(model, None)
    streams = [voice.speak(TEXT), voice.speak(TEXT)]
    assert stalled.wait(1)
    readers = [threading.Thread(target=lambda stream=stream: list(stream)) for stream in streams]
    for reader in readers:
        reader.start()
    for stream in streams:
        stream.stop()
    for reader in readers:
        reader.join(1)
        assert not reader.is_alive()

    go_on.set()
    for stream in streams:
        stream._thread.join(1)
        assert not stream._thread.is_alive()
    assert len(model.texts) == 1  # the other one never began


def test_the_model_says_one_text_at_a_time():
    model = Dummy(frames=10)
    voice = PocketVoice(model, None)
    streams = [voice.speak(TEXT) for _ in range(4)]

    assert [len(words_of(stream)) for stream in streams] == [17] * 4
    assert model.most == 1


# ---- the files


@pytest.fixture
def package(tmp_path, monkeypatch):
    """What of pocket-tts is looked at before it is imported."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "english.yaml").write_text(
        "weights_path: hf://someone/gated/english/model.safetensors@1a\n"
        "weights_path_without_voice_cloning: hf://someone/open/english/model.safetensors@2b\n"
        "tokenizer_path: hf://someone/open/english/tokenizer.json@3c\n"
    )
    found = importlib.util.spec_from_file_location("pocket_tts", tmp_path / "__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    monkeypatch.setattr(pocket, "_import", lambda: pytest.fail("imported before its files were there"))
    return tmp_path


@pytest.mark.parametrize("download", [False, True])
def test_weights_that_are_not_there_are_a_missing_voice_and_only_asked_for_when_it_is_named(package, monkeypatch, download):
    asked = []

    def nowhere(repo, path, *, revision, local_files_only):
        asked.append((repo, path, revision, local_files_only))
        raise FileNotFoundError

    monkeypatch.setattr(pocket, "hf_hub_download", nowhere)
    with pytest.raises(VoiceMissing, match="huggingface.co"):
        pocket.open_voice("en", download)

    assert asked == [("someone/open", "english/model.safetensors", "2b", not download)]


def test_auto_downloads_nothing(package, monkeypatch):
    only_local = []

    def nowhere(*_, revision, local_files_only):
        only_local.append(local_files_only)
        raise FileNotFoundError

    monkeypatch.setattr(pocket, "hf_hub_download", nowhere)
    open_voice()

    assert only_local == [True]


def test_a_language_that_pocket_does_not_speak_is_a_missing_voice(package):
    with pytest.raises(VoiceMissing, match="does not speak 'ja', only de, en"):
        open_voice("pocket", "ja")


# ---- pocket-tts itself, small and with random weights: what it says is noise

CONFIG = {
    "flow_lm": {
        "dtype": "float32",
        "flow": {"dim": 32, "depth": 1},
        "transformer": {"hidden_scale": 1, "max_period": 10000, "d_model": 32, "num_heads": 2, "num_layers": 1},
        "lookup_table": {"dim": 32, "n_bins": 97, "tokenizer": "tokenizers"},
    },
    "mimi": {
        "dtype": "float32", "sample_rate": RATE, "channels": 1, "frame_rate": 12.5, "inner_dim": 8, "outer_dim": 32,
        "seanet": {
            "dimension": 32, "channels": 1, "n_filters": 4, "n_residual_layers": 1, "ratios": [6, 5, 4], "kernel_size": 7,
            "residual_kernel_size": 3, "last_kernel_size": 3, "dilation_base": 2, "pad_mode": "constant", "compress": 2,
        },
        "transformer": {
            "d_model": 32, "num_heads": 2, "num_layers": 1, "layer_scale": 0.01, "context": 50, "dim_feedforward": 32,
            "input_dimension": 32, "output_dimensions": [32],
        },
        "quantizer": {"dimension": 8, "output_dimension": 32},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(config, voice)"""
    pocket_tts = pytest.importorskip("pocket_tts", reason="pocket-tts is not installed: pip install attend[voice]")
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Split

    folder = tmp_path_factory.mktemp("pocket")
    vocabulary = {chr(code): code - 31 for code in range(32, 127)} | {"?!": 0, "": 96}
    tokenizer = Tokenizer(BPE(vocabulary, [("?", "!")], unk_token="?!"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads(json.dumps(CONFIG))
    config["flow_lm"]["lookup_table"]["tokenizer_path"] = str(folder / "tokenizer.json")
    (folder / "random.yaml").write_text(json.dumps(config))  # JSON is YAML

    model = pocket_tts.TTSModel.load_model(config=folder / "random.yaml")
    state = model.get_state_for_audio_prompt(0.1 * torch.randn(1, RATE))
    pocket_tts.export_model_state(state, folder / "voice.safetensors")
    return folder / "random.yaml", folder / "voice.safetensors"


@pytest.fixture(scope="module")
def voice(files):
    return pocket.load(*files)


def test_the_real_one_streams_and_tells_all_words(voice):
    text = "Two red stars. One is small!"
    chunks = list(voice.speak(text))

    assert voice.rate == RATE and len(chunks) > 2
    assert all(chunk.pcm.dtype == np.float32 for chunk in chunks) and np.abs(chunks[0].pcm).max() > 0
    assert spoken(text, words_of(chunks)) == ["Two", "red", "stars", "One", "is", "small"]
    assert [chunk.sample for chunk in chunks] == [0, *np.cumsum([len(chunk.pcm) for chunk in chunks])[:-1]]


def test_the_real_one_stops_with_all_its_threads(voice):
    before = set(threading.enumerate())
    stream = voice.speak(TEXT * 20)
    next(stream)
    stream.stop()
    stream._thread.join(10)

    assert list(stream) == []
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= before
    assert words_of(voice.speak("Again.")) != []


def test_the_real_one_that_crashes_raises_in_the_reader_and_frees_the_model(voice, monkeypatch):
    flow = voice._model.flow_lm
    sample, calls = flow._sample_next_latent, []

    def fail(*arguments, **how):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("no more breath")
        return sample(*arguments, **how)

    monkeypatch.setattr(flow, "_sample_next_latent", fail)
    with pytest.raises(RuntimeError, match="no more breath"):
        list(voice.speak(TEXT))
    monkeypatch.undo()

    assert words_of(voice.speak("Again.")) != []


def test_the_real_one_is_loaded_from_files_alone(files, monkeypatch):
    """open_voice with the package's own config and voice list, whose links are answered with a file on disk."""
    from pocket_tts.utils.config import load_config

    _, state = files
    asked = []

    def on_disk(repo, path, *, revision, local_files_only):
        asked.append((path.rpartition("/")[2], local_files_only))
        return str(state)

    def load(path, voice):
        assert voice == state
        loaded.append(load_config(path))
        return PocketVoice(Dummy(), None)

    loaded = []
    monkeypatch.setattr(pocket, "hf_hub_download", on_disk)
    monkeypatch.setattr(pocket, "load", load)
    for language in pocket._LANGUAGES:
        assert isinstance(open_voice("auto", language), PocketVoice)

    assert {name for name, _ in asked} >= {"model.safetensors", "tokenizer.json", "alba.safetensors", "juergen.safetensors"}
    assert all(local for _, local in asked)
    assert len(loaded) == len(pocket._LANGUAGES)
    for config in loaded:
        assert config.weights_path == config.flow_lm.lookup_table.tokenizer_path == str(state)
        assert config.weights_path_without_voice_cloning is None  # so nothing is left to ask the hub for


@pytest.mark.slow
def test_torch_keeps_its_threads(files):
    code = (
        "import torch, streams.pocket\n"
        "torch.set_num_threads(3)\n"
        "streams.pocket._import()\n"
        "assert torch.get_num_threads() == 3, torch.get_num_threads()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
