"""A tiny reward model that has learnt something, for whoever trains on from there."""

from rm.config import TrainConfig
from rm.train import run_train


def train_tiny(folder, data, backbone, steps):
    """Train on ``folder``/``data``, into ``folder``/run."""
    run_train(
        TrainConfig(
            output=str(folder / "run"),
            data=str(folder / data),
            model=backbone,
            dtype="float32",
            max_length=256,
            max_steps=steps,
            tokens_per_batch=400,
            eval_steps=20,
            lora_rank=4,
            learning_rate=5e-3,
            head_learning_rate=5e-3,
        )
    )
