"""All that is trained to draw: networks, schedules, objectives, sampling, data, the training loop, checkpoints."""
