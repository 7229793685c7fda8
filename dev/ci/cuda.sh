#!/usr/bin/env bash
# Compiles and links the CUDA and NCCL build for one architecture, and checks what can be checked without a
# GPU: that it imports, says what is missing, trains on the CPU, needs none of NVIDIA's libraries to be loaded, and that no
# kernel spills registers. For machines with nvcc; headers that they lack come as wheels, into build/ci_cuda_wheels.
#
# (.ci/run runs it.)
#
#   PYTHON=.venv/bin/python dev/ci/cuda.sh [ARCHITECTURE]        # default 90
. "$(dirname "$0")/common.sh"
arch=${1:-90}
wheels=build/ci_cuda_wheels

if ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  echo "left out: there is no nvcc"
  exit 0
fi
missing=$("$python" - <<'PY'
import importlib.metadata, re, sys
sys.path.insert(0, "cmake")
from build_backend import cuda_requirements
for requirement in cuda_requirements({"cmake.define.USE_NCCL": "ON"}):
    try:
        importlib.metadata.version(re.split("[<>=]", requirement)[0])
    except importlib.metadata.PackageNotFoundError:
        print(requirement)
PY
)
if [ -n "$missing" ] && [ ! -d "$wheels" ]; then
  mapfile -t packages <<<"$missing"
  "$python" -m pip install --quiet --no-deps --target "$wheels.part" "${packages[@]}"
  mv "$wheels.part" "$wheels"
fi
[ -d "$wheels" ] && export PYTHONPATH="$PWD/$wheels${PYTHONPATH:+:$PYTHONPATH}"

rm -rf "$build/CMakeFiles/llmc_cuda.dir" "$build/CMakeFiles/llmc_wgmma.dir" # or a second run would compile nothing, and see no spills
build_extension -DLLMC_CUDA_EMULATION=OFF -DUSE_NCCL=ON "-DCMAKE_CUDA_ARCHITECTURES=$arch-real" -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
  -DCMAKE_MODULE_LINKER_FLAGS=
grep -q "bytes spill" "$build/log" || { echo "cuda.sh: no report of the kernels' registers in $build/log"; exit 1; }
if grep -E "[1-9][0-9]* bytes spill" "$build/log"; then
  echo "cuda.sh: kernels spill registers, see $build/log"
  exit 1
fi
if grep "wgmma.mma_async instructions are serialized" "$build/log"; then
  echo "cuda.sh: ptxas waits behind each wgmma, see $build/log"
  exit 1
fi
if ldd "$build"/_llmc*.so | grep -E "libcu(da|blas|dnn)|libnccl"; then
  echo "cuda.sh: the extension is linked to a library of NVIDIA's"
  exit 1
fi
"$python" - <<'PY'
import numpy as np
import llmc
from llmc import _llmc

assert _llmc.cuda_built()
print("cuda.sh:", _llmc.cuda_status())
try:
    print("cuda.sh:", _llmc.Backend("cuda").info().description)
except llmc.Error as e:
    print("cuda.sh: without a GPU:", e)
config = llmc.GPT2Config(max_seq_len=16, vocab_size=61, num_layers=1, num_heads=2, channels=32)
model = llmc.GPT2(config)
optimizer = llmc.AdamW(model)
tokens = np.random.default_rng(0).integers(0, 61, (2, 17), dtype=np.int32)
losses = []
for _ in range(10):
    model.zero_grad()
    model.forward(tokens[:, :-1])
    model.backward(tokens[:, 1:])
    optimizer.step(1e-2)
    losses.append(model.mean_loss)
assert losses[-1] < losses[0] - 0.5, losses
print(f"cuda.sh: trains on the CPU, {losses[0]:.3f} -> {losses[-1]:.3f}")
PY
