"""PureCC, readable: learn a concept and change nothing else. Read in this order: objective, lora, embeddings, branch, concept, train, toy, evaluate,
benchmark.

For public weights besides: base, memory, export.
"""
