"""The picture-book world, with the tiny model that was trained on it. README.md says which file to read."""
