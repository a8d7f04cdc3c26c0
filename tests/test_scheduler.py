"""Which chunk goes next, decided without an engine."""

from __future__ import annotations

from agent.scheduler import CHUNK, SHARE, STEP, PendingChunk, Scheduler


def turns(scheduler: Scheduler, left: dict[str, int], size: int = CHUNK, awaited: bool = True, decoding: bool = False) -> str:
    """Whose chunk went in each tick, until nothing is left; "." where none did."""
    order = ""
    while any(left.values()):
        names = [name for name, count in left.items() if count]
        chosen = scheduler.choose([PendingChunk(name, min(size, left[name]), awaited) for name in names], decoding)
        order += "." if chosen is None else names[chosen]
        if chosen is not None:
            left[names[chosen]] -= min(size, left[names[chosen]])
    return order


def test_conversations_take_turns_and_a_short_one_does_not_wait_for_a_long_one():
    assert turns(Scheduler(), {"a": 1000, "b": 1000}) == "abababababababab"
    assert turns(Scheduler(), {"a": 1280, "b": 10}) == "abaaaaaaaaa"


def test_turns_are_of_positions_not_of_chunks():
    scheduler, order = Scheduler(), ""
    for _ in range(12):
        chosen = scheduler.choose([PendingChunk("pictures", 280, True), PendingChunk("words", 70, True)], decoding=False)
        order += "pw"[chosen] if chosen is not None else "."
    assert order.count("p") * 280 <= order.count("w") * 70 + 280


def test_who_was_away_has_saved_up_no_turns():
    scheduler = Scheduler()
    turns(scheduler, {"a": 100 * CHUNK, "b": CHUNK})
    assert turns(scheduler, {"a": 4 * CHUNK, "b": 4 * CHUNK}) in ("abababab", "babababa")


def test_a_conversation_that_is_over_is_forgotten():
    scheduler = Scheduler()
    turns(scheduler, {"a": 1000})
    scheduler.forget("a")
    scheduler.forget("never there")
    assert not scheduler._times


def test_the_closing_of_an_answer_goes_at_once_though_others_are_answered():
    assert turns(Scheduler(), {"a": 10}, decoding=True) == "a"


def test_a_long_prompt_has_one_chunk_in_four_steps_while_others_are_answered():
    assert turns(Scheduler(), {"a": 4 * CHUNK}, decoding=True) == "a...a...a...a"
    assert CHUNK // STEP == 4


def test_a_picture_longer_than_a_chunk_is_paid_for_afterwards():
    scheduler = Scheduler()
    assert turns(scheduler, {"p": 280}, size=280, decoding=True) == "p"
    assert turns(scheduler, {"p": 280}, size=280, decoding=True) == "." * 8 + "p"


def test_background_work_uses_idle_ticks_and_gets_a_small_share_where_there_are_none():
    assert turns(Scheduler(), {"a": 3 * CHUNK}, awaited=False) == "aaa"
    steps = turns(Scheduler(), {"a": 3 * CHUNK}, awaited=False, decoding=True)
    assert steps == ("." * (SHARE * CHUNK // STEP - 1) + "a") * 3
    scheduler, order = Scheduler(), ""
    for _ in range(15):
        chosen = scheduler.choose([PendingChunk("history", CHUNK, False), PendingChunk("prompt", CHUNK, True)], decoding=False)
        order += "hp"[chosen] if chosen is not None else "."
    assert order == "pppph" * 3


def test_a_decoder_that_idles_limits_nobody():
    scheduler = Scheduler()
    assert turns(scheduler, {"a": 2 * CHUNK}, decoding=True) == "a...a"
    assert turns(scheduler, {"a": 3 * CHUNK}) == "aaa"
    assert scheduler.choose([], decoding=True) is None and scheduler.choose([], decoding=False) is None
