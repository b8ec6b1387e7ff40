#!/usr/bin/env python3
"""Run every notebook of a folder in a temporary folder, and fail if a cell fails or if the file holds stored output.

.ci/execute_notebooks.py FOLDER
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(folder: Path) -> str | None:
    notebooks = sorted(folder.glob("*.ipynb"))
    if not notebooks:
        return f"{folder} has no notebooks"
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        if any(cell.get("outputs") for cell in notebook.cells):
            return f"{path} holds stored output; clear it before committing"
        with tempfile.TemporaryDirectory() as scratch:
            NotebookClient(notebook, timeout=900, resources={"metadata": {"path": scratch}}).execute()
        print(f"{path}: all cells ran")
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
