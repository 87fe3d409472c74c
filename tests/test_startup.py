"""Commands start without the libraries that only some of their work needs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
import test, test_scratch, test_kd, validate, train_original_models, krr_st.kd_teacher
import train, krr_st.target, krr_st.baselines, krr_st.tables, clom.tables, data.prepare.__main__
print(*{"torchvision", "transformers", "kornia", "sklearn", "matplotlib"} & set(sys.modules))
"""


def test_slow_libraries_are_imported_where_they_are_used():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
