"""The comparison of two implementations lives beside the models' tests; these tests use it as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
