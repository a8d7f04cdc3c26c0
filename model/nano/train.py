"""Trains nano: `python -m model.nano.train`. Stops and resumes at any time; needs espeak-ng.

Pictures and speech are made up by worker processes while the model computes. Progress and checkpoints go to `--out`;
`--export` writes the weights beside this file: the embedded checkpoint. Ctrl-C loses at most 50 steps, SIGTERM none.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from model import weights
from model.gemma import Gemma, GemmaConfig
from model.nano.lessons import SHAPES, Batch, Lessons
from model.nano.shape import SIDE_FILES, prepare
from model.nano.speakers import Speakers
from model.nano.taught import SHARES, Aside, Taught

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Course:
    steps: int = 4_000
    shapes: tuple[tuple[int, int], ...] = SHAPES  # conversations and positions of a batch
    matrix_rate: float = 0.02  # Muon
    rate: float = 2e-3  # Adam: embeddings, projectors, norms
    warmup: int = 50  # steps, also for what goes on from weights whose optimisers are gone
    cooldown: float = 0.3  # last part of the steps, in which the rates fall to zero
    ease_steps: int = 800
    compiled: bool = True  # saves a sixth of the time
    half: bool = torch.cpu._is_avx512_bf16_supported()  # weights and states in bfloat16 within a step: saves a third there
    seed: int = 1


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


class Learner:
    """The model, what learns with it, and how far it has come."""

    PARTS = ("model", "aside", "muon", "adam")

    def __init__(self, config: GemmaConfig, course: Course, device: torch.device) -> None:
        self.course, self.step, self.begun = course, 0, 0
        self.model = Gemma(config).to(device)
        initialise(self.model)
        self.aside = Aside(config.hidden_size).to(device)
        self.taught = Taught(self.model, self.aside)
        matrices = {name: p for name, p in self.model.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
        self.others = [p for name, p in self.model.named_parameters() if name not in matrices]
        self.muon = Muon(list(matrices.values()), course.matrix_rate)
        groups = [{"params": self.others}, {"params": list(self.aside.parameters())}]
        self.adam = torch.optim.AdamW(groups, course.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def learn(self, batch: Batch, fading: float = 1.0) -> list[float]:
        """One step; the loss and the share right of each thing taught. `fading` is the share of the full rates that time
        leaves; the steps that are left have a say of their own."""
        course = self.course
        fading = min(fading, (course.steps - self.step) / (course.cooldown * course.steps))
        factor = min(fading, (self.step - self.begun + 1) / course.warmup)
        for group in self.muon.param_groups:
            group["lr"] = course.matrix_rate * factor
        model, aside = self.adam.param_groups
        # The heads that are thrown away are new in each training: they learn at once, before the model follows them.
        model["lr"], aside["lr"] = course.rate * factor, course.rate * min(1.0, fading)
        results = self._results(batch)
        torch.stack([share * results[kind][0] for kind, share in SHARES.items()]).sum().backward()
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for optimiser in (self.muon, self.adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return [value.item() for kind in SHARES for value in results[kind]]

    def _results(self, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        if not self.course.half:
            whole: dict[int, tuple[Tensor, Tensor]] = self.taught(batch)
            return whole
        batch = replace(batch, frames=batch.frames.bfloat16(), patches=batch.patches.bfloat16())
        weights = {name: p.bfloat16() for name, p in self.taught.named_parameters()}
        results: dict[int, tuple[Tensor, Tensor]] = functional_call(self.taught, weights, (batch,))
        return results

    def save(self, file: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        torch.save({**parts, "step": self.step, "begun": self.begun, "course": asdict(self.course)}, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)

    def load(self, file: Path) -> None:
        state = torch.load(file, map_location=self.model.device, weights_only=True)
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.begun = state["step"], state["begun"]


def train(
    course: Course,
    out: Path,
    device: torch.device,
    workers: int,
    stop_after: float = float("inf"),
    begin: Path | None = None,
    export: Path | None = None,
    until: int | None = None,
    fade: float = 0.0,
    bank: Path | None = None,
    people: Path | None = None,
    photos: Path | None = None,
) -> int:
    """Goes on from what `out` holds, else from the weights in `begin`, up to step `until` or for `stop_after` seconds, in the
    last `fade` of which the rates fall to zero; returns the step reached. The checkpoint is then written to `export`."""
    begin = begin if begin and (begin / "model.safetensors").exists() else None
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        if begin:
            _copy_side_files(begin, out)
        else:
            prepare(out)
    raw = json.loads((out / "config.json").read_text())
    learner = Learner(GemmaConfig.from_json(raw), course, device)
    if (out / "state.pt").exists():
        learner.load(out / "state.pt")
        print(f"resuming at step {learner.step}", flush=True)
    elif begin:
        learner.model.load_state_dict(weights.load(begin, device, torch.float32).state_dict())
        learner.step = learner.begun = course.ease_steps
        print(f"going on from the weights in {begin}, counted as step {learner.step}", flush=True)

    def keep() -> None:
        learner.save(out / "state.pt")
        weights.save(learner.model, raw, out)

    for note in Speakers(bank, people).missing:
        print(f"note: {note}", flush=True)
    lessons = Lessons(out, course.shapes, course.seed, learner.step, course.ease_steps, bank, people, photos)
    loader = DataLoader(lessons, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    if course.compiled:
        torch._dynamo.config.recompile_limit = 4 * len(learner.model.blocks) * len(course.shapes)  # beyond it, none is compiled
        for block in learner.model.blocks:
            block.compile(dynamic=False)
    stopped: list[int] = []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))  # the step is finished and kept
    begun, window = time.monotonic(), []
    for batch in loader:
        left = begun + stop_after - time.monotonic()
        if learner.step >= min(course.steps, until or course.steps) or left < 0 or stopped:
            break
        batch = Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(batch).items()})
        window.append(learner.learn(batch, min(1.0, left / fade) if fade else 1.0))
        if learner.step % 25 == 0:
            mean = np.mean(window, 0)
            window.clear()
            names = ("answers", "sight", "hearing", "outlines", "boxes", "tallies", "asked", "found", "looks")
            figures = "  ".join(f"{name} {mean[2 * i]:.3f} ({mean[2 * i + 1]:.1%})" for i, name in enumerate(names))
            print(f"step {learner.step}/{course.steps}  {figures}  {time.monotonic() - begun:.0f} s", flush=True)
        if learner.step % 50 == 0:
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
    parser.add_argument("--batch", type=int, default=course.shapes[0][0], help="conversations of a batch")
    parser.add_argument("--seed", type=int, default=course.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw and speak")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; the next call goes on")
    parser.add_argument("--fade", type=float, default=0.0, help="let the rates fall to zero in the last so many of --minutes")
    parser.add_argument("--rate", type=float, default=1.0, help="share of the full rates")
    parser.add_argument("--bank", type=Path, default=Path("build/nano/bank"), help="voices that were made before")
    parser.add_argument("--people", type=Path, help="a folder of recordings of people, with people.jsonl")
    parser.add_argument("--photos", type=Path, help="a folder of photographs, which become backgrounds")
    parser.add_argument("--fresh", action="store_true", help="begin with random weights, not with the embedded ones")
    parser.add_argument("--export", action="store_true", help="write the weights beside this file at the end, finished or not")
    given = parser.parse_args()
    shapes = tuple((max(1, rows * given.batch // course.shapes[0][0]), length) for rows, length in course.shapes)
    rates = {"matrix_rate": course.matrix_rate * given.rate, "rate": course.rate * given.rate}
    course = replace(course, steps=given.steps, shapes=shapes, seed=given.seed, **rates)
    device, seconds = torch.device(given.device), given.minutes * 60
    begin, export = None if given.fresh else HERE, HERE if given.export else None
    train(
        course,
        given.out,
        device,
        given.workers,
        seconds,
        begin,
        export,
        None,
        60 * given.fade,
        given.bank,
        given.people,
        given.photos,
    )


if __name__ == "__main__":
    main()
