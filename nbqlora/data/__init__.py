"""Rows from anywhere -> token ids and labels, with the loss on the right tokens.

``rows`` reads, ``messages`` checks, ``render`` turns conversations into ids and labels, ``encode`` makes the
data set that the trainer takes as it is. Nothing here knows a model, a device or a trainer.
"""
