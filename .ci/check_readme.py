"""Hold the README's table of the language model against a run: its KLs and its L0 may differ by 15 %, on any processor.

    python .ci/check_readme.py README.md runs/laptop/metrics.json
"""

import json
import re
import sys
from pathlib import Path

readme = Path(sys.argv[1]).read_text()
metrics = json.loads(Path(sys.argv[2]).read_text())
found = {
    "KL: stochastic masks": metrics["kl"]["stochastic"],
    "KL: rounded": metrics["kl"]["rounded_0"],
    "L0": metrics["total"]["l0"],
}
stale = False
for row, measured in found.items():
    cell = re.search(rf"^\| {re.escape(row)}[^|]*\| *([\d.]+)", readme, re.M)[1]
    differs = abs(measured / float(cell) - 1)
    print(f"{row}: README {cell}, this run {measured:.3f} ({differs:.0%} apart)")
    stale |= differs > 0.15
if stale:
    sys.exit("error: the README's table is over 15 % off: measure it anew")
