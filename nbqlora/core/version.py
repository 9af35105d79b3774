"""The version, for reports and the package itself; a source tree that was never installed has it too."""

__version__ = "0.1.0"
