# NVIDIA's compiler and headers, from a toolkit on this system or from the wheels on PyPI. The building Python is asked where
# its wheels lie, so those of pip's isolated build environment are seen (cmake/build_backend.py puts them there).
#
# Before enable_language(CUDA): chooses nvcc. Then nvidia_headers(<name> <header> <package>) sets NVIDIA_<name>_INCLUDE.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "
import importlib.util
spec = importlib.util.find_spec('nvidia')
print(';'.join(p.replace(chr(92), '/') for p in (spec.submodule_search_locations if spec else [])), end='')"
  OUTPUT_VARIABLE _nvidia_packages)

set(NVIDIA_WHEEL_ROOTS "")
foreach(_package IN LISTS _nvidia_packages)
  get_filename_component(_site "${_package}" DIRECTORY)
  # CUDA 13 shares one folder; CUDA 12 has one per package; cudnn-frontend puts its headers beside site-packages' own, or in
  # the environment's include folder.
  get_filename_component(_environment "${_site}/../../.." ABSOLUTE)
  list(APPEND NVIDIA_WHEEL_ROOTS "${_package}/cu13" "${_package}/cublas" "${_package}/cudnn" "${_package}/nccl"
    "${_package}/cuda_nvcc" "${_package}/cuda_runtime" "${_site}" "${_environment}")
endforeach()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  # The places that build_backend.py looks at, and no others.
  find_program(_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin
    NO_CACHE NO_CMAKE_SYSTEM_PATH)
  if(NOT _nvcc)
    find_program(_nvcc nvcc PATHS ${NVIDIA_WHEEL_ROOTS} PATH_SUFFIXES bin NO_DEFAULT_PATH NO_CACHE)
    if(_nvcc)
      get_filename_component(NVIDIA_NVCC_ROOT "${_nvcc}/../.." ABSOLUTE)
      # The wheels have lib, not lib64, which is where nvcc's own profile looks.
      set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${NVIDIA_NVCC_ROOT}/lib")
    endif()
  endif()
  if(NOT _nvcc)
    message(FATAL_ERROR "nvcc was not found. Install the CUDA toolkit, or: pip install 'nvidia-cuda-nvcc==13.0.*' "
      "'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'")
  endif()
  set(CMAKE_CUDA_COMPILER "${_nvcc}")
endif()

function(nvidia_headers name header package)
  find_path(NVIDIA_${name}_INCLUDE ${header}
    HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} ENV CUDNN_PATH ENV NCCL_HOME PATHS ${NVIDIA_WHEEL_ROOTS} PATH_SUFFIXES include)
  if(NOT NVIDIA_${name}_INCLUDE)
    message(FATAL_ERROR "${header} was not found in the CUDA toolkit, the system or Python's packages: pip install '${package}'")
  endif()
  message(STATUS "${header}: ${NVIDIA_${name}_INCLUDE}")
endfunction()
