#!/usr/bin/env bash
# The lowest version of every package that pyproject.toml allows (if that has no wheel for this Python: the lowest that has one), and
# the tests that touch them. PYTHON is one that has llmc installed, whose extension is tested. torch and transformers are left out, whose
# download would take minutes; so are packages that need a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(command -v "${PYTHON:-python3}")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

mkdir "$place/site"
ln -s "$("$python" -c 'import llmc; print(llmc.__path__[0])')" "$place/site/llmc"
printf '%s; python_version < "3"\n' torch transformers >"$place/left_out"
"$python" -m venv "$place/venv"
lowest=$place/venv/bin/python
"$lowest" -m pip install -q uv pytest-xdist
uv() { "$lowest" -m uv pip "$@" --python "$lowest"; }
uv install -q --resolution lowest-direct --only-binary :all: --override "$place/left_out" -r pyproject.toml \
  --extra test --extra tensorboard --extra wandb
uv freeze | paste -sd ' '
PYTHONPATH=$place/site PYTEST_ADDOPTS='-n 2' "$lowest" -m pytest -q -p no:cacheprovider tests/data tests/models/test_hub_files.py \
  tests/training/test_logs.py tests/training/test_plot.py tests/programs/test_notebook.py tests/distributed/test_mpi.py::test_ranks[2] \
  tests/training/test_resume.py::test_one_process_at_a_time_in_a_run_directory
