import numpy as np
import pytest

from model.nano import speech
from model.nano.channel import augment
from model.nano.speech import HELD_OUT, clean, draw_voice, training_variants, utter
from model.nano.utterance import RATE, Utterance
from streams.espeak import Espeak
from streams.voice import VoiceMissing

TEXT = "Where is the red circle? Don't move it, please."
WORDS = ["where", "is", "the", "red", "circle", "don't", "move", "it", "please"]


@pytest.fixture(scope="module", autouse=True)
def espeak():
    try:
        return Espeak()
    except VoiceMissing as missing:
        pytest.skip(str(missing))


def rng(seed=0):
    return np.random.default_rng(seed)


def variant(voice):
    return voice.partition("+")[2]


def level(pcm):
    return 20 * np.log10(np.sqrt(np.mean(np.square(pcm, dtype=np.float64))))


def test_held_out_voices_are_never_drawn_for_training_and_only_they_for_testing():
    draw = rng()
    training = {variant(draw_voice(draw)["voice"]) for _ in range(5000)}
    testing = {variant(draw_voice(draw, held_out=True)["voice"]) for _ in range(500)}

    assert testing == set(HELD_OUT)
    assert training == set(training_variants())
    assert not training & testing
    assert "" in training and len(training) > 60


def test_every_voice_exists_and_speaks(espeak):
    for name in (*training_variants(), *HELD_OUT):
        voice = "en-gb" + (f"+{name}" if name else "")
        sound = espeak.say("where is the red circle", voice=voice)
        assert len(sound.words) == 5
        assert 0.8 < len(sound.pcm) / sound.rate < 4, name
        assert np.abs(sound.pcm).max() > 0.03, name
    assert set(speech.ACCENTS) <= set(espeak.voices("en"))


@pytest.mark.parametrize("held_out", [False, True])
def test_an_utterance_follows_from_its_generator(held_out):
    one = utter(TEXT, rng(3), held_out)
    utter("something else", rng(9))
    two = utter(TEXT, rng(3), held_out)
    other = utter(TEXT, rng(4), held_out)

    assert np.array_equal(one.pcm, two.pcm) and one.words == two.words
    assert len(other.pcm) != len(one.pcm)


@pytest.mark.parametrize("seed", range(20))
def test_words_are_in_order_within_the_sound_and_silence_is_around_them(seed):
    utterance = clean(TEXT, rng(seed))
    starts, ends = [word[1] for word in utterance.words], [word[2] for word in utterance.words]

    assert [word[0] for word in utterance.words] == WORDS
    assert all(a < b for a, b in zip(starts, ends, strict=True)) and all(a <= b for a, b in zip(ends, starts[1:], strict=False))
    assert 0.01 * RATE - 1 <= starts[0] <= 1.5 * RATE
    assert 0.15 * RATE - 1 <= len(utterance.pcm) - ends[-1] <= 0.7 * RATE + 1
    assert not utterance.pcm[: starts[0]].any() and not utterance.pcm[ends[-1] :].any()


@pytest.mark.parametrize("seed", range(20))
def test_words_lie_where_the_sound_is(seed):
    """After the change of speed too: the pause of a full stop is quiet, the words around it are not."""
    utterance = clean("Circle. Red circle.", rng(seed))
    (_, start, end), (_, following, _), _ = utterance.words

    assert following - end > 0.05 * RATE
    assert np.abs(utterance.pcm[end:following]).max() < 0.1 * np.abs(utterance.pcm[start:end]).max()
    # The sharp s of the first sound begins where the word does, to 30 ms.
    near = np.abs(utterance.pcm[start : start + int(0.03 * RATE)]).max()
    assert near > 0.002


@pytest.mark.parametrize("seed", range(30))
def test_augment_keeps_the_alignment(seed):
    """A burst of sound in the place of each word is found in that place again."""
    pcm = np.zeros(3 * RATE, np.float32)
    words = tuple((f"w{n}", at, at + 3200) for n, at in enumerate((8000, 20000, 32000)))
    for _, start, end in words:
        pcm[start:end] = rng(start).standard_normal(end - start).astype(np.float32) * 0.1
    seen = augment(Utterance("w", pcm, words), rng(seed))

    shift = seen.words[0][1] - words[0][1]
    assert abs(shift) <= 0.02 * RATE
    assert [(w, a - shift, b - shift) for w, a, b in seen.words] == list(words)
    assert len(seen.pcm) == len(pcm)
    template = np.zeros_like(pcm)
    for _, start, end in words:
        template[start:end] = 1
    energy = np.convolve(seen.pcm.astype(np.float64) ** 2, np.ones(80) / 80, "same")
    lags = np.arange(-800, 801, 10)
    best = lags[np.argmax([np.dot(np.roll(template, lag), energy) for lag in lags])]
    assert abs(best - shift) <= 0.015 * RATE  # the room's tail comes a little later


def test_augment_is_within_bounds_and_spread():
    bank = [clean(TEXT, rng(seed)) for seed in range(8)]
    draw, levels = rng(1), []
    for n in range(400):
        seen = augment(bank[n % 8], draw)
        assert seen.pcm.dtype == np.float32 and np.isfinite(seen.pcm).all()
        assert np.abs(seen.pcm).max() <= 0.9901
        levels.append(level(seen.pcm[seen.words[0][1] : seen.words[-1][2]]))

    assert -36 < min(levels) < -32 and -15 < max(levels) < -11
    assert 4 < np.std(levels) < 9


def test_half_of_the_augmented_are_nearly_clean_and_the_rest_noisy():
    source = clean(TEXT, rng(2))
    draw, ratios = rng(5), []
    for _ in range(400):
        seen = augment(source, draw)
        ratios.append(level(seen.pcm[seen.words[0][1] : seen.words[-1][2]]) - level(seen.pcm[-2000:]))

    assert 0.35 < np.mean(np.array(ratios) > 27) < 0.65
    assert min(ratios) < 12


def test_augment_leaves_its_source_as_it_was():
    source = clean(TEXT, rng(2))
    before = source.pcm.copy()
    augment(source, rng(1))

    assert np.array_equal(source.pcm, before)


def test_a_text_without_words_is_refused():
    with pytest.raises(ValueError, match="nothing to say"):
        utter("...", rng())
