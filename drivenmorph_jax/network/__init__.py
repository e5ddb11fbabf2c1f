"""The network: encoder, attention, difference stream, Neural Demons Layer, losses, and the networks of others."""
