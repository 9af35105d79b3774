"""Surgery on a loaded model: what each layer keeps, how the loss is computed, how text is generated.

Every change is made to an instance, can be undone, and is listed as a ``Replacement``.
"""
