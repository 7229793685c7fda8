#!/bin/sh
# check_kernels on aarch64: cross-compiled, and run under qemu-user, with and without the bf16 dot product.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user; exits with 77 where they are not there. About 4 minutes on 2 cores.
#
#   dev/check_neon.sh [build folder] [op...]     ops as of check_kernels: `copy` alone shows that it runs
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/check_neon}
[ $# -gt 0 ] && shift
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake; do
    command -v $tool >/dev/null || { echo "check_neon: $tool is not installed" >&2; exit 77; }
done
cmake -S "$root" -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DLLMC_PYTHON=OFF -DLLMC_BUILD_CHECKS=ON >/dev/null
cmake --build "$build" --target check_kernels -j "$(nproc)" >/dev/null
run() {
    echo "== qemu-aarch64 -cpu $1"
    QEMU_LD_PREFIX=/usr/aarch64-linux-gnu qemu-aarch64 -cpu "$@"
}
# A Cortex-A72 has no bf16; "max" has.
LLMC_ISA=neon run cortex-a72 "$build/check_kernels" "$@"
LLMC_ISA=neon_bf16 run max "$build/check_kernels" "$@"
