"""What the package is called and which version this is."""

__version__ = "0.1.0"
