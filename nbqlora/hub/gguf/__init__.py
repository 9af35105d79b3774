"""Export to GGUF, the file format of llama.cpp."""

from nbqlora.core.merged import ExportedGguf
from nbqlora.hub.gguf.export import export_gguf
from nbqlora.hub.gguf.quantizations import BLOCKS, K_QUANTS

__all__ = ["BLOCKS", "K_QUANTS", "ExportedGguf", "export_gguf"]
