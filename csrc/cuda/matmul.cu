// The three matmuls of a linear layer, in BLAS's column-major terms (D = op(A) op(B)):
//   forward   out^T (OC,N)     = weight (OC,C)    inp^T (C,N)       bias or bias + GELU in the epilogue
//   dinp      dinp^T (C,N)     = weight^T (C,OC)  dout^T (OC,N)     GELU's gradient in the epilogue
//   dweight   dweight^T (C,OC) = inp^T (C,N)      dout (N,OC)       accumulation by beta
// cuBLASLt computes them (cublaslt.cpp), but few_rows.cu the forward of up to 16 rows. If cuBLASLt has no algorithm for a
// shape with an epilogue (odd ones), matmul and epilogue are done one after the other; if it has none at all, the plain
// kernel below takes any shape.
#include <algorithm>
#include <cstdio>

#include "core/dims.h"
#include "cuda/column_sum.cuh"
#include "cuda/cuda_backend.h"

namespace llmc {

namespace {

constexpr int kTile = 32;     // the plain kernel's block of D
constexpr int kTileRows = 8;  // thread (x, y) computes rows y, y + 8, ..

constexpr double kLargeFlops = 1e9;  // a matmul as large as this is worth a warning if it is slow

// Element (row, column) of op(X), 0 outside.
template <class T>
__device__ float element(const T* x, i64 ld, bool transposed, i64 row, i64 column, i64 rows, i64 columns) {
    if (row >= rows || column >= columns) return 0.0f;
    return widen(transposed ? x[row * ld + column] : x[column * ld + row]);
}

template <class In, class Out>
__global__ void matmul_kernel(Matmul p) {
    LLMC_SHARED(a, float[kTile][kTile + 1]);  // + 1: no two rows of a column in one bank
    LLMC_SHARED(b, float[kTile][kTile + 1]);
    const int x = threadIdx.x, y = threadIdx.y;
    const i64 m0 = static_cast<i64>(blockIdx.x) * kTile, n0 = static_cast<i64>(blockIdx.y) * kTile;
    const In *const A = static_cast<const In*>(p.a), *const B = static_cast<const In*>(p.b);
    float sums[kTile / kTileRows] = {};
    for (i64 k0 = 0; k0 < p.k; k0 += kTile) {
        for (int r = y; r < kTile; r += kTileRows) {
            a[r][x] = element(A, p.lda, p.transpose_a, m0 + x, k0 + r, p.m, p.k);
            b[r][x] = element(B, p.ldb, p.transpose_b, k0 + x, n0 + r, p.k, p.n);
        }
        __syncthreads();
        for (int k = 0; k < kTile; ++k)
#pragma unroll
            for (int i = 0; i < kTile / kTileRows; ++i)
                sums[i] = fmaf(a[k][x], b[y + i * kTileRows][k], sums[i]);
        __syncthreads();
    }
    const i64 m = m0 + x;
    if (m >= p.m) return;
    const float shift = p.bias ? widen(static_cast<const In*>(p.bias)[m]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kTile / kTileRows; ++i) {
        const i64 n = n0 + y + i * kTileRows;
        if (n >= p.n) continue;
        Out* const d = static_cast<Out*>(p.d) + n * p.ldd + m;
        *d = narrow<Out>(sums[i] + shift + (p.accumulate ? widen(*d) : 0.0f));
    }
}

template <class T>
struct BiasTerms {
    const T* dout;
    i64 OC;
    template <int W>
    __device__ void add(Floats<W> (&sums)[1], i64 row, i64 column) const {
        const Floats<W> d = load<W>(dout + row * OC + column);
#pragma unroll
        for (int k = 0; k < W; ++k) sums[0][k] += d[k];
    }
};

Matmul forward_matmul(const MatmulDims& d, Tensor out, Tensor inp, Tensor weight, Tensor bias) {
    Matmul p{};
    p.m = d.OC, p.n = d.N, p.k = d.C;
    p.a = weight.data, p.lda = d.C, p.transpose_a = true;
    p.b = inp.data, p.ldb = d.C, p.transpose_b = false;
    p.d = out.data, p.ldd = d.OC;
    p.inputs = inp.dtype, p.output = out.dtype;
    p.bias = bias.data;
    if (bias) p.epilogue = Epilogue::bias;
    return p;
}

}  // namespace

MatmulEngine& CudaBackend::engine() {
    std::unique_ptr<MatmulEngine>& engine = lane().engine;
    if (engine) return *engine;
    if (!options_.tune) {
        engine = std::make_unique<MatmulEngine>(options_.tf32, nullptr);
        return *engine;
    }
    cudaDeviceProp p{};
    CUDA_CHECK(cudaGetDeviceProperties(&p, device_));
    const MatmulEngine::Tuning tuning{
        std::u8string(options_.tune_file.begin(), options_.tune_file.end()),
        filled("{}, sm_{}{}, {} multiprocessors", p.name, p.major, p.minor, p.multiProcessorCount)};
    engine = std::make_unique<MatmulEngine>(options_.tf32, &tuning);
    return *engine;
}

// A matmul with GELU in its epilogue, which only cuBLASLt can do. Returns false if it cannot, or is not to. Its GELU
// is less exact than f32, but more exact than bf16 can show.
bool CudaBackend::fused_matmul(const Matmul& p) {
    const bool wanted = options_.fused_gelu == CudaOptions::Switch::automatic
                            ? fuse_gelu_by_default_ && p.inputs == DType::bf16
                            : options_.fused_gelu == CudaOptions::Switch::on;
    const cudaStream_t s = stream();  // before the engine, which is made on the current device
    return wanted && p.m > 0 && p.n > 0 && p.k > 0 && engine().run(p, s);
}

// The plain kernel is hundreds of times slower, so matmuls that need it are counted, and a large one gives a warning.
void CudaBackend::count_plain_matmul(const Matmul& p) {
    const double flops = 2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
    ++plain_matmuls_;
    if (flops <= largest_plain_flops_) return;
    const bool warn = flops > kLargeFlops && largest_plain_flops_ <= kLargeFlops;
    largest_plain_flops_ = flops;
    largest_plain_ = filled("{} x {} x {}", p.m, p.n, p.k);
    if (warn)
        std::fprintf(stderr,
                     "llmc: warning: cuBLASLt has no algorithm for a matmul of %s, which goes to a slow "
                     "kernel\n",
                     largest_plain_.c_str());
}

void CudaBackend::matmul(const Matmul& p) {
    if (p.m == 0 || p.n == 0) return;
    const cudaStream_t s = stream();  // before the engine, which is made on the current device
    if (p.k > 0) {
        if (engine().run(p, s)) return;
        count_plain_matmul(p);
    }
    LLMC_CHECK(ceil_div(p.n, kTile) <= 65535, "a matmul of {} columns is too large", p.n);
    visit_float(p.inputs, [&](auto in) {
        visit_float(p.output, [&](auto out) {
            launch(matmul_kernel<decltype(in), decltype(out)>,
                   dim3(blocks_for(p.m, kTile), blocks_for(p.n, kTile)), dim3(kTile, kTileRows), 0, s, p);
        });
    });
}

void CudaBackend::matmul_forward(Tensor out, Tensor inp, Tensor weight, Tensor bias) {
    const MatmulDims d = matmul_forward_dims("matmul_forward", out, inp, weight, bias);
    const Matmul p = forward_matmul(d, out, inp, weight, bias);
    if (!few_rows_matmul(p)) matmul(p);
}

void CudaBackend::matmul_gelu_forward(Tensor out, Tensor pre, Tensor inp, Tensor weight, Tensor bias) {
    const MatmulDims d = matmul_forward_dims("matmul_gelu_forward", out, inp, weight, bias);
    check::like("matmul_gelu_forward", "pre", pre, out);
    check::dtype("matmul_gelu_forward", "out", out, inp.dtype);
    Matmul p = forward_matmul(d, out, inp, weight, bias);
    p.epilogue = bias ? Epilogue::gelu_bias : Epilogue::gelu;
    p.aux = pre.data;
    if (few_rows_matmul(p) || fused_matmul(p)) return;
    matmul(forward_matmul(d, pre, inp, weight, bias));
    launch_gelu_forward(out, pre);
}

void CudaBackend::matmul_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                  Tensor weight, bool accumulate) {
    matmul_gelu_backward(dinp, dweight, dbias, dout, inp, weight, Tensor(), accumulate);
}

