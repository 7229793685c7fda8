# csrc/cuda compiled as C++ over the emulated device. Needs g++ (or clang++) and no toolkit.
#   cmake -S . -B build/emulation -G Ninja -DLLMC_CUDA_EMULATION=ON
list(APPEND _cuda_kernels ${_wgmma_kernels})
set_source_files_properties(${_cuda_kernels} PROPERTIES LANGUAGE CXX)
add_library(llmc_cuda OBJECT ${_cuda_kernels} ${_cuda_host} csrc/cuda/no_cudnn.cpp csrc/cuda/nccl_comm.cpp
  dev/cuda_emulation/cublaslt_naive.cpp dev/cuda_emulation/emulator.cpp dev/cuda_emulation/sort_naive.cpp)
target_include_directories(llmc_cuda PRIVATE dev/cuda_emulation csrc)
target_compile_definitions(llmc_cuda PRIVATE LLMC_CUDA_EMULATION)
set_source_files_properties(csrc/cuda/dynamic_library.cpp PROPERTIES
  COMPILE_DEFINITIONS "LLMC_NCCL_STAND_IN=\"$<TARGET_FILE:nccl_stand_in>\"")
target_compile_options(llmc_cuda PRIVATE -Wall -Wextra -Wno-unknown-pragmas)
target_sources(llmc_core PRIVATE $<TARGET_OBJECTS:llmc_cuda>)
find_package(Threads REQUIRED)
target_link_libraries(llmc_core PRIVATE Threads::Threads ${CMAKE_DL_LIBS})

# Opened at run time, as NVIDIA's own.
add_library(nccl_stand_in SHARED dev/cuda_emulation/nccl_stand_in.cpp)
target_include_directories(nccl_stand_in PRIVATE dev/cuda_emulation)
target_compile_options(nccl_stand_in PRIVATE -Wall -Wextra)
add_dependencies(llmc_core nccl_stand_in)
