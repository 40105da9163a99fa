"""The purity benchmark: methods x concepts x seeds, trained and measured in a world where the truth is known.

README.md is its report. Read the code in this order: entries, cells, plans, workers, tables, claims, figures,
report.
"""
