"""How well and how purely a concept was learned, measured on concepts of which everything is known.

Read in this order: lottery, toy (the concepts), draw (what the models draw), velocities (what they predict),
judge, measures.
"""
