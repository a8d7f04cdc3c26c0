"""Clauses of an answer for the voice, and what was synthesized, sent and heard of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.events import WordTiming
from agent.speech import MAX_CLAUSE, Clauses, Playback

# ---- clauses


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("Yes. It is red.", ["Yes.", " It is red."]),
        (
            "Yes, there is one, I think, over there",
            ["Yes, there is one,", " I think, over there"],
        ),
        ("It costs 3.50 or 1,000 euros.", ["It costs 3.50 or 1,000 euros."]),
        ('He said "no." Then he left.', ['He said "no.', '" Then he left.']),
        ("one\ntwo", ["one\n", "two"]),
        ("... - !", []),
        ("", []),
    ],
)
def test_a_clause_is_spoken_as_soon_as_it_is_complete(text, clauses):
    said = Clauses()
    assert [clause for _, clause in said.push(text) + said.flush()] == clauses


def test_a_clause_does_not_wait_for_the_next_words_but_for_the_end_of_its_last():
    said = Clauses()
    assert said.push("It is a circle.") == [], "it may be a number"
    assert said.push(" And") == [(0, "It is a circle.")]
    assert said.push(" a square") == []
    assert said.flush() == [(15, " And a square")]


WRITTEN = st.text(st.sampled_from("ab .,!?\n\"'3é"), max_size=300)


@given(WRITTEN, st.lists(st.integers(1, 40), min_size=1))
def test_all_that_can_be_spoken_is_spoken_once_and_in_its_place(text, sizes):
    said, out, at = Clauses(), [], 0
    for size in (sizes * len(text))[: len(text)]:
        out += said.push(text[at : at + size])
        at += size
    out += said.flush()
    end, missed = 0, ""
    for start, clause in out:
        assert start >= end and text[start : start + len(clause)] == clause
        missed += text[end:start]
        end = start + len(clause)
    assert not any(map(str.isalnum, missed + text[end:]))


@given(st.text(st.sampled_from("ab "), max_size=400))
def test_words_without_an_end_are_spoken_after_a_while(text):
    said = Clauses()
    clauses = [clause for character in text for _, clause in said.push(character)] + [clause for _, clause in said.flush()]
    assert all(len(clause) <= MAX_CLAUSE + max(map(len, text.split(" "))) for clause in clauses)


# ---- playback


def spoken(*starts: int) -> list[WordTiming]:
    """Words of three letters, one space between them."""
    return [WordTiming(4 * n, 4 * n + 3, sample) for n, sample in enumerate(starts)]


def test_what_was_heard_is_whole_words():
    sound = Playback(1000)
    sound.add(np.zeros(300, np.float32), spoken(0, 100, 250))
    assert sound.send(1.0)
    for heard, whole, characters in [(0, 0, 0), (99, 0, 0), (100, 100, 3), (249, 100, 3), (300, 250, 7)]:
        sound.hear(heard)
        assert (sound.heard_to_word_end, sound.characters(sound.heard_to_word_end)) == (whole, characters)
    sound.end_clause(11)
    assert (sound.heard_to_word_end, sound.characters(sound.heard_to_word_end)) == (300, 11), "the clause is over"
    assert not sound.finished
    sound.complete = True
    assert sound.finished


def test_sound_without_words_counts_by_the_clause():
    sound = Playback(1000)
    sound.add(np.zeros(300, np.float32), [])
    sound.end_clause(20)
    sound.add(np.zeros(300, np.float32), [])
    sound.send(1.0)
    for heard, characters in [(299, 0), (300, 20), (600, 20)]:
        sound.hear(heard)
        assert sound.characters(sound.heard_to_word_end) == characters


def test_a_word_that_becomes_known_after_its_sound_was_sent_is_told_with_the_next():
    sound = Playback(1000)
    sound.add(np.zeros(100, np.float32), [])
    sound.send(1.0)
    sound.add(np.zeros(100, np.float32), spoken(50, 150))
    assert sound.send(1.0)[2] == tuple(spoken(50, 150))


def test_the_sound_of_a_word_that_begins_where_it_ends_is_told():
    sound = Playback(1000)
    sound.add(np.zeros(100, np.float32), spoken(0, 100))
    sound.complete = True
    assert sound.send(1.0)[2] == tuple(spoken(0, 100))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 60), max_size=3)),
        st.tuples(st.sampled_from(["send", "hear", "resume", "end clause", "pause"]), st.integers(0, 120)),
    ),
    max_size=60,
)


@given(STEPS)
def test_any_playback_sends_every_sample_and_word_in_order_and_never_far_ahead(steps):
    sound, ahead = Playback(1000), 0.15
    track, words, told, at = np.arange(100_000, dtype=np.float32), [], [], 0
    for step, n in steps:
        before = sound.heard
        match step:
            case "add":
                starts = np.sort(np.asarray(n, int)) + max(sound.synthesized, 0)
                fresh = [WordTiming(4 * (len(words) + k), 4 * (len(words) + k) + 3, int(start)) for k, start in enumerate(starts)]
                words += fresh
                sound.add(track[sound.synthesized : sound.synthesized + 60], fresh)
            case "send" if piece := sound.send(ahead):
                start, pcm, found = piece
                assert not sound.paused and start == at, "where the last one ended, or where it was taken up"
                assert (pcm == track[start : start + len(pcm)]).all() and len(pcm)
                at = start + len(pcm)
                told += found
            case "hear":
                sound.hear(sound.heard + n)
                assert sound.heard >= before
            case "end clause":
                sound.end_clause(4 * len(words))
            case "pause":
                sound.paused = True
            case "resume" if sound.paused:
                at = sound.heard_to_word_end
                told = [word for word in told if word.sample < at]
                sound.resume(at)
        assert 0 <= sound.heard_to_word_end <= sound.heard <= sound.sent <= sound.synthesized
        assert sound.sent <= sound.heard + 150 or sound.paused or step == "hear"
        heard = sound.characters(sound.heard_to_word_end)
        assert heard % 4 in (0, 3), "never inside a word"
        assert told == words[: len(told)], "each word once, in order"
    sound.paused = False
    while (piece := sound.send(ahead)) or sound.heard < sound.synthesized:
        told += piece[2] if piece else ()
        sound.hear(sound.sent)
    assert told == [word for word in words if word.sample < sound.synthesized]
