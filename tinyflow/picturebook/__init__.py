"""A small world of pictures that is made by code, and a model of it: README.md says what is where."""
