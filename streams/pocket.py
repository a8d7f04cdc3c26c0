"""A natural voice on a CPU: pocket-tts (MIT, an optional extra) as a `Voice`. Its voices have licences of their own.

pocket-tts gives no word timestamps, so they are estimated: a word's time is proportional to the letters before it, at PACE
while the sound is being made and in proportion to the whole once that is known. A word is reported only when even slow speech
would have begun it: when synthesis is stopped, no word is reported that was not spoken, though perhaps not the last ones that
were. Pauses are not detected.
"""

import importlib
import importlib.util
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from huggingface_hub import hf_hub_download

from streams.voice import SpeechChunk, Stream, VoiceMissing, Word, plain, words_in

PACE = 0.07  # seconds a letter, pauses included: espeak-ng at 175 words a minute
SLOW = 2 * PACE  # nobody is expected to speak slower than this

_LANGUAGES = {
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fr": "french",
    "it": "italian",
    "nl": "dutch",
    "pt": "portuguese",
}


class SpeechModel(Protocol):
    """The part of pocket_tts.TTSModel that is used here."""

    @property
    def sample_rate(self) -> int: ...

    def generate_audio_stream(self, state: Any, text: str, /, *, stop: threading.Event) -> Iterator[Any]: ...


class PocketVoice:
    """One model with one voice. It speaks one text at a time: a second stream waits until the first one ends or is stopped."""

    def __init__(self, model: SpeechModel, state: Any):
        self.rate = model.sample_rate
        self._model, self._state = model, state
        self._lock = threading.Lock()  # the model is not thread-safe

    def speak(self, text: str, before: str = "") -> Stream:  # in the language of its weights, whatever was said
        return Stream(lambda take, over: self._generate(text, take, over))

    def _generate(self, text: str, take: Callable[[SpeechChunk], bool], over: threading.Event) -> None:
        words, made = _EstimatedWordTimes(text, self.rate), 0
        with self._lock:
            if over.is_set() or not words:  # the model refuses a text without words
                return
            # Taken to its end even after a stop: it ends when the threads inside have, and only then is the model free.
            for sound in self._model.generate_audio_stream(self._state, plain(text), stop=over):
                pcm = np.clip(np.asarray(sound, np.float32), -1, 1)
                begin, made = made, made + len(pcm)
                take(SpeechChunk(pcm, begin, words.begun(made)))
        if made and not over.is_set():
            take(SpeechChunk(np.zeros(0, np.float32), made, words.rest(made)))


class _EstimatedWordTimes:
    """The words of a text, each once and in order, with the sample at which each is estimated to begin."""

    def __init__(self, text: str, rate: int):
        self._spans = words_in(text)
        lengths = [end - start for start, end in self._spans]
        self._before = list(accumulate(lengths, initial=0))  # letters before each word, and of the whole text
        self._rate = rate
        self._next = 0
        self._last = (0, 0)  # letters and samples before the last word that was told

    def __len__(self) -> int:
        return len(self._spans)

    def begun(self, made: int) -> tuple[Word, ...]:
        """The words that have begun within so many samples even if speech is slow."""
        first = self._next
        while self._next < len(self) and self._before[self._next] * SLOW * self._rate < made:
            self._next += 1
        words = [Word(*self._spans[index], int(self._before[index] * PACE * self._rate)) for index in range(first, self._next)]
        if words:
            self._last = (self._before[self._next - 1], words[-1].sample)
        return tuple(words)

    def rest(self, made: int) -> tuple[Word, ...]:
        """The words not reported yet, spread over the samples since the last reported one."""
        letters, sample = self._last
        pace = (made - sample) / (self._before[-1] - letters)
        first, self._next = self._next, len(self)
        return tuple(
            Word(*self._spans[index], sample + int((self._before[index] - letters) * pace)) for index in range(first, len(self))
        )


def open_voice(language: str = "en", download: bool = True) -> PocketVoice:
    """The usual voice of a language. Blocks for seconds. Raises VoiceMissing where pocket-tts or its weights are missing."""
    package = importlib.util.find_spec("pocket_tts")
    if package is None or package.origin is None:
        raise VoiceMissing("pocket-tts is not installed: `pip install attend[voice]`.")
    name = _LANGUAGES.get(language.lower().replace("_", "-").partition("-")[0])
    if name is None:
        raise VoiceMissing(f"pocket-tts does not speak {language!r}, only {', '.join(_LANGUAGES)}: choose espeak.")

    # Looked for before pocket-tts is imported, which takes seconds, and given to it as paths: by itself it would first
    # ask the hub for its weights that can clone voices, which wants a login, even where the others are on disk.
    config = (Path(package.origin).parent / "config" / f"{name}.yaml").read_text(encoding="utf-8")
    config = re.sub(r"^weights_path:.*\n", "", config, flags=re.MULTILINE)
    config = config.replace("weights_path_without_voice_cloning:", "weights_path:")
    config = re.sub(r"hf://\S+", lambda link: json.dumps(str(_fetch(link[0], download))), config)

    _import()
    from pocket_tts.default_parameters import get_default_voice_for_language
    from pocket_tts.utils.utils import get_predefined_voice

    voice = _fetch(get_predefined_voice(name, get_default_voice_for_language(name)), download)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(config, encoding="utf-8")
        return load(path, voice)


def load(config: Path, voice: Path) -> PocketVoice:
    """pocket-tts as its YAML file says (random weights if that names none), with a voice that it exported."""
    model = _import().TTSModel.load_model(config=config)
    return PocketVoice(model, model.get_state_for_audio_prompt(voice))


def _fetch(link: str, download: bool) -> Path:
    """The file behind hf://owner/name/path@revision, from the disk if it is there."""
    address, _, revision = link.removeprefix("hf://").partition("@")
    owner, name, path = address.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", path, revision=revision or None, local_files_only=not download))
    except OSError as error:
        raise VoiceMissing(
            f"pocket-tts has no {path} of {owner}/{name} on this machine: `attend` fetches it from huggingface.co once it is "
            "online and told to use the voice pocket."
        ) from error


def _import() -> Any:
    """pocket-tts, which sets all of torch to one thread as it is imported, the agent's model included."""
    torch = importlib.import_module("torch")  # its torch: there is no other in this folder
    threads = torch.get_num_threads()
    import pocket_tts

    torch.set_num_threads(threads)
    return pocket_tts
