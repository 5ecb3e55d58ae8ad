"""Time and size of the HTML report of a large sweep: ``python benchmarks/report.py [copies]``.

12 copies of the synthetic grid are 506 cells with 48 answers a dimension (194,304 answers). Wanted: under 20 s and under 5 MB.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

from comptrust import load_results
from comptrust.sweep import report


def main(copies: int = 12) -> None:
    spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).parents[1] / "tests" / "report" / "synthetic.py")
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    with tempfile.TemporaryDirectory() as folder:
        record = synthetic.write(Path(folder) / "sweep", copies=copies, intervals=False)
        wall, cpu = time.perf_counter(), time.process_time()
        results = load_results(record)
        page = report.build(results, Path(folder) / "report.html")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        counted = results.rows("select count(*) as cells, (select count(*) from items) as answers from cells")[0]
        print(json.dumps({**counted, "wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "bytes": page.stat().st_size}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
