// Attention by cuDNN's fused kernels, described as graphs to cuDNN's frontend. A graph is made once per shape,
// which takes cuDNN some tenths of a second, and is then run as often as wanted.
//
// The frontend is a header library that calls cuDNN's functions by name. cudnn_functions.cpp defines them all,
// and looks each up in the library that was opened at run time.
#include "cuda/cudnn_attention.h"

#include <cudnn_frontend.h>

#include <cmath>
#include <map>
#include <tuple>
#include <unordered_map>

#include "cuda/dynamic_library.h"
#include "cuda/runtime.h"

namespace llmc {

namespace {

namespace fe = cudnn_frontend;

enum Uid : std::int64_t { kQ, kK, kV, kOut, kStats, kDout, kDq, kDk, kDv };

void check(const fe::error_object& e, const char* call) {
    if (e.is_bad()) throw Error(filled("cuDNN: {} ({})", e.err_msg, call));
}
#define FE_CHECK(call) check(call, #call)

class FrontendAttention final : public CudnnAttention {
  public:
    explicit FrontendAttention(int device) : device_(device) {
        CUDA_CHECK(cudaSetDevice(device_));
        const cudnnStatus_t status = cudnnCreate(&handle_);
        if (status != CUDNN_STATUS_SUCCESS)
            throw Error(filled("cuDNN: {} (cudnnCreate)", cudnnGetErrorString(status)));
    }
    ~FrontendAttention() override {
        cudaSetDevice(device_);
        graphs_.clear();
        if (workspace_) cudaFree(workspace_);
        cudnnDestroy(handle_);
    }

    bool supports(const AttentionDims& d, const Tensor& qkv) const override {
        return qkv.dtype == DType::bf16 && d.HS % 8 == 0 && d.HS <= 128;
    }

    void forward(Tensor out, Tensor lse, Tensor qkv, const AttentionDims& d, cudaStream_t stream) override {
        const auto [q, k, v] = thirds(qkv, d);
        run(graph(d, Pass::forward), {{kQ, q}, {kK, k}, {kV, v}, {kOut, out.data}, {kStats, lse.data}},
            stream);
    }

    void backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse, const AttentionDims& d,
                  bool deterministic, cudaStream_t stream) override {
        const auto [q, k, v] = thirds(qkv, d);
        const auto [dq, dk, dv] = thirds(dqkv, d);
        run(graph(d, deterministic ? Pass::backward_deterministic : Pass::backward),
            {{kQ, q},
             {kK, k},
             {kV, v},
             {kOut, out.data},
             {kStats, lse.data},
             {kDout, dout.data},
             {kDq, dq},
             {kDk, dk},
             {kDv, dv}},
            stream);
    }

  private:
    enum class Pass { forward, backward, backward_deterministic };
    using TensorRef = std::shared_ptr<fe::graph::Tensor_attributes>;
    using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, Pass>;

    static std::tuple<void*, void*, void*> thirds(const Tensor& qkv, const AttentionDims& d) {
        bf16* const p = qkv.as<bf16>();
        return {p, p + d.C, p + 2 * d.C};
    }

    fe::graph::Graph& graph(const AttentionDims& d, Pass pass) {
        const Key key{d.B, d.T, d.NH, d.HS, pass};
        const auto found = graphs_.find(key);
        if (found != graphs_.end()) return *found->second;
        const auto made = build(d, pass);
        reserve(made->get_workspace_size());
        return *graphs_.emplace(key, made).first->second;
    }

    // A head's rows lie `row` elements apart: 3C in qkv, C in out.
    static void lay_out(fe::graph::Tensor_attributes& t, Uid uid, const AttentionDims& d, std::int64_t row) {
        t.set_uid(uid).set_dim({d.B, d.NH, d.T, d.HS}).set_stride({d.T * row, d.HS, row, 1});
    }
    static void lay_out_stats(fe::graph::Tensor_attributes& t, const AttentionDims& d) {
        t.set_uid(kStats).set_dim({d.B, d.NH, d.T, 1}).set_stride({d.NH * d.T, d.T, 1, 1});
        t.set_data_type(fe::DataType_t::FLOAT);
    }

