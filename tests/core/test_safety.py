"""Safety: no source file reads a pickle or evaluates text, so that a model or shard from elsewhere runs no code."""

from __future__ import annotations

import pytest
from harness import PROJECT

PACKAGE = PROJECT / "sculpt_dist"
UNSAFE = (
    "torch.load(",
    "pickle.load",
    "allow_pickle=True",
    "trust_remote_code=True",
    "WebDataset(",  # decodes members that end in .pyd or .pickle
    'eval("',
    "exec(",
)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle_is_read_and_nothing_is_evaluated(path):
    text = path.read_text()
    found = [call for call in UNSAFE if call in text]
    assert not found, f"{path.relative_to(PROJECT)} contains {found}"
