"""
Puts the parts of `gpu_report.sh` into one file: what each step wrote, or why it wrote nothing.

    python benchmarks/merge_report.py FOLDER FILE
"""

import json
import sys
from pathlib import Path


def merge(folder: Path) -> dict:
    report: dict = {"steps": {}, "failed": {}}
    for log in sorted(folder.glob("*.log")):
        label = log.stem
        part, failed = folder / f"{label}.json", folder / f"{label}.failed"
        if part.exists():
            report["steps"][label] = json.loads(part.read_text())
        elif not failed.exists():
            lines = [line for line in log.read_text().splitlines() if line.strip()]
            report["steps"][label] = {"says": lines[-1] if lines else ""}
    for failed in sorted(folder.glob("*.failed")):
        report["failed"].setdefault(failed.stem, failed.read_text().strip())
    for part in report["steps"].values():  # the same in every step
        for key in ("machine", "versions"):
            if key in part:
                report[key] = part.pop(key)
    return report


def main() -> None:
    folder, file = map(Path, sys.argv[1:])
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(merge(folder), indent=2) + "\n")
    temporary.replace(file)


if __name__ == "__main__":
    main()
