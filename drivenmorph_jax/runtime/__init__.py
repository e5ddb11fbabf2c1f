"""What a run depends on: devices, checkpoints, configurations, logs, provenance."""
