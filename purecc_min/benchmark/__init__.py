"""The purity benchmark: methods x concepts x seeds, trained and measured in a world where the truth is known.

Read in this order: methods, cells, plans, workers, tables, report, figures, claims, pairs.
"""
