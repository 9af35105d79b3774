"""The loop: TRL's ``SFTTrainer`` through its public extension points, events out, a stop that saves.

What it needs from files and data comes in as values and functions; no view and no notebook is known here.
"""
