// cuDNN's functions, as far as its frontend and cudnn_attention.cpp call them: each is looked up in the library
// that is opened at first use. Their symbols are hidden, so they never replace the real ones for others.
#include <cudnn.h>

#include "cuda/dynamic_library.h"

namespace llmc {

namespace {

const DynamicLibrary& cudnn() {
    static const DynamicLibrary library(kCudnn);
    return library;
}

}  // namespace

}  // namespace llmc

#define LLMC_FORWARD(result, name, parameters, arguments)                                                    \
    extern "C" result CUDNNWINAPI name parameters {                                                          \
        static auto* const function = ::llmc::cudnn().function<decltype(name)>(#name);                       \
        return function arguments;                                                                           \
    }

LLMC_FORWARD(size_t, cudnnGetVersion, (void), ())
LLMC_FORWARD(const char*, cudnnGetErrorString, (cudnnStatus_t status), (status))
LLMC_FORWARD(void, cudnnGetLastErrorString, (char* message, size_t max_size), (message, max_size))
LLMC_FORWARD(cudnnStatus_t, cudnnCreate, (cudnnHandle_t * handle), (handle))
LLMC_FORWARD(cudnnStatus_t, cudnnDestroy, (cudnnHandle_t handle), (handle))
LLMC_FORWARD(cudnnStatus_t, cudnnSetStream, (cudnnHandle_t handle, cudaStream_t stream), (handle, stream))
LLMC_FORWARD(cudnnStatus_t, cudnnGetStream, (cudnnHandle_t handle, cudaStream_t* stream), (handle, stream))
LLMC_FORWARD(cudnnStatus_t, cudnnBackendCreateDescriptor,
             (cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* descriptor), (type, descriptor))
LLMC_FORWARD(cudnnStatus_t, cudnnBackendDestroyDescriptor, (cudnnBackendDescriptor_t descriptor),
             (descriptor))
LLMC_FORWARD(cudnnStatus_t, cudnnBackendFinalize, (cudnnBackendDescriptor_t descriptor), (descriptor))
LLMC_FORWARD(cudnnStatus_t, cudnnBackendSetAttribute,
             (cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
              cudnnBackendAttributeType_t type, int64_t count, const void* elements),
             (descriptor, name, type, count, elements))
LLMC_FORWARD(cudnnStatus_t, cudnnBackendGetAttribute,
             (const cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
              cudnnBackendAttributeType_t type, int64_t requested, int64_t* count, void* elements),
             (descriptor, name, type, requested, count, elements))
LLMC_FORWARD(cudnnStatus_t, cudnnBackendExecute,
             (cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t variants),
             (handle, plan, variants))
