"""How one conversation is held. Every default lives here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from agent import tape
from agent.turns import TurnDetectionConfig
from agent.view import Budget, Policy
from model.sampling import SamplingParams


@dataclass(frozen=True)
class ConversationConfig:
    policy: Policy = "transcripts"
    budget: Budget = field(default_factory=Budget)
    detection: TurnDetectionConfig = field(default_factory=TurnDetectionConfig)
    setting: tape.SystemPrompt = field(default_factory=tape.SystemPrompt)
    camera: Literal["off", "end", "live"] = "end"  # when its newest picture is looked at: never, as a turn ends, as it begins too
    picture: int | None = None  # soft tokens; None: as the checkpoint says
    sampling: SamplingParams | None = None  # None: as the checkpoint says
    seed: int | None = None
    max_tokens: int = 512  # tokens of an answer
    answers: bool = True  # a spoken turn is answered as soon as it ends
    spoken: bool = True  # answers are, where there is a voice
    calls: tuple[str, ...] = ()  # an answer begins with a call of one of these tools
    captions: bool = True
    ahead: float = 0.3  # seconds of sound that are sent before they are heard
    patience: float = 10.0  # seconds without sound after which the voice is given up
    backlog: int = 750  # positions that may wait for a model which is too slow; frames beyond are lost, and counted
    unread: int = 1024  # events that a door may leave lying
