import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import model.vad
from model.vad import CHUNK, CONTEXT, FRAME, Vad, VadMissing
from streams.espeak import Espeak

DATA = Path(find_spec("silero_vad").origin).parent / "data"
PUBLISHED = {  # its name in the network that the package runs itself
    "stft_conv.weight": "stft.forward_basis_buffer",
    **{f"conv{i + 1}.{what}": f"encoder.{i}.reparam_conv.{what}" for i in range(4) for what in ("weight", "bias")},
    **{f"lstm_cell.{what}": f"decoder.rnn.{what}" for what in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    **{f"final_conv.{what}": f"decoder.decoder.2.{what}" for what in ("weight", "bias")},
}


@pytest.fixture(scope="module")
def vad():
    return Vad()


@pytest.fixture(scope="module")
def speech():
    """Half a second of silence, a question, a second of silence; a whole number of frames and of chunks."""
    said = Espeak().say("What colour is the large circle? Yes, and the other one.", fresh=True)
    pcm = soxr.resample(said.pcm, said.rate, 16000)
    pcm = np.concatenate([np.zeros(8000), pcm, np.zeros(16000)]).astype(np.float32)
    return pcm[: len(pcm) // 2560 * 2560]


def frames(sound):
    return list(sound.reshape(-1, FRAME))


def heard(vad, sound):
    state = vad.start()
    return np.array([vad.hear(frame, state) for frame in frames(sound)])


def published(weights):
    """The package's own graph. Its weights are of another training than those of the safetensors file, so it is given those."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit itself, and the reason why attend does not use it
        network = torch.jit.load(DATA / "silero_vad.jit").eval()
    own = network._model.state_dict()
    assert own.keys() == set(PUBLISHED.values())
    for name, tensor in weights.items():
        own[PUBLISHED[name]].copy_(tensor)
    return network


def test_is_the_published_network(vad, speech, monkeypatch):
    network = published(load_file(DATA / "silero_vad_16k.safetensors"))
    with torch.no_grad():
        theirs = [float(network(torch.from_numpy(chunk.copy()), 16000)) for chunk in speech.reshape(-1, CHUNK)]

    ours = []
    step = Vad._step
    monkeypatch.setattr(Vad, "_step", lambda self, chunk, state: ours.append(step(self, chunk, state)) or ours[-1])
    newest = heard(vad, speech)

    assert len(ours) == len(theirs) and max(theirs) > 0.99 and min(theirs) < 0.05
    assert np.allclose(ours, theirs, atol=1e-5)
    assert list(newest) == [ours[(i + 1) * FRAME // CHUNK - 1] for i in range(len(newest))]


def test_tells_speech_from_silence_and_noise(vad, speech):
    noise = np.random.default_rng(0).normal(0, 0.05, 16000 * 2).astype(np.float32)
    probability = heard(vad, speech)

    assert probability[:12].max() < 0.1 and probability[-12:].max() < 0.1
    assert np.median(probability[14:-30]) > 0.9
    assert heard(vad, noise).max() < 0.2
    assert heard(vad, np.zeros(16000 * 2, np.float32)).max() < 0.1


def test_conversations_do_not_mix(vad, speech):
    alone = heard(vad, speech)
    one, other = vad.start(), vad.start()

    mixed = []
    for frame, foreign in zip(frames(speech), frames(speech[::-1].copy()), strict=True):
        mixed.append(vad.hear(frame, one))
        vad.hear(foreign, other)

    assert np.array_equal(mixed, alone)
    assert np.array_equal(heard(vad, speech), alone)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_frame_is_silence_and_is_counted(vad, speech, bad):
    sound = frames(speech)
    broken, silent = vad.start(), vad.start()
    for i, frame in enumerate(sound):
        hurt = frame.copy()
        if i == 20:
            hurt[5] = bad
        assert vad.hear(hurt, broken) == vad.hear(np.zeros(FRAME, np.float32) if i == 20 else frame, silent)

    assert (broken.broken, silent.broken) == (1, 0)


@settings(max_examples=20)
@given(st.lists(st.sampled_from([0.0, 1e-38, 1e-3, 1.0, -1.0, 3.0, 1e38, np.nan, np.inf]), min_size=1, max_size=8), st.booleans())
def test_any_sound_has_a_probability(vad, values, alternating):
    state = vad.start()
    for value in values:
        frame = np.full(FRAME, value, np.float32)
        if alternating:
            frame[::2] *= -1
        assert 0 <= vad.hear(frame, state) <= 1
    assert np.isfinite(state.hidden).all() and np.isfinite(state.cell).all() and len(state.rest) < CONTEXT + CHUNK


def test_frames_of_another_shape_are_refused(vad):
    for frame in (np.zeros(FRAME), np.zeros(CHUNK, np.float32), np.zeros((1, FRAME), np.float32)):
        with pytest.raises(AssertionError):
            vad.hear(frame, vad.start())


def test_a_frame_costs_a_small_part_of_its_length(vad, speech):
    heard(vad, speech[:25600])
    begun = time.thread_time()
    heard(vad, speech)
    assert time.thread_time() - begun < 0.05 * len(speech) / 16000  # measured: 0.8 % on a machine that was busy with training


def test_loads_neither_torch_nor_the_package_that_takes_its_threads_away():
    code = "import sys; from model.vad import Vad; Vad(); print(*{'torch', 'silero_vad'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.split() == []


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr(model.vad, "find_spec", lambda name: None)
    with pytest.raises(VadMissing, match="pip install 'silero-vad"):
        Vad()