// pre absent: without GELU.
void CudaBackend::matmul_gelu_backward(Tensor dinp, Tensor dweight, Tensor dbias, Tensor dout, Tensor inp,
                                       Tensor weight, Tensor pre, bool accumulate) {
    const char* const op = pre ? "matmul_gelu_backward" : "matmul_backward";
    const MatmulDims d = matmul_backward_dims(op, dinp, dweight, dbias, dout, inp, weight);
    Fork fork(*this, options_.overlap && dinp && (dweight || dbias));
    if (dinp) {
        if (pre) check::matrix(op, "pre", pre, weight.dtype, d.N, d.C);
        Matmul p{};
        p.m = d.C, p.n = d.N, p.k = d.OC;
        p.a = weight.data, p.lda = d.C, p.transpose_a = false;
        p.b = dout.data, p.ldb = d.OC, p.transpose_b = false;
        p.d = dinp.data, p.ldd = d.C;
        p.inputs = p.output = weight.dtype;
        Matmul fused = p;
        fused.epilogue = Epilogue::dgelu;
        fused.aux = pre.data;
        if (!pre || !fused_matmul(fused)) {
            matmul(p);
            if (pre) launch_gelu_backward(dinp, pre, dinp);
        }
    }
    fork.other();
    bool has_dbias = false;
    if (dweight) {
        Matmul p{};
        p.m = d.C, p.n = d.OC, p.k = d.N;
        p.a = inp.data, p.lda = d.C, p.transpose_a = false;
        p.b = dout.data, p.ldb = d.OC, p.transpose_b = true;
        p.d = dweight.data, p.ldd = d.C;
        p.inputs = weight.dtype, p.output = dweight.dtype;
        p.accumulate = accumulate;
        if (dbias && options_.bias_in_matmul && dbias.dtype == dweight.dtype && p.m > 0 && p.n > 0 &&
            p.k > 0) {
            // cuBLASLt can only overwrite dbias: to accumulate, it writes to scratch memory, which is then added.
            Matmul both = p;
            const Tensor sums = accumulate ? Tensor(scratch(d.OC * 4), dbias.dtype, {d.OC}) : dbias;
            both.epilogue = Epilogue::bgradb;
            both.bias = sums.data;
            const cudaStream_t s = stream();
            has_dbias = engine().run(both, s);
            if (has_dbias && accumulate) residual_forward(dbias, dbias, sums);
        }
        if (!has_dbias) matmul(p);
    }
    if (dbias && !has_dbias) bias_gradient(dbias, dout, accumulate);
    fork.join();
}

void CudaBackend::bias_gradient(Tensor dbias, Tensor dout, bool accumulate) {
    const i64 N = dout.rows(), OC = dout.cols();
    float* const partial = static_cast<float*>(scratch(column_sum_scratch<1>(N, OC)));
    visit_float(dout.dtype, [&](auto tag) {
        using T = decltype(tag);
        visit_float(dbias.dtype, [&](auto grad_tag) {
            using G = decltype(grad_tag);
            launch_column_sum<T, 1>(stream(), SumOutputs<G>{dbias.as<G>()}, partial, N, OC, accumulate,
                                    BiasTerms<T>{dout.as<T>(), OC}, dout.data);
        });
    });
}

}  // namespace llmc
