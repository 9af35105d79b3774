"""Files <-> models: what a model is before it is loaded, loading in NF4, saving. All file formats live here."""
