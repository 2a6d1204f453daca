"""Trained models: networks, schedules, objectives, sampling, data, the training loop, checkpoints."""
