"""Trains nano: `python -m model.nano.train`. Stops and resumes at any time; needs espeak-ng.

Pictures and speech are made up by worker processes while the model computes. Progress and checkpoints go to `--out`;
`--export` writes the weights beside this file: the embedded checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from model import weights
from model.cache import Reach, whole_span
from model.gemma import Block, Config, Gemma, rms_norm, rotate
from model.nano import pieces, world
from model.nano.lessons import ANSWER, HEARING, SIGHT, Batch, Lessons
from model.tokenizer import Tokenizer

HERE = Path(__file__).parent
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
OUTLINE, EXTENT, TALLY, ASKED, FOUND, LOOK = range(HEARING + 1, HEARING + 7)
SHARES = {ANSWER: 1.0, SIGHT: 0.5, HEARING: 1.0, OUTLINE: 1.0, EXTENT: 0.5, TALLY: 0.5, ASKED: 0.5, FOUND: 0.5, LOOK: 0.5}
# The layer after which each is read off. What is seen and heard must stand there before the last layers, or the answer
# has nothing to look at: with all three after the last, answers about pictures stayed at chance for 900 steps. And an
# answer takes layers too, to know what is asked, to look it up and to compare: with two left for it, every patch's thing
# was known (99 % of shapes, 100 % of colours) and yet only half of the answers were right after 6,200 steps.
DEPTHS = {OUTLINE: 2, SIGHT: 4, EXTENT: 4, HEARING: 4, TALLY: 6, ASKED: 6, FOUND: 7, ANSWER: 8}
LOOKS = 7, 1  # the layer one of whose heads is taught where to look, and the head, which did a little of it by itself
BINS = 101  # coordinates 0, 10 … 1000


@dataclass(frozen=True)
class Course:
    steps: int = 4_000
    batch: int = 12  # conversations of `length` positions
    length: int = 352
    matrix_rate: float = 0.02  # Muon
    rate: float = 2e-3  # Adam: embeddings, projectors, norms
    warmup: int = 50
    cooldown: float = 0.3  # last part of the steps, in which the rates fall to zero
    ease_steps: int = 800
    compiled: bool = True  # saves a sixth of the time
    seed: int = 1


def config_json(vocab_size: int, ids: dict[str, int]) -> dict[str, Any]:
    """The architecture in Google's own dialect."""
    sliding, full = "sliding_attention", "full_attention"
    text = {
        "model_type": "gemma4_unified_text",
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "layer_types": [sliding, sliding, full, sliding, sliding, full, sliding, full],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 512,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            full: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
            sliding: {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "use_bidirectional_attention": "vision",
        "tie_word_embeddings": True,
        "pad_token_id": ids["<pad>"],
        "eos_token_id": ids["<eos>"],
        "bos_token_id": ids["<bos>"],
    }
    vision = {
        "model_type": "gemma4_unified_vision",
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "mm_embed_dim": 256,
        "mm_posemb_size": 128,
        "output_proj_dims": 256,
        "rms_norm_eps": 1e-6,
    }
    return {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        "model_type": "gemma4_unified",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "eos_token_id": [ids["<eos>"], ids["<turn|>"]],
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "boa_token_id": ids["<|audio>"],
        "eoa_token_index": ids["<audio|>"],
        "audio_token_id": ids["<|audio|>"],
        "text_config": text,
        "vision_config": vision,
        "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640, "rms_norm_eps": 1e-6},
    }


def prepare(folder: Path) -> dict[str, Any]:
    """Writes tokenizer.json, generation_config.json, processor_config.json and config.json; returns the last."""
    pieces.train(world.corpus(np.random.default_rng(0), 60_000), folder)
    tokenizer = Tokenizer.load(folder)
    names = (
        "<pad>",
        "<eos>",
        "<bos>",
        "<turn|>",
        "<|image>",
        "<image|>",
        "<|image|>",
        "<|video|>",
        "<|audio>",
        "<audio|>",
        "<|audio|>",
    )
    ids = {name: tokenizer.special(name) for name in (*names, "<|tool_response>")}
    config = config_json(tokenizer.vocab_size, ids)
    generation = {
        "bos_token_id": ids["<bos>"],
        "pad_token_id": ids["<pad>"],
        "eos_token_id": [ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]],
        "do_sample": False,
        "suppress_tokens": [ids["<audio|>"], ids["<image|>"]],
    }
    processor = {"image_processor": {"max_soft_tokens": 70, "patch_size": 16, "pooling_kernel_size": 3}, "image_seq_length": 70}
    for name, content in (("config", config), ("generation_config", generation), ("processor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return config


def initialise(model: Gemma) -> None:
    """Every stream of about unit size: embeddings after their scale, each sublayer's share, and attention scores, which
    have no 1/sqrt(D) in this model, so q and k are kept small by their norms instead."""
    for name, p in model.named_parameters():
        if name.endswith(("q_norm", "k_norm")):
            nn.init.constant_(p, p.numel() ** -0.25)
        elif "post_" in name:
            nn.init.constant_(p, (2 * len(model.blocks)) ** -0.5)
        elif name == "vision.places":
            nn.init.normal_(p, std=0.5)
        elif p.dim() == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix step is made orthogonal by five Newton-Schulz rounds (Jordan et al. 2024), in float32:
    torch's own rounds run in bfloat16, which this recipe's home, a CPU without it, computes 9 times slower."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(velocity, group["momentum"]))
                p.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if wide else x


class Aside(nn.Module):
    """What is asked besides, by heads that are thrown away afterwards: at each patch what is painted on it, the box of the
    thing that covers it and how that thing stands among the others; where an answer begins what was asked, and how many
    such things there are. Without the first shapes are guessed, and without the second boxes are, after 2,700 steps."""

    FIELDS: ClassVar[dict[int, tuple[int, ...]]] = {
        TALLY: world.TALLIES,
        ASKED: (len(world.KINDS), 1 + len(world.COLOURS), 1 + len(world.SHAPES)),
        FOUND: (len(world.NUMBERS),),
    }

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.outline = nn.Linear(hidden, world.FINE**2)
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
        drawn = self.outline(x)
        if not len(drawn):
            return drawn.sum(), drawn.sum()
        return F.binary_cross_entropy_with_logits(drawn, truth), ((drawn > 0) == (truth > 0)).float().mean()

    def _measure(self, x: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """A coordinate that is off by ten is nearly right, and is taught so; the share counts those as right."""
        covered = truth[:, 0] >= 0
        guess, truth = self.extent(x[covered]).view(-1, 4, BINS), truth[covered]
        if not len(truth):
            return guess.sum(), guess.sum()
        near = torch.stack([truth - 1, truth, truth + 1], -1).clamp(0, BINS - 1)
        weight = guess.new_tensor([0.25, 0.5, 0.25])
        loss = -(guess.log_softmax(-1).gather(-1, near) * weight).sum(-1).mean()
        return loss, ((guess.argmax(-1) - truth).abs() <= 1).float().mean()

    def _choose(self, taught: int, guess: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """One of a few for each field; none is asked where the truth is negative."""
        there = truth[:, 0] >= 0
        guess, truth = guess[there], truth[there]
        if not len(truth):
            return guess.sum(), guess.sum()
        fields = list(zip(guess.split(self.FIELDS[taught], -1), truth.unbind(-1), strict=True))
        loss = torch.stack([F.cross_entropy(logits, right) for logits, right in fields]).mean()
        return loss, torch.stack([logits.argmax(-1) == right for logits, right in fields]).float().mean()


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
        x = block(x, span.reaches[layer], None)
        for taught, depth in DEPTHS.items():
            if i != depth:
                continue
            if taught > HEARING:
                out[taught] = aside.ask(taught, model.normed(x.flatten(0, 1)), batch)
            else:
                out[taught] = _loss(model, x, batch, taught)
    return out


def _look(block: Block, x: Tensor, reach: Reach, batch: Batch) -> tuple[Tensor, Tensor]:
    """How much of what a head looks at rests on the patches of the things that are being written about: left to itself it
    knew what was asked and what is where, and did not learn to bring them together."""
    attention, count = block.attention, x.shape[1]
    size = attention.layer.head_dim
    y = rms_norm(x, block.eps, block.input_norm)

    def turned(head: int, norm: Tensor) -> Tensor:
        own = F.linear(y, attention.qkv[head * size : (head + 1) * size])
        return rotate(rms_norm(own, attention.eps, norm)[:, :, None], reach.cos, reach.sin)[:, :, 0]

    assert reach.mask is not None
    head = LOOKS[1]
    key = attention.heads + head * attention.layer.kv_heads // attention.heads
    scores = turned(head, attention.q_norm) @ turned(key, attention.k_norm).transpose(1, 2) + reach.mask[:, 0, :count]
    shares = scores.flatten(0, 1)[batch.looks_at].softmax(-1)
    on = (shares * batch.looks_to).sum(-1)
    if not len(on):
        return on.sum(), on.sum()
    return -on.clamp(min=1e-6).log().mean(), on.mean()


def _loss(model: Gemma, x: Tensor, batch: Batch, taught: int) -> tuple[Tensor, Tensor]:
    here = batch.targets[:, 2] == taught
    token, weight = batch.targets[here, 1], batch.weights[here]
    at, where = batch.targets[here, 0].unique(return_inverse=True)
    logits = model.logits(model.normed(x.flatten(0, 1)[at]))
    total = weight.sum().clamp(min=1e-6)
    loss = (-logits.log_softmax(-1)[where, token] * weight).sum() / total
    right = ((logits.argmax(-1)[where] == token) * weight).sum() / total
    return loss, right


class Learner:
    """The model, what learns with it, and how far it has come."""

    PARTS = ("model", "aside", "muon", "adam")

    def __init__(self, config: Config, course: Course, device: torch.device) -> None:
        self.course, self.step = course, 0
        self.model = Gemma(config).to(device)
        initialise(self.model)
        self.aside = Aside(config.hidden_size).to(device)
        matrices = {name: p for name, p in self.model.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
        self.others = [p for name, p in self.model.named_parameters() if name not in matrices]
        self.muon = Muon(list(matrices.values()), course.matrix_rate)
        groups = [{"params": self.others}, {"params": list(self.aside.parameters())}]
        self.adam = torch.optim.AdamW(groups, course.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def learn(self, batch: Batch) -> list[float]:
        """One step; the loss and the share right of each thing taught."""
        course = self.course
        fading = (course.steps - self.step) / (course.cooldown * course.steps)
        factor = min(1.0, (self.step + 1) / course.warmup, fading)
        for optimiser, rate in ((self.muon, course.matrix_rate), (self.adam, course.rate)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        results = losses(self.model, self.aside, batch)
        torch.stack([share * results[kind][0] for kind, share in SHARES.items()]).sum().backward()
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimiser in (self.muon, self.adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return [value.item() for kind in SHARES for value in results[kind]]

    def save(self, file: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        torch.save({**parts, "step": self.step, "course": asdict(self.course)}, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)

    def load(self, file: Path) -> None:
        state = torch.load(file, map_location=self.model.device, weights_only=True)
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]


def train(
    course: Course,
    out: Path,
    device: torch.device,
    workers: int,
    stop_after: float = float("inf"),
    begin: Path | None = None,
    export: Path | None = None,
    until: int | None = None,
) -> int:
    """Goes on from what `out` holds, else from the weights in `begin`, up to step `until` or for `stop_after` seconds; returns
    the step reached. The checkpoint is then written to `export`."""
    begin = begin if begin and (begin / "model.safetensors").exists() else None
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        if begin:
            _copy_side_files(begin, out)
        else:
            prepare(out)
    raw = json.loads((out / "config.json").read_text())
    learner = Learner(Config.from_json(raw), course, device)
    if (out / "state.pt").exists():
        learner.load(out / "state.pt")
        print(f"resuming at step {learner.step}", flush=True)
    elif begin:
        learner.model.load_state_dict(weights.load(begin, device, torch.float32).state_dict())
        learner.step = course.ease_steps
        print(f"going on from the weights in {begin}, counted as step {learner.step}", flush=True)

    def keep() -> None:
        learner.save(out / "state.pt")
        weights.save(learner.model, raw, out)

    lessons = Lessons(out, course.batch, course.length, course.seed, learner.step, course.ease_steps)
    loader = DataLoader(lessons, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    if course.compiled:
        for block in learner.model.blocks:
            block.compile(dynamic=False)
    begun, window = time.monotonic(), []
    for batch in loader:
        if learner.step >= min(course.steps, until or course.steps) or time.monotonic() - begun > stop_after:
            break
        window.append(learner.learn(Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(batch).items()})))
        if learner.step % 25 == 0:
            mean = np.mean(window, 0)
            window.clear()
            names = ("answers", "sight", "hearing", "outlines", "boxes", "tallies", "asked", "found", "looks")
            figures = "  ".join(f"{name} {mean[2 * i]:.3f} ({mean[2 * i + 1]:.1%})" for i, name in enumerate(names))
            print(f"step {learner.step}/{course.steps}  {figures}  {time.monotonic() - begun:.0f} s", flush=True)
        if learner.step % 100 == 0:
            keep()
    keep()
    if export:
        weights.save(learner.model, raw, export)
        _copy_side_files(out, export)
    return learner.step


def _copy_side_files(source: Path, target: Path) -> None:
    for name in SIDE_FILES:
        (target / name).write_bytes((source / name).read_bytes())


def main() -> None:
    course = Course()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/nano"), help="where progress is kept and taken up again")
    parser.add_argument("--steps", type=int, default=course.steps)
    parser.add_argument("--batch", type=int, default=course.batch)
    parser.add_argument("--seed", type=int, default=course.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw and speak")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; the next call goes on")
    parser.add_argument("--fresh", action="store_true", help="begin with random weights, not with the embedded ones")
    parser.add_argument("--export", action="store_true", help="write the weights beside this file at the end, finished or not")
    given = parser.parse_args()
    course = replace(course, steps=given.steps, batch=given.batch, seed=given.seed)
    device, seconds = torch.device(given.device), given.minutes * 60
    begin, export = None if given.fresh else HERE, HERE if given.export else None
    train(course, given.out, device, given.workers, seconds, begin, export)


if __name__ == "__main__":
    main()
