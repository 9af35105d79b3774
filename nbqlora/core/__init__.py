"""What every other part agrees on: config, specs, plan, events, report, errors, units.

Standard library only, so that ``import nbqlora`` stays instant and any layer may import it.
"""
