"""The benchmark of conversations, tiny and in no hurry: what it counts, what it says, and the chart."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest

from agent import checkpoint, events
from agent.__main__ import main
from agent.bench import chart, load_test, waits
from agent.bench.load_test import SpeakerTally, SpokenQuestion, Spread
from agent.checkpoint import LoadedModel
from agent.marks import Mark
from agent.script import Performance, ScriptedExchange, ScriptedTurn
from model.config import CheckpointError
from model.nano import people
from streams.frames import RATE, MediaError
from streams.voice import open_voice

SPREADS = {"first_token", "first_sound", "closing", "barge_in", "lag", "late"}
COUNTS = {"dropped", "unanswered", "right", "right_alone", "positions", "peak", "busy", "others", "steal"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return checkpoint.load("nano")


def asker(count: int) -> Callable[[int], list[SpokenQuestion]]:
    return lambda seed: people.person(seed)[:count]


@pytest.mark.slow
async def test_a_small_crowd_is_answered_and_every_figure_is_there(loaded: LoadedModel) -> None:
    said: list[str] = []
    result = await load_test.session([2], loaded, open_voice("espeak"), asker(1), said.append, real_time=False)
    by_crowd = json.loads(json.dumps(result))["speakers"]
    assert by_crowd.keys() == {"2", "2 busy"} and by_crowd["2"].keys() == by_crowd["2 busy"].keys()
    figures = by_crowd["2"]
    assert figures.keys() == SPREADS | COUNTS
    assert [figures[key]["count"] for key in ("first_token", "first_sound", "closing", "barge_in", "late")] == [2, 2, 2, 0, 0]
    assert figures["first_token"]["median"] > figures["closing"]["median"] and figures["lag"]["count"] > 50
    assert figures["unanswered"]["attend"] == figures["dropped"]["attend"] == 0
    assert 0 <= figures["right"]["attend"] <= 2 and 0 <= figures["right_alone"]["attend"] <= 2
    assert figures["positions"]["attend"] > 2 * 63
    shown = [text[:44].strip() for text in said]
    assert all(figure["what"].strip() in shown for figure in figures.values())


async def test_a_crowd_that_does_not_fit_is_refused_before_memory_is_taken(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "free_memory", lambda device: 2**20)
    with pytest.raises(CheckpointError, match=r"16 speakers need \d+\.\d GiB for their rows, 0\.0 free on cpu"):
        await load_test.session([1, 16], loaded, None, asker(1), print)


def conversation(*ends: int, asked: list[tuple[int, int]], told: list[tuple[float, events.Event]]) -> SpeakerTally:
    """Three questions, of which the answer to the second is to be interrupted."""
    turns = [ScriptedTurn(), ScriptedTurn(interrupt=2), ScriptedTurn()]
    played = Performance(turns)
    played.exchanges = [ScriptedExchange(text=str(end), finish="stop") for end in ends]
    played.asked = asked
    played.times, played.events = [at for at, _ in told], [event for _, event in told]
    questions = [SpokenQuestion(turn, 800, lambda text, marks, n=n: text == str(n)) for n, turn in enumerate(turns)]  # type: ignore[misc]
    return SpeakerTally(questions, played, 0, 0)


def test_the_answer_to_a_question_is_the_last_before_the_next_and_a_cut_one_is_not_marked() -> None:
    talk = conversation(7, 0, 1, 9, asked=[(0, 0), (90, 2), (180, 3)], told=[])
    assert [exchange and exchange.text for exchange in talk.exchanges()] == ["0", "1", "9"]
    assert talk.right() == [True, False]
    quiet = conversation(0, asked=[(0, 0), (90, 1)], told=[])  # ended early
    assert [exchange and exchange.text for exchange in quiet.exchanges()] == ["0", None, None]


def test_an_interruption_counts_from_the_first_words_first_sample() -> None:
    told: list[tuple[float, events.Event]] = [
        (1.5, events.OutputCleared(1)),
        (4.25, events.OutputCleared(5)),
        (4.5, events.OutputCleared(5)),
    ]
    asked = [(0, 0), (2 * RATE, 1), (4 * RATE, 2)]
    assert conversation(0, 1, 2, asked=asked, told=told).interruptions() == pytest.approx([200])
    assert conversation(0, 1, 2, asked=asked, told=told[:1]).interruptions() == []


def test_a_spread_is_of_values_that_were_there() -> None:
    spread = Spread.of("k", "wait", [float(n) for n in range(200, 0, -1)])
    assert (spread.median, spread.p95, spread.p99, spread.count) == (100, 190, 198, 200)
    assert str(spread).split() == ["wait", "100", "ms", "190", "ms", "198", "ms", "of", "200"]
    assert str(Spread.of("k", "wait", [])).split() == ["wait", "—"]


async def test_a_picture_for_one_is_measured_beside_anothers_steps(loaded: LoadedModel) -> None:
    said: list[str] = []
    figures = await waits.pictures(loaded, people.picture(0, *people.LARGE), said.append, count=1)
    assert figures.keys() == {"step", "picture", "gap", "over_bound"}
    assert all(figure["attend"] > 0 for figure in figures.values())
    assert "a picture of 280 positions, nobody talks" in said[2]


async def test_the_chart_holds_both_series(loaded: LoadedModel, tmp_path) -> None:
    found = await waits.first_token(loaded, people.picture(0, *people.SIZE), print, lengths=(1, 2), rounds=1)
    assert [x.keys() for x in found] == [{"seconds", "streamed", "sent_again", "ratio"}] * 2
    waits.write(tmp_path / "chart.svg", found, "nano <here>")
    root = ET.parse(tmp_path / "chart.svg").getroot()
    groups = {group.get("id"): group for group in root.iter(f"{SVG}g")}
    assert groups.keys() == {"streamed while it was spoken", "the whole prompt sent again"}
    assert [len(group.findall(f"{SVG}circle")) for group in groups.values()] == [2, 2]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "length of speech, after one picture (s)" in texts and "time to first token (ms)" in texts
    with pytest.raises(MediaError, match="chart.svg cannot be written: Is a directory"):
        (tmp_path / "folder" / "chart.svg").mkdir(parents=True)
        waits.write(tmp_path / "folder" / "chart.svg", found, "nano")


@pytest.mark.parametrize("most", [0.003, 0.9, 1, 7, 9.6, 135, 6_227])
def test_a_chart_has_room_for_every_point_and_a_few_round_ticks(most: float) -> None:
    ticks = chart._ticks(most)
    assert ticks[0] == 0 and most < ticks[-1] < 2 * most and 4 <= len(ticks) <= 8


def test_people_ask_the_same_again_and_know_what_is_right() -> None:
    first, again = people.person(3), people.person(3)
    assert [question.turn.speech.tobytes() for question in first] == [question.turn.speech.tobytes() for question in again]
    assert [bool(question.turn.picture) for question in first] == [True, False, False, False, False]
    assert [question.turn.interrupt for question in first] == [None, people.CUT, None, None, None]
    assert all(0 <= question.onset < len(question.turn.speech) for question in first)
    wanted = 'The star is on the left. [{"box_2d": [100, 100, 300, 300], "label": "red star"}]'
    near, far = Mark((110, 90, 300, 310), "red star"), Mark((400, 100, 600, 300), "red star")
    assert people.right(wanted, "The star is on the left. ", [near])
    assert not people.right(wanted, "The star is on the left.", [far])
    assert not people.right(wanted, "The star is on the left.", [near, far])
    assert not people.right(wanted, "The star is on the right.", [near])


def test_what_cannot_be_done_is_said_in_a_sentence_before_anything_is_measured(capsys, tmp_path) -> None:
    assert main(["bench", "session", "--chart", str(tmp_path / "nowhere" / "chart.svg")]) == 2
    assert capsys.readouterr().err == f"attend: {tmp_path}/nowhere/chart.svg cannot be written: its folder must exist\n"
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "session", "--speakers", "0"])
