"""A small Qwen2.5-VL as its own library saves it, and our checkpoint of it."""

from pathlib import Path

import pytest
import reference_qwen


@pytest.fixture(scope="package")
def reference(tmp_path_factory) -> Path:
    return reference_qwen.make(tmp_path_factory.mktemp("reference") / "hf")


@pytest.fixture(scope="package")
def checkpoint(reference) -> Path:
    reference_qwen.run("--from", reference, "--to", reference.parent / "checkpoint")
    return reference.parent / "checkpoint"
