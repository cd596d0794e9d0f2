"""Says that a profile has no executed notebook, before anything is imported that takes seconds.

`.venv/bin/python notebooks/site/executed.py PROFILE` ends with status 1 and one line on stderr.
"""

import os
import shlex
import sys
from pathlib import Path

profile = sys.argv[1]
folder = Path(os.environ.get("DEJAVU_RUNS", "runs"), profile, "notebooks")
if not any(folder.glob("[0-9][0-9]_*.ipynb")):
    command = f"make figures PROFILE={shlex.quote(profile)}"
    sys.exit(f"error: no executed notebook in {folder}: run `{command}`.")
