#include "cuda/gelu.cuh"

#include <limits>

#include "core/dims.h"
#include "cuda/cuda_backend.h"

namespace llmc {

namespace {

template <class T>
struct GeluForward {
    T* out;
    const T* inp;
    template <int W>
    __device__ void at(i64 i) const {
        Floats<W> x = load<W>(inp + i);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = gelu(x[k]);
        store(out + i, x);
    }
};

template <class T>
struct GeluBackward {
    T* dinp;
    const T *inp, *dout;
    template <int W>
    __device__ void at(i64 i) const {
        const Floats<W> x = load<W>(inp + i);
        Floats<W> d = load<W>(dout + i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float e = gelu_exponential(x[k]), s = ptx::reciprocal(1.0f + e);
            const float slope = fmaf(x[k] * x[k], 3.0f * kGelu3, kGelu1);
            // e s is 1 - s without its cancellation. If e is infinite, s is 0, and e s must be 0 too.
            d[k] *= fmaf(x[k] * slope * s, fminf(e, std::numeric_limits<float>::max()) * s, s);
        }
        store(dinp + i, d);
    }
};

}  // namespace

void CudaBackend::gelu_forward(Tensor out, Tensor inp) {
    elementwise_numel("gelu_forward", out, inp, inp);
    launch_gelu_forward(out, inp);
}

void CudaBackend::gelu_backward(Tensor dinp, Tensor inp, Tensor dout) {
    elementwise_numel("gelu_backward", dinp, inp, dout);
    launch_gelu_backward(dinp, inp, dout);
}

void CudaBackend::launch_gelu_forward(Tensor out, Tensor inp) {
    const i64 n = out.numel();
    visit_float(out.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch_elementwise<T>(stream(), n, GeluForward<T>{out.as<T>(), inp.as<T>()}, out.data, inp.data);
    });
}

void CudaBackend::launch_gelu_backward(Tensor dinp, Tensor inp, Tensor dout) {
    const i64 n = dinp.numel();
    visit_float(dinp.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch_elementwise<T>(stream(), n, GeluBackward<T>{dinp.as<T>(), inp.as<T>(), dout.as<T>()},
                              dinp.data, inp.data, dout.data);
    });
}

}  // namespace llmc
