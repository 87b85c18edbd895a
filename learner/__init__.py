"""Torch: features, reward model, generator, trainer, checkpoint, publication."""
