"""Magics and views for Jupyter: the only layer that knows IPython. Each magic is parse, call, display."""
