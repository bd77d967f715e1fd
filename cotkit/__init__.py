"""cotkit: one small function per published idea about fine-tuning chains of thought."""

__version__ = "0.1.0.dev0"
