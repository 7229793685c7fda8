#!/usr/bin/env bash
# Builds the CUDA, AMX and Accelerate kernels over their emulations, and the C++ programs, and runs every test that has a device, a kernel set
# or a program: for machines with neither a GPU nor AMX. Several ranks meet by the stand-in for NCCL that is built with them. The extension is linked as by the compilers that put libstdc++ into it,
# so these tests, and those of importing it beside others, run on such a build too. Says what it leaves out. (.ci/run runs it.)
#
#   PYTHON=.venv/bin/python dev/ci/emulation.sh       # the interpreter needs the test extra; 4 minutes on two cores
. "$(dirname "$0")/common.sh"

build_extension -DLLMC_CUDA_EMULATION=ON -DLLMC_AMX_EMULATION=ON -DLLMC_ACCELERATE_EMULATION=ON -DLLMC_BUILD_APPS=ON -DLLMC_BUILD_CHECKS=ON -DUSE_NCCL=OFF -DUSE_CUDA=OFF \
  "-DCMAKE_MODULE_LINKER_FLAGS=-static-libstdc++ -static-libgcc"
if ldd "$build"/_llmc*.so | grep libstdc++; then
  echo "emulation.sh: the extension was not linked with a libstdc++ of its own"
  exit 1
fi

"$python" -m pytest -q -p no:cacheprovider tests/project/test_extension.py
LLMC_APPS=$build "$python" -m pytest -q -p no:cacheprovider tests/programs/test_apps.py tests/programs/test_gpt2_program.py
LLMC_APPS=$build "$python" -m pytest -q -p no:cacheprovider -m cuda tests
usable() { "$python" -c "from llmc import _llmc; raise SystemExit('$1' not in _llmc.isa()['usable'])"; }
# Beside its products the set for Accelerate has the loops of AVX2 or NEON, which other tests run.
tests=""
usable accelerate && tests="accelerate and (matmul or alike or agree or peak)" || echo "left out: the emulated Accelerate needs AVX2 or NEON, which this CPU lacks"
usable amx && tests="amx and not test_isa${tests:+ or $tests}" || echo "left out: the emulated AMX tiles need AVX-512 and AVX512-BF16, which this CPU lacks"
[ -z "$tests" ] || "$python" -m pytest -q -p no:cacheprovider -k "$tests" tests/golden/test_golden.py tests/ops/test_ops.py tests/training/test_optim.py tests/ops/test_isa.py tests/models/test_bindings.py
