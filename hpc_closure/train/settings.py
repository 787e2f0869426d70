"""What a training is told, in plain values, and the learning rate they imply."""

import math
from dataclasses import dataclass

ENGINES = ("auto", "deepspeed", "torch")
PRECISIONS = ("float32", "bfloat16")
SCHEDULES = ("constant", "cosine", "published")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training. Batches are global: the processes share them.

    Attributes:
        steps: optimiser steps, all phases together.
        batch: samples per step over all processes; a multiple of processes x ``accumulate``.
        lr: peak learning rate.
        schedule: "constant"; "cosine" to zero after a linear warm-up of ``warmup`` of the steps;
            "published": halved every fifth of the steps (Dong, Chen, Wu 2025: every 200 of 1000
            epochs).
        warmup: share of a phase's steps in the cosine's warm-up.
        weight_decay: decoupled (AdamW).
        clip: largest norm of the whole gradient; 0 = off.
        ema: decay of the averaged weights, which are validated and exported; 0 = off.
        engine: "deepspeed", "torch", or "auto": DeepSpeed when it is installed and there is
            something to share (several processes or a ZeRO stage), else plain torch.
        zero_stage: what DeepSpeed shards: 0 nothing, 1 optimiser, 2 and gradients, 3 and weights.
        deepspeed: a JSON file whose keys replace the built-in DeepSpeed configuration's.
        precision: "float32", or "bfloat16": autocast for pointwise parts; weights, optimiser and
            everything the model keeps out of autocast stay float32.
        accumulate: micro-batches per step and process.
        validate_every, checkpoint_every: steps between held-out losses and between restart points.
        log_every: steps averaged in one row of the metrics.
        validation: most held-out samples used in one validation; 0 = all.
        score_members: samples per snapshot in the scores beside the loss; 0 = no scores.
        patience: stop a phase after this many validations without improvement and keep its best
            weights; 0 = off.
        augment: use the equation's symmetries.
        budget: bytes of fields held in memory; a larger data set is streamed.
        max_steps: stop (as if asked to) after this many steps of this call; 0 = off.
        seed: of batches, augmentation and the model's noise.
        device: "auto", "cpu" or "cuda".
    """

    steps: int = 20000
    batch: int = 80
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    engine: str = "auto"
    zero_stage: int = 0
    deepspeed: str | None = None
    precision: str = "float32"
    accumulate: int = 1
    validate_every: int = 500
    checkpoint_every: int = 500
    log_every: int = 10
    validation: int = 512
    score_members: int = 8
    patience: int = 0
    augment: bool = False
    budget: int = 2**32
    max_steps: int = 0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        words = {"engine": ENGINES, "precision": PRECISIONS, "schedule": SCHEDULES}
        for key, valid in words.items():
            if getattr(self, key) not in valid:
                raise ValueError(
                    f"train.{key}={getattr(self, key)!r}: expected one of {', '.join(valid)}"
                )
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"train.zero_stage={self.zero_stage}: expected 0, 1, 2 or 3")
        if self.engine == "torch" and self.zero_stage:
            raise ValueError(
                f"train.zero_stage={self.zero_stage} needs DeepSpeed, but train.engine=torch: "
                "set train.engine=deepspeed or train.zero_stage=0"
            )
        for key in (
            "steps",
            "batch",
            "accumulate",
            "validate_every",
            "checkpoint_every",
            "log_every",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"train.{key}={getattr(self, key)}: expected at least 1")

    def check_shares(self, num_processes: int) -> None:
        """Raise ValueError unless processes and micro-batches get equal numbers of samples."""
        parts = num_processes * self.accumulate
        if self.batch % parts:
            raise ValueError(
                f"train.batch={self.batch} is global and does not divide into {num_processes} "
                f"processes x {self.accumulate} micro-batches; nearest: "
                f"{max(1, round(self.batch / parts)) * parts}"
            )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` of a phase of ``steps`` steps."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "published":
            return self.lr * 0.5 ** (5 * step // steps)
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return 0.5 * self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
