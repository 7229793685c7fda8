#!/usr/bin/env bash
# Compiles and links the C++ programs and dev/ci/check_kernels for macOS on arm64, as CMake does there: clang, libc++, Grand Central
# Dispatch in place of OpenMP. Beside that, the extension is compiled with libc++, but for this machine, as Python's headers are
# this machine's. Warnings are errors; nothing is run. The compiler with macOS's headers is PyPI's ziglang. On 2 cores it takes half
# a minute, and as long again the first time, in which it builds libc++ (into ~/.cache/zig).
#
# (.ci/run runs it.)
#
#   PYTHON=.venv/bin/python dev/ci/macos.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
build=$PWD/build/ci_macos
tools=$build.tools
quick="-O0 -g0 -fno-sanitize=all" # Zig's own choice for -O0 is to add both

if ! "$python" -m ziglang version >/dev/null 2>&1 && ! "$python" -m pip install --quiet ziglang; then
  echo "left out: ziglang cannot be installed"
  exit 0
fi
"$python" -c "import pybind11" 2>/dev/null || "$python" -m pip install --quiet pybind11
command -v ninja >/dev/null || "$python" -m pip install --quiet ninja
"$python" -m cmake --version >/dev/null 2>&1 && cmake=("$python" -m cmake) || cmake=(cmake)

rm -rf "$build"
mkdir -p "$tools/csrc/bindings"
# Zig has words of its own for what the processor can do.
cat >"$tools/c++" <<SH
#!/usr/bin/env bash
exec "$python" -m ziglang c++ -target aarch64-macos.14.0 "\${@/#-march=armv8.2-a+bf16/-mcpu=generic+v8_2a+bf16}"
SH
for tool in ar ranlib; do
  printf '#!/bin/sh\nexec "%s" -m ziglang %s "$@"\n' "$python" "$tool" >"$tools/$tool"
done
chmod +x "$tools"/*

# Begun first and waited for last: it takes as long as all the rest, most of which is CMake asking one question after another.
python_headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
pybind11_headers=$("$python" -c 'import pybind11; print(pybind11.get_include())')
printf '%s\n' csrc/bindings/*.cpp | xargs -P "${LLMC_BUILD_JOBS:-2}" -I{} "$python" -m ziglang c++ -std=c++20 $quick -fPIC -Wall -Wextra \
  -Werror -Icsrc -isystem "$python_headers" -isystem "$pybind11_headers" -DLLMC_VERSION=0 -DLLMC_COMPILER=zig -c {} \
  -o "$tools/{}.o" >"$tools/bindings.log" 2>&1 &
bindings=$!

"${cmake[@]}" -S . -B "$build" -G Ninja -DCMAKE_SYSTEM_NAME=Darwin -DCMAKE_SYSTEM_PROCESSOR=arm64 "-DCMAKE_CXX_COMPILER=$tools/c++" \
  "-DCMAKE_AR=$tools/ar" "-DCMAKE_RANLIB=$tools/ranlib" -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=$quick" \
  -DCMAKE_COMPILE_WARNING_AS_ERROR=ON -DLLMC_PYTHON=OFF -DLLMC_BUILD_APPS=ON -DLLMC_BUILD_CHECKS=ON >"$build.log"
[ "$(grep -c "LLMC_COMPILES_NEON.* - Success" "$build.log")" = 2 ] || { echo "macos.sh: a kernel set is missing, see $build.log"; exit 1; }
# The kernels that call Accelerate, whose framework is not here to be linked.
"$tools/c++" -std=c++20 $quick -Wall -Wextra -Werror -Icsrc -c csrc/cpu/simd/kernels_accelerate.cpp -o "$tools/accelerate.o"
"${cmake[@]}" --build "$build" --parallel "${LLMC_BUILD_JOBS:-2}" >>"$build.log" 2>&1 || { tail -40 "$build.log"; exit 1; }
wait $bindings || { cat "$tools/bindings.log"; exit 1; }
