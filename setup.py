"""A wheel of plain Python; with `NALAR_COMPILE=1` one whose hot modules are compiled (`compile_hot_path.py`)."""

import os
import sys
from pathlib import Path

from setuptools import setup

if os.environ.get("NALAR_COMPILE") == "1":
    sys.path.insert(0, str(Path(__file__).parent))
    from compile_hot_path import arguments

    setup(**arguments())
else:
    setup()
