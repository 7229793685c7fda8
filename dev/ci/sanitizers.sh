#!/usr/bin/env bash
# Builds the extension with GCC's AddressSanitizer and UndefinedBehaviorSanitizer, and runs the tests of ops, models and files on it;
# then with ThreadSanitizer, for the tests that have several threads or ranks. The first finding ends it, with a report. Says what it
# leaves out. (.ci/run runs it.)
#
#   PYTHON=.venv/bin/python dev/ci/sanitizers.sh           # the interpreter needs the test extra; 3 minutes on two cores
#   PYTHON=.venv/bin/python dev/ci/sanitizers.sh --full    # all kernel sets, AMX's emulated, and more tests
. "$(dirname "$0")/common.sh"

if ! command -v g++ >/dev/null || [ "$(uname -s)" != Linux ]; then
  echo "left out: it needs GCC on Linux"
  exit 0
fi
sets=(-DLLMC_COMPILES_AVX512=OFF -DLLMC_COMPILES_AVX512_BF16=OFF -DLLMC_COMPILES_AMX=OFF)
address_tests=(tests/ops/test_ops.py tests/models/test_{bindings,gpt2,model_checkpoint}.py tests/training/test_comm.py tests/distributed/test_host_comm.py)
address_tests+=(tests/data/test_{dataloader,tokenizer}.py)
thread_tests=(tests/ops/test_ops.py tests/ops/test_threads.py::test_many_callers_at_once tests/models/test_bindings.py tests/training/test_comm.py tests/distributed/test_host_comm.py tests/models/test_gpt2.py::test_threads_change_nothing)
if [ "${1:-}" = --full ]; then
  sets=("-ULLMC_COMPILES_*" -DLLMC_AMX_EMULATION=ON)
  address_tests=(tests --deselect tests/project/test_extension.py) # whose subject is what the extension exports and is linked to
  thread_tests=(tests/ops/test_ops.py tests/ops/test_threads.py::test_many_callers_at_once tests/models/test_{bindings,gpt2,schedule_mirror}.py tests/training/test_{optim,comm,interrupt}.py tests/distributed/test_host_comm.py)
fi

build_sanitized() { # NAME FLAGS -D...: in a folder of its own
  build=build/$1
  build_extension -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=None -DLLMC_KERNEL_OPTIMIZATION=-O1 "-DCMAKE_CXX_FLAGS=-O1 -g1 -fno-omit-frame-pointer $2" "${@:3}"
}
run_tests() { # LIBRARIES TEST...: Python is not built with a sanitizer, so its library must be loaded first
  local libraries=$1
  shift
  env "LD_PRELOAD=$libraries" OMP_NUM_THREADS=2 OPENBLAS_NUM_THREADS=1 "${prefix[@]}" "$python" -m pytest -q -s -x -p no:cacheprovider "$@"
}
library() { g++ -print-file-name="lib$1.so"; }
prefix=()

build_sanitized asan "-fsanitize=address,undefined -fno-sanitize-recover=undefined" "${sets[@]}"
# Python does not free all that it has, and has an allocator of its own unless told. libstdc++ is where the library looks for `throw`.
PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  run_tests "$(library asan) $(library stdc++)" "${address_tests[@]}"

# Kernel sets differ in what one thread does: the baseline is enough.
build_sanitized tsan -fsanitize=thread -DLLMC_COMPILES_{AVX2,AVX512,AVX512_BF16,AMX}=OFF
# Addresses must not be random where a system's are more random than the library knows.
if setarch -R true 2>/dev/null; then prefix=(setarch -R); fi
TSAN_OPTIONS="halt_on_error=1 suppressions='$PWD/dev/ci/tsan.supp'" run_tests "$(library tsan)" "${thread_tests[@]}"
