# The CPU's inner loops, compiled once per instruction set; the best that runs is chosen at run time (csrc/cpu/isa.cpp). A set that
# this compiler or architecture lacks is left out, and absent.cpp answers for it.
include(CheckCXXSourceCompiles)

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" _processor)
if(CMAKE_OSX_ARCHITECTURES)
  set(_processor "${CMAKE_OSX_ARCHITECTURES}")
endif()

# llmc_kernel_set(name "flags" "probe"): compiles simd/kernels_<name>.cpp with the flags, if the probe does.
function(llmc_kernel_set name flags probe)
  string(TOUPPER ${name} upper)
  set(CMAKE_REQUIRED_FLAGS "${flags}")
  check_cxx_source_compiles("${probe}" LLMC_COMPILES_${upper})
  if(NOT LLMC_COMPILES_${upper})
    return()
  endif()
  set(file csrc/cpu/simd/kernels_${name}.cpp)
  target_sources(llmc_core PRIVATE ${file})
  separate_arguments(options NATIVE_COMMAND "${flags}")
  set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS "${options};${_kernel_options}")
  set_property(SOURCE csrc/cpu/simd/absent.cpp APPEND PROPERTY COMPILE_DEFINITIONS LLMC_HAVE_${upper})
endfunction()

set(LLMC_KERNEL_OPTIMIZATION -O3 CACHE STRING "Of the CPU kernels, whatever the build type")
# sqrtf and the like need not set errno; packed panels are written as one type and read as another.
# Vectors are explicit, so nothing is won by letting the compiler reorder sums, and NaN must stay NaN. gcc 12's AVX-512 headers trip
# -Wuninitialized.
if(MSVC)
  set(_kernel_options /O2 /fp:precise)
else()
  set(_kernel_options ${LLMC_KERNEL_OPTIMIZATION} -fno-math-errno -fno-trapping-math -fno-strict-aliasing)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND _kernel_options -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
endif()
set_source_files_properties(csrc/cpu/simd/kernels_baseline.cpp PROPERTIES COMPILE_OPTIONS "${_kernel_options}")

if(_processor MATCHES "^(x86_64|amd64|x64)$")
  if(MSVC)  # cl has no switches beyond these two: it compiles every intrinsic
    set(_avx2 "/arch:AVX2")
    set(_avx512 "/arch:AVX512")
    set(_bf16 "/arch:AVX512")
    set(_amx "/arch:AVX512")
  else()
    set(_avx2 "-mavx2 -mfma -mbmi2")
    set(_avx512 "${_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl")
    set(_bf16 "${_avx512} -mavx512bf16")
    set(_amx "${_bf16} -mamx-tile -mamx-bf16")
  endif()
  set(_include "#include <immintrin.h>\n")
  llmc_kernel_set(avx2 "${_avx2}" "${_include}int main() { return _mm256_movemask_ps(_mm256_fmadd_ps(_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps())); }")
  llmc_kernel_set(avx512 "${_avx512}" "${_include}int main() { return (int)_mm512_reduce_add_ps(_mm512_setzero_ps()); }")
  llmc_kernel_set(avx512_bf16 "${_bf16}" "${_include}int main() { __m256bh h = _mm512_cvtneps_pbh(_mm512_setzero_ps()); (void)h; return 0; }")
  if(LLMC_AMX_EMULATION)  # the same kernels over an AVX-512 model of the tiles, for testing (simd/amx_tiles_emulated.h)
    llmc_kernel_set(amx "${_avx512}" "int main() { return 0; }")
    set_property(SOURCE csrc/cpu/simd/kernels_amx.cpp csrc/cpu/isa.cpp APPEND PROPERTY COMPILE_DEFINITIONS LLMC_AMX_EMULATION)
  else()
    llmc_kernel_set(amx "${_amx}" "${_include}int main() { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); return 0; }")
  endif()
elseif(_processor MATCHES "^(aarch64|arm64)$")
  llmc_kernel_set(neon "" "#include <arm_neon.h>\nint main() { return (int)vaddvq_f32(vdupq_n_f32(0)); }")
  llmc_kernel_set(neon_bf16 "-march=armv8.2-a+bf16" "#include <arm_neon.h>\nint main() { bfloat16x8_t b = vreinterpretq_bf16_u32(vdupq_n_u32(0)); return (int)vaddvq_f32(vbfdotq_f32(vdupq_n_f32(0), b, b)); }")
endif()

# NEON, with the products of Apple's Accelerate. The probe declares what kernels_accelerate.cpp declares, so that no header is needed.
if(LLMC_ACCELERATE_EMULATION)  # over AVX2 or NEON, with a product of our own
  llmc_kernel_set(accelerate "${_avx2}" "int main() { return 0; }")
  set_property(SOURCE csrc/cpu/simd/kernels_accelerate.cpp csrc/cpu/isa.cpp APPEND PROPERTY COMPILE_DEFINITIONS LLMC_ACCELERATE_EMULATION)
elseif(APPLE AND _processor MATCHES "^(aarch64|arm64)$")
  set(CMAKE_REQUIRED_LIBRARIES "-framework Accelerate")
  llmc_kernel_set(accelerate "" "extern \"C\" void cblas_sgemm(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
    int main() { float x = 1; cblas_sgemm(101, 111, 111, 1, 1, 1, 1, &x, 1, &x, 1, 0, &x, 1); return (int)x; }")
  unset(CMAKE_REQUIRED_LIBRARIES)
  if(LLMC_COMPILES_ACCELERATE)
    target_link_libraries(llmc_core PRIVATE "-framework Accelerate")
  endif()
endif()