    std::shared_ptr<fe::graph::Graph> build(const AttentionDims& d, Pass pass) {
        const auto g = std::make_shared<fe::graph::Graph>();
        g->set_io_data_type(fe::DataType_t::BFLOAT16)
            .set_intermediate_data_type(fe::DataType_t::FLOAT)
            .set_compute_data_type(fe::DataType_t::FLOAT);
        const auto input = [&](const char* name, Uid uid, std::int64_t row) {
            fe::graph::Tensor_attributes t;
            t.set_name(name);
            lay_out(t, uid, d, row);
            return g->tensor(t);
        };
        const auto output = [&](const TensorRef& t, Uid uid, std::int64_t row) {
            t->set_output(true);
            lay_out(*t, uid, d, row);
        };
        const TensorRef q = input("q", kQ, 3 * d.C), k = input("k", kK, 3 * d.C), v = input("v", kV, 3 * d.C);
        const float scale = 1.0f / std::sqrt(static_cast<float>(d.HS));
        if (pass == Pass::forward) {
            fe::graph::SDPA_attributes attention;
            attention.set_name("attention")
                .set_generate_stats(true)
                .set_attn_scale(scale)
                .set_causal_mask(true);
            const auto [out, stats] = g->sdpa(q, k, v, attention);
            output(out, kOut, d.C);
            stats->set_output(true);
            lay_out_stats(*stats, d);
        } else {
            const TensorRef out = input("out", kOut, d.C), dout = input("dout", kDout, d.C);
            fe::graph::Tensor_attributes statistics;
            statistics.set_name("lse");
            lay_out_stats(statistics, d);
            fe::graph::SDPA_backward_attributes attention;
            attention.set_name("attention_backward")
                .set_deterministic_algorithm(pass == Pass::backward_deterministic)
                .set_attn_scale(scale)
                .set_causal_mask(true);
            const auto [dq, dk, dv] = g->sdpa_backward(q, k, v, out, dout, g->tensor(statistics), attention);
            output(dq, kDq, 3 * d.C);
            output(dk, kDk, 3 * d.C);
            output(dv, kDv, 3 * d.C);
        }
        FE_CHECK(g->validate());
        FE_CHECK(g->build_operation_graph(handle_));
        FE_CHECK(g->create_execution_plans({fe::HeurMode_t::A}));
        FE_CHECK(g->check_support(handle_));
        FE_CHECK(g->build_plans(handle_));
        return g;
    }

    void reserve(std::int64_t bytes) {
        if (bytes <= workspace_bytes_) return;
        CUDA_CHECK(cudaFree(workspace_));  // waits for the work that uses it
        workspace_ = nullptr, workspace_bytes_ = 0;
        CUDA_CHECK(cudaMalloc(&workspace_, static_cast<std::size_t>(bytes)));
        workspace_bytes_ = bytes;
    }

    void run(fe::graph::Graph& g, std::unordered_map<std::int64_t, void*> pointers, cudaStream_t stream) {
        const cudnnStatus_t status = cudnnSetStream(handle_, stream);
        if (status != CUDNN_STATUS_SUCCESS)
            throw Error(filled("cuDNN: {} (cudnnSetStream)", cudnnGetErrorString(status)));
        FE_CHECK(g.execute(handle_, pointers, workspace_));
    }

    int device_;
    cudnnHandle_t handle_ = nullptr;
    std::map<Key, std::shared_ptr<fe::graph::Graph>> graphs_;
    void* workspace_ = nullptr;
    std::int64_t workspace_bytes_ = 0;
};

}  // namespace

std::unique_ptr<CudnnAttention> make_cudnn_attention(int device) {
    return std::make_unique<FrontendAttention>(device);
}

std::string cudnn_status() { return library_status(kCudnn); }

}  // namespace llmc
