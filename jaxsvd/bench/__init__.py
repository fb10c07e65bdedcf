"""How fast a model is, beside how fast it could be.

`formulas` is what the numbers mean, `contenders` what is measured, `measure` the measuring itself, `launches` what a
compiled step starts, `machine` where it ran, `report` what is printed, drawn and kept.
"""
