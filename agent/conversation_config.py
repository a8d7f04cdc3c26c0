"""The settings of one conversation, with their defaults."""

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
    camera: Literal["off", "end", "live"] = "end"  # when the newest picture joins a turn: never, at the end, at start and end
    picture: int | None = None  # soft tokens of a picture; None: the checkpoint's default
    sampling: SamplingParams | None = None  # None: the checkpoint's default
    seed: int | None = None
    max_tokens: int = 512  # tokens of an answer
    answers: bool = True  # answer a spoken turn as soon as it ends
    spoken: bool = True  # speak answers, if there is a voice
    calls: tuple[str, ...] = ()  # an answer begins with a call to one of these tools
    captions: bool = True  # transcribe spoken turns
    ahead: float = 0.3  # seconds of audio that are sent ahead of playback
    patience: float = 10.0  # seconds without audio after which the voice counts as failed
    backlog: int = 750  # positions that may wait for the model; further frames are dropped and counted
    unread: int = 1024  # events that a door may leave unread
