"""Real public data that is not handed out with the project (licences).

Knows: where it lies, and which tests a machine without it skips. A folder that is named and is not there fails them instead.
"""

import os
from pathlib import Path

import pytest

NAMED = os.environ.get("SELECTUNE_DATA_ROOT")
ROOT = Path(NAMED or Path(__file__).parents[2] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not NAMED and not ROOT.is_dir(),
    reason="the data sets are not handed out with the project: name their folder with SELECTUNE_DATA_ROOT",
)
