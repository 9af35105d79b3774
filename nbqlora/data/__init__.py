"""Rows from anywhere -> token ids and labels, with the loss on the right tokens.

``rows`` opens a source (``files``, ``text_files``, ``tables``, ``objects``), ``formats`` tells what its rows are and
``convert`` makes each a conversation, a pair or a text; ``render``, ``frames`` and ``turns`` turn that into text with
the learned parts marked, ``tokens`` into ids and labels; ``encode`` streams all of it to disk and ``report`` counts.
Nothing here knows a model, a device or a trainer.
"""
