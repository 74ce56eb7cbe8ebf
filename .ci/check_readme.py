"""Hold the README's table of the language model against a run: its KLs and its L0 may differ by 15 %, on any processor.

    python .ci/check_readme.py README.md runs/laptop/metrics.json
"""

import json
import re
import sys
from pathlib import Path

readme = Path(sys.argv[1]).read_text()
figures = json.loads(Path(sys.argv[2]).read_text())["figures"]
rows = {"KL: stochastic masks": "divergence, stochastic", "KL: rounded": "divergence, rounded at 0", "L0": "L0"}
stale = False
for row, name in rows.items():
    cells = re.search(rf"^{re.escape(row)}[^|]*\| *([\d.]+)", readme, re.M)
    if not cells:
        sys.exit(f"error: the README's table has no row {row!r}")
    cell = cells[1]
    differs = abs(figures[name] / float(cell) - 1)
    print(f"{row}: README {cell}, this run {figures[name]:.3f} ({differs:.0%} apart)")
    stale |= differs > 0.15
if stale:
    sys.exit("error: the README's table is over 15 % off: measure it anew")
