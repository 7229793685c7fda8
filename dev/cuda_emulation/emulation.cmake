# csrc/cuda compiled as C++ over the emulated device. Needs g++ (or clang++) and no toolkit.
#   cmake -S . -B build/emulation -G Ninja -DLLMC_CUDA_EMULATION=ON
list(APPEND _cuda_kernels ${_wgmma_kernels})
set_source_files_properties(${_cuda_kernels} PROPERTIES LANGUAGE CXX)
add_library(llmc_cuda OBJECT ${_cuda_kernels} ${_cuda_host} csrc/cuda/no_cudnn.cpp csrc/cuda/no_nccl.cpp
  dev/cuda_emulation/cublaslt_naive.cpp dev/cuda_emulation/emulator.cpp dev/cuda_emulation/sort_naive.cpp)
target_include_directories(llmc_cuda PRIVATE dev/cuda_emulation csrc)
target_compile_definitions(llmc_cuda PRIVATE LLMC_CUDA_EMULATION)
target_compile_options(llmc_cuda PRIVATE -Wall -Wextra -Wno-unknown-pragmas)
target_sources(llmc_core PRIVATE $<TARGET_OBJECTS:llmc_cuda>)
target_link_libraries(llmc_core PRIVATE ${CMAKE_DL_LIBS})
