//! Training: losses, optimizers, schedules, checkpoints and the trainer.
