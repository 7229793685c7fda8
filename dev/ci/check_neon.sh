#!/bin/sh
# aarch64, cross-compiled and run under qemu-user, with and without the bf16 dot product: each kernel (check_kernels), and where
# PYTHON names an interpreter that has llmc, the tests of the C++ programs, which compare whole models with PyTorch's.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user; exits with 77 where they are not there. About 4 minutes on 2 cores.
#
#   [PYTHON=python] dev/ci/check_neon.sh [build folder] [op...]     ops as of check_kernels: `copy` alone shows that it runs
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$root/build/check_neon}
[ $# -gt 0 ] && shift
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake; do
    command -v $tool >/dev/null || { echo "check_neon.sh: $tool is not installed" >&2; exit 77; }
done
cmake -S "$root" -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DLLMC_PYTHON=OFF -DLLMC_BUILD_CHECKS=ON -DLLMC_BUILD_APPS=ON >/dev/null
cmake --build "$build" --target check_kernels train_gpt2 test_gpt2 -j "$(nproc)" >/dev/null

# under CPU SET: makes a folder SET of scripts that run each program so.
under() {
    echo "== qemu-aarch64 -cpu $1"
    mkdir -p "$build/$2"
    for program in check_kernels train_gpt2 test_gpt2; do
        printf '#!/bin/sh\nQEMU_LD_PREFIX=/usr/aarch64-linux-gnu LLMC_ISA=%s exec qemu-aarch64 -cpu %s "%s" "$@"\n' \
            "$2" "$1" "$(cd "$build" && pwd)/$program" >"$build/$2/$program"
        chmod +x "$build/$2/$program"
    done
}
# A Cortex-A72 has no bf16; "max" has.
under cortex-a72 neon
"$build/neon/check_kernels" "$@"
under max neon_bf16
"$build/neon_bf16/check_kernels" "$@"
if [ -n "${PYTHON:-}" ]; then
    (cd "$root" && LLMC_APPS="$build/neon_bf16" "$PYTHON" -m pytest -q tests/programs/test_apps.py tests/programs/test_gpt2_program.py)
fi
