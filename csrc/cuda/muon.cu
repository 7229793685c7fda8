// Muon's ops beside its matmuls. Bound by memory bandwidth; newton_schulz is composed in core/backend.cpp. The clip factor is
// read here, on the device: the host does not wait for the norm.
#include "core/dims.h"
#include "cuda/cuda_backend.h"
#include "cuda/device.cuh"
#include "cuda/weights.cuh"

namespace llmc {

namespace {

template <class T, class G>
struct Momentum {
    T* out;
    float* m;
    const G* grad;
    const float* factor;
    float momentum;
    bool nesterov;
    template <int W>
    __device__ void at(i64 i) const {
        const float f = *factor;
        if (!is_finite(f)) return;
        Floats<W> g = load<W>(grad + i), m1 = load<W>(m + i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            g[k] *= f;
            m1[k] = interpolate(g[k], m1[k], momentum);
            g[k] = nesterov ? interpolate(g[k], m1[k], momentum) : m1[k];
        }
        store(m + i, m1);
        store(out + i, g);
    }
};

template <class P, Rounding rounding>
struct Update {
    P* param;
    std::int16_t* master;
    const P* direction;
    const float* factor;
    float lr, scale, weight_decay;
    std::uint32_t seed, first;
    template <int W>
    __device__ void at(i64 i) const {
        if (!is_finite(*factor)) return;
        const Floats<W> d = load<W>(direction + i);
        Floats<W> p = load_weights<W, rounding>(param, master, i);
#pragma unroll
        for (int k = 0; k < W; ++k) p[k] = fmaf(-lr, fmaf(weight_decay, p[k], scale * d[k]), p[k]);
        store_weights<rounding>(param, master, i, p, first, seed);
    }
};

template <class T>
struct Scale {
    T* out;
    const T* inp;
    const float* factor;
    float scale;
    template <int W>
    __device__ void at(i64 i) const {
        const float f = scale * *factor;
        Floats<W> x = load<W>(inp + i);
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] *= f;
        store(out + i, x);
    }
};

template <class T>
struct ShiftedSum {
    T* out;
    const T *x, *y;
    float a, b, c;
    i64 N;
    template <int W>
    __device__ void at(i64 i) const {
        Floats<W> sum = load<W>(x + i);
        const Floats<W> other = load<W>(y + i);
        i64 from_diagonal = i % (N + 1);  // element r of row r is element r (N + 1)
#pragma unroll
        for (int k = 0; k < W; ++k) {
            sum[k] = fmaf(b, sum[k], fmaf(c, other[k], from_diagonal == 0 ? a : 0.0f));
            from_diagonal = from_diagonal == N ? 0 : from_diagonal + 1;
        }
        store(out + i, sum);
    }
};

}  // namespace

void CudaBackend::muon_momentum(Tensor out, Tensor m, Tensor grad, Tensor factor, float momentum,
                                bool nesterov) {
    const i64 n = muon_momentum_dims(out, m, grad, factor);
    const auto run = [&](auto tag, auto grad_tag) {
        using T = decltype(tag);
        using G = decltype(grad_tag);
        launch_elementwise<T>(
            stream(), n,
            Momentum<T, G>{out.as<T>(), m.as<float>(), grad.as<G>(), factor.as<float>(), momentum, nesterov},
            out.data, m.data, grad.data);
    };
    if (out.dtype == DType::f32)
        run(float{}, float{});
    else
        visit_float(grad.dtype, [&](auto grad_tag) { run(bf16{}, grad_tag); });
}

void CudaBackend::muon_update(Tensor param, Tensor master, Tensor direction, Tensor factor,
                              const MuonStep& step) {
    const i64 n = muon_update_dims(param, master, direction, factor);
    const auto run = [&](auto tag, auto rounding) {
        using P = decltype(tag);
        launch_elementwise<P>(
            stream(), n,
            Update<P, decltype(rounding)::value>{param.as<P>(), master.as<std::int16_t>(), direction.as<P>(),
                                                 factor.as<float>(), step.lr, step.scale, step.weight_decay,
                                                 step.seed, static_cast<std::uint32_t>(step.first)},
            param.data, master.data, direction.data);
    };
    if (param.dtype == DType::f32)
        run(float{}, std::integral_constant<Rounding, Rounding::none>{});
    else if (master)
        run(bf16{}, std::integral_constant<Rounding, Rounding::split>{});
    else
        run(bf16{}, std::integral_constant<Rounding, Rounding::stochastic>{});
}

void CudaBackend::scale(Tensor out, Tensor inp, Tensor factor, float scale) {
    const i64 n = scale_dims(out, inp, factor);
    visit_float(out.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch_elementwise<T>(stream(), n, Scale<T>{out.as<T>(), inp.as<T>(), factor.as<float>(), scale},
                              out.data, inp.data);
    });
}

void CudaBackend::shifted_sum(Tensor out, Tensor x, Tensor y, float a, float b, float c) {
    const i64 N = shifted_sum_dims(out, x, y);
    visit_float(out.dtype, [&](auto tag) {
        using T = decltype(tag);
        launch_elementwise<T>(stream(), N * N, ShiftedSum<T>{out.as<T>(), x.as<T>(), y.as<T>(), a, b, c, N},
                              out.data, x.data, y.data);
    });
}

}  // namespace llmc
