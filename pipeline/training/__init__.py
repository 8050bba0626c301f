"""The parts of distillation: sharding, data, losses, the LightningModule, callbacks."""
