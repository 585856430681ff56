"""raygard: distributed search for freeze masks that keep diffusion models from illegal adaptation."""

__version__ = "0.1.0"
