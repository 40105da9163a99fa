"""Stable Diffusion 3 and 3.5: public weights in this project's classes. README.md tells what is where."""
