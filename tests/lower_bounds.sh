#!/usr/bin/env bash
# Runs part of the tests with the oldest versions that pyproject.toml allows, on a CPU: tests/lower_bounds.sh [python3.10]
#
# Old torch comes from PyPI only with CUDA, 2 GB of libraries that a CPU never calls. Its file is installed without them;
# empty libraries with the same names and symbols (made with gcc) let it be imported. Needs 2 GB of disk for a while.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.10}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

oldest=(torchmetrics==1.0.0 tensorboard==2.14.0 matplotlib==3.7.0 lightning==2.5.0 pytorch-lightning==2.5.0)
tools=("pytest>=8" pytest-xdist "hypothesis>=6.100" "hessian-eigenthings>=1.0.0a5" scikit-learn scipy tqdm
    "jsonargparse[signatures]>=4.27.7" "transformers>=4.46" "setuptools<81" "numpy<2")  # torchmetrics 1.0 needs pkg_resources

"$python" -m venv "$folder/venv"
bin=$folder/venv/bin
"$bin/pip" install --quiet --no-cache-dir --no-deps torch==2.6.0 nvidia-cuda-runtime-cu12 nvidia-cuda-cupti-cu12
site=$("$bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
sed -i -E '/^Requires-Dist: (nvidia|triton)/d' "$site"/torch-*.dist-info/METADATA

"$bin/python" - "$site" <<'PYTHON'
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

site = Path(sys.argv[1])
libraries = site / "torch" / "lib"
needed, symbols = set(), defaultdict(set)
for file in libraries.glob("*.so"):
    text = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True).stdout
    needed |= set(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl).*?)\]", text))
    text = subprocess.run(["nm", "-D", "--undefined-only", file], capture_output=True, text=True, check=True).stdout
    for name, library in re.findall(r" U (\w+)(?:@(\S+))?$", text, re.M):
        symbols[library].add(name)
for library in needed - {path.name for path in site.glob("nvidia/*/lib/*")}:
    names = symbols[library] or {name for name in symbols[""] if re.match("nccl|cudnn|cu|nvrtc", name)}
    (libraries / "a.c").write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(names)))
    version = library if symbols[library] else ""
    (libraries / "a.map").write_text(f"{version} {{ global: *; }};\n")
    options = [f"-Wl,-soname,{library}", f"-Wl,--version-script={libraries / 'a.map'}"]
    command = ["gcc", "-shared", "-fPIC", "-w", libraries / "a.c", "-o", libraries / library, *options]
    subprocess.run(command, check=True)
PYTHON
LD_LIBRARY_PATH=$(printf '%s:' "$site"/torch/lib "$site"/nvidia/*/lib)
export LD_LIBRARY_PATH

"$bin/pip" install --quiet --no-cache-dir "${oldest[@]}" "${tools[@]}"
"$bin/pip" list 2>/dev/null | grep -i -E "^(torch|lightning|torchmetrics|tensorboard|matplotlib|numpy) "

# Old versions give warnings that the present ones do not, so warnings are no errors here.
PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$bin/python" -m pytest -q -n 2 -o filterwarnings=default -m "not slow" \
    tests/test_architecture.py tests/landscape/test_finite_differences.py tests/metrics/test_metric_contract.py \
    tests/callbacks/test_tensorboard.py tests/callbacks/test_no_trace.py tests/callbacks/test_sam_refusals.py \
    tests/callbacks/test_sam_exactness.py
