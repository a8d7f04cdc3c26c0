"""What nano is taught, and after which of its layers: answers, what is seen and heard, and all that lies between.

A lesson's targets (model/nano/lessons.py) become losses here. Heads of their own are thrown away after training.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import AttentionMetadata, whole_span
from model.functional import rms_norm, rotate
from model.gemma import Block, Gemma
from model.nano import cover, world
from model.nano.lessons import ANSWER, HEARING, KINDS, SIGHT, Batch

OUTLINE, EXTENT, TALLY, ASKED, FOUND, LOOK = range(HEARING + 1, HEARING + 7)
SHARES = {ANSWER: 1.0, SIGHT: 0.5, HEARING: 1.0, OUTLINE: 1.0, EXTENT: 0.5, TALLY: 0.5, ASKED: 0.5, FOUND: 0.5, LOOK: 0.5}
# The layer after which each is read off. What is seen and heard must stand there before the last layers, or the answer
# has nothing to look at: with all three after the last, answers about pictures stayed at chance for 900 steps. And an
# answer takes layers too, to know what is asked, to look it up and to compare: with two left for it, every patch's thing
# was known (99 % of shapes, 100 % of colours) and yet only half of the answers were right after 6,200 steps.
DEPTHS = {OUTLINE: 2, SIGHT: 4, EXTENT: 4, HEARING: 4, TALLY: 6, ASKED: 6, FOUND: 7, ANSWER: 8}
LOOKS = 7, 1  # the layer one of whose heads is taught where to look, and the head, which did a little of it by itself
BINS = 101  # coordinates 0, 10 … 1000


class Aside(nn.Module):
    """What is asked besides, by heads that are thrown away afterwards: at each patch what is painted on it, the box of the
    thing that covers it and how that thing stands among the others; where an answer begins what was asked, and how many
    such things there are. Without the first shapes are guessed, and without the second boxes are, after 2,700 steps."""

    FIELDS: ClassVar[dict[int, tuple[int, ...]]] = {
        TALLY: cover.TALLIES,
        ASKED: (len(KINDS), 1 + len(world.COLOURS), 1 + len(world.SHAPES)),
        FOUND: (len(world.NUMBERS),),
    }

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.outline = nn.Linear(hidden, cover.FINE**2)
        self.extent = nn.Linear(hidden, 4 * BINS)
        self.tally, self.asked, self.found = (nn.Linear(hidden, sum(self.FIELDS[k])) for k in (TALLY, ASKED, FOUND))

    def ask(self, taught: int, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the share right of one of these, of hidden states x [B * T, H]."""
        if taught == OUTLINE:
            return self._draw(x[batch.patches_at], batch.outlines)
        if taught == EXTENT:
            return self._measure(x[batch.patches_at], batch.extents)
        if taught == TALLY:
            return self._choose(TALLY, self.tally(x[batch.patches_at]), batch.tallies)
        x = x[batch.asked[:, 0]]
        if taught == ASKED:
            return self._choose(ASKED, self.asked(x), batch.asked[:, 1:4])
        return self._choose(FOUND, self.found(x), batch.asked[:, 4:])

    def _draw(self, x: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        drawn = self.outline(x).float()
        if not len(drawn):
            return drawn.sum(), drawn.sum()
        return F.binary_cross_entropy_with_logits(drawn, truth), ((drawn > 0) == (truth > 0)).float().mean()

    def _measure(self, x: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """A coordinate that is off by ten is nearly right, and is taught so; the share counts those as right."""
        covered = truth[:, 0] >= 0
        guess, truth = self.extent(x[covered]).float().view(-1, 4, BINS), truth[covered]
        if not len(truth):
            return guess.sum(), guess.sum()
        near = torch.stack([truth - 1, truth, truth + 1], -1).clamp(0, BINS - 1)
        weight = guess.new_tensor([0.25, 0.5, 0.25])
        loss = -(guess.log_softmax(-1).gather(-1, near) * weight).sum(-1).mean()
        return loss, ((guess.argmax(-1) - truth).abs() <= 1).float().mean()

    def _choose(self, taught: int, guess: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """One of a few for each field; none is asked where the truth is negative."""
        there = truth[:, 0] >= 0
        guess, truth = guess[there].float(), truth[there]
        if not len(truth):
            return guess.sum(), guess.sum()
        fields = list(zip(guess.split(self.FIELDS[taught], -1), truth.unbind(-1), strict=True))
        loss = torch.stack([F.cross_entropy(logits, right) for logits, right in fields]).mean()
        return loss, torch.stack([logits.argmax(-1) == right for logits, right in fields]).float().mean()


class Taught(nn.Module):
    """The model and what it is asked besides, as one module: of a batch, for each thing taught, its mean loss and the share
    of its targets that come out first."""

    def __init__(self, model: Gemma, aside: Aside) -> None:
        super().__init__()
        self.model, self.aside = model, aside

    def forward(self, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        return losses(self.model, self.aside, batch)


def losses(model: Gemma, aside: Aside, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
    """For each thing taught: its mean loss and the share of its targets that come out first."""
    rows, length = batch.ids.shape
    x = model.embed_text(batch.ids).flatten(0, 1)
    x = x.index_copy(0, batch.frames_at, model.embed_audio(batch.frames))
    x = x.index_copy(0, batch.patches_at, model.embed_image(batch.patches, batch.places))
    span = whole_span(model.config, length, batch.blocks, model.dtype, model.device)
    x = x.view(rows, length, -1)
    out = {}
    for i, (layer, block) in enumerate(zip(model.config.layers, model.blocks, strict=True), start=1):
        if i == LOOKS[0]:
            assert isinstance(block, Block)
            out[LOOK] = _look(block, x, span.reaches[layer], batch)
        x = block(x, span.reaches[layer])
        for taught, depth in DEPTHS.items():
            if i != depth:
                continue
            if taught > HEARING:
                out[taught] = aside.ask(taught, model.normed(x.flatten(0, 1)), batch)
            else:
                out[taught] = _loss(model, x, batch, taught)
    return out


def _look(block: Block, x: Tensor, reach: AttentionMetadata, batch: Batch) -> tuple[Tensor, Tensor]:
    """How much of what a head looks at rests on the patches of the things that are being written about: left to itself it
    knew what was asked and what is where, and did not learn to bring them together."""
    attention, count = block.attention, x.shape[1]
    size, qkv = attention.layer.head_dim, attention.qkv
    assert isinstance(qkv, Tensor)  # nothing is trained in eight bits
    y = rms_norm(x, block.eps, block.input_norm)

    def turned(head: int, norm: Tensor) -> Tensor:
        own = F.linear(y, qkv[head * size : (head + 1) * size])
        return rotate(rms_norm(own, attention.eps, norm)[:, :, None], reach.cos, reach.sin)[:, :, 0]

    assert reach.mask is not None
    head = LOOKS[1]
    key = attention.heads + head * attention.layer.kv_heads // attention.heads
    scores = turned(head, attention.q_norm) @ turned(key, attention.k_norm).transpose(1, 2) + reach.mask[:, 0, :count]
    shares = scores.flatten(0, 1)[batch.looks_at].float().softmax(-1)
    on = (shares * batch.looks_to).sum(-1)
    if not len(on):
        return on.sum(), on.sum()
    return -on.clamp(min=1e-6).log().mean(), on.mean()


def _loss(model: Gemma, x: Tensor, batch: Batch, taught: int) -> tuple[Tensor, Tensor]:
    here = batch.targets[:, 2] == taught
    token, weight = batch.targets[here, 1], batch.weights[here]
    at, where = batch.targets[here, 0].unique(return_inverse=True)
    logits = model.logits(model.normed(x.flatten(0, 1)[at])).float()
    total = weight.sum().clamp(min=1e-6)
    loss = (-logits.log_softmax(-1)[where, token] * weight).sum() / total
    right = ((logits.argmax(-1)[where] == token) * weight).sum() / total
    return loss, right
