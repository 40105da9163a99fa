"""Settings for nbgrader: its course folder is one beside this repository's folders (teaching/README.md).

The notebooks are blank already and carry nbgrader's marks, so nothing has to be cleared.
"""

c = get_config()                                 # noqa: F821 (nbgrader gives it)
c.GenerateAssignment.preprocessors = [
    "nbgrader.preprocessors.LockCells", "nbgrader.preprocessors.ClearOutput",
    "nbgrader.preprocessors.CheckCellMetadata", "nbgrader.preprocessors.ComputeChecksums",
    "nbgrader.preprocessors.SaveCells", "nbgrader.preprocessors.ComputeChecksums"]
c.ExecutePreprocessor.timeout = 900
