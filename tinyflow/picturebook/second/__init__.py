"""The second edition of the picture book, in the making: README.md says what is there."""
