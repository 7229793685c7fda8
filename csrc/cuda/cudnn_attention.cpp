// Attention by cuDNN's fused kernels, described as graphs to cuDNN's frontend. A graph is made once per shape,
// which takes cuDNN some tenths of a second, and is then run as often as wanted. A shape that cuDNN makes no plan
// for, or whose plan wants more memory than there is, is refused from then on.
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
        plans_.clear();
        if (workspace_) cudaFree(workspace_);
        cudnnDestroy(handle_);
    }

    bool supports(const AttentionDims& d, const Tensor& qkv) const override {
        return qkv.dtype == DType::bf16 && d.HS % 8 == 0 && d.HS <= 128;
    }

    bool forward(Tensor out, Tensor lse, Tensor qkv, const AttentionDims& d, cudaStream_t stream) override {
        const auto [q, k, v] = thirds(qkv, d);
        return run(d, Pass::forward, {{kQ, q}, {kK, k}, {kV, v}, {kOut, out.data}, {kStats, lse.data}},
                   stream);
    }

    bool backward(Tensor dqkv, Tensor dout, Tensor qkv, Tensor out, Tensor lse, const AttentionDims& d,
                  bool deterministic, cudaStream_t stream) override {
        const auto [q, k, v] = thirds(qkv, d);
        const auto [dq, dk, dv] = thirds(dqkv, d);
        return run(d, deterministic ? Pass::backward_deterministic : Pass::backward,
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

    // As the frontend computes it: the deterministic algorithm keeps the gradients of all scores, the other one
    // accumulates dq in f32; both keep a sum for every row.
    std::int64_t workspace_bytes(const AttentionDims& d, bool deterministic) const override {
        const std::int64_t rows = d.B * d.NH * d.T;
        return rows * (deterministic ? 2 * d.T : 4 * d.HS) + 4 * rows;
    }

    std::int64_t workspaces() const override { return workspaces_; }

    std::string refusals() const override {
        if (refused_ == 0) return "";
        return filled("cuDNN refused {} attention {}, the first {}", refused_,
                      refused_ == 1 ? "shape" : "shapes", first_refusal_);
    }

  private:
    enum class Pass { forward, backward, backward_deterministic };
    using TensorRef = std::shared_ptr<fe::graph::Tensor_attributes>;
    using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, Pass>;

    static std::tuple<void*, void*, void*> thirds(const Tensor& qkv, const AttentionDims& d) {
        bf16* const p = qkv.as<bf16>();
        return {p, p + d.C, p + 2 * d.C};
    }

    struct Plan {
        std::shared_ptr<fe::graph::Graph> graph;  // null: refused
        std::int64_t workspace = 0;
    };

    Plan& plan(const AttentionDims& d, Pass pass, bool recorded) {
        const Key key{d.B, d.T, d.NH, d.HS, pass};
        if (recorded && !plans_.contains(key))
            throw Error("cuDNN: a new shape of attention cannot be recorded");
        const auto [it, is_new] = plans_.try_emplace(key);
        Plan& p = it->second;
        if (is_new) {
            try {
                p.graph = build(d, pass);
                p.workspace = p.graph->get_workspace_size();
                reserve(p.workspace);
            } catch (const std::exception& e) {  // the frontend throws errors of its own, too
                refuse(p, d, pass, e.what());
            }
        }
        return p;
    }

    void refuse(Plan& p, const AttentionDims& d, Pass pass, const std::string& why) {
        p.graph = nullptr;
        if (refused_++ == 0)
            first_refusal_ =
                filled("{} with B {}, T {}, {} heads of {}: {}",
                       pass == Pass::forward ? "forward" : "backward", d.B, d.T, d.NH, d.HS, why);
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
        ++workspaces_;
        const cudaError_t error = cudaMalloc(&workspace_, static_cast<std::size_t>(bytes));
        if (error == cudaErrorMemoryAllocation) {
            cudaGetLastError();  // the error is dealt with: the next launch must not find it
            throw Error(filled("out of memory (a workspace of {} MB)", bytes >> 20));
        }
        CUDA_CHECK(error);
        workspace_bytes_ = bytes;
    }

    bool run(const AttentionDims& d, Pass pass, std::unordered_map<std::int64_t, void*> pointers,
             cudaStream_t stream) {
        const bool recorded = is_recorded(stream);
        Plan& p = plan(d, pass, recorded);
        if (!p.graph) return false;
        reserve(p.workspace);
        const cudnnStatus_t status = cudnnSetStream(handle_, stream);
        if (status != CUDNN_STATUS_SUCCESS)
            throw Error(filled("cuDNN: {} (cudnnSetStream)", cudnnGetErrorString(status)));
        const fe::error_object error = p.graph->execute(handle_, pointers, workspace_);
        if (error.is_bad() && recorded)  // which says nothing of the shape
            throw Error(filled("cuDNN: {} (in a recording)", error.err_msg));
        if (error.is_bad()) refuse(p, d, pass, error.err_msg);  // cuDNN refuses some shapes only here
        return error.is_good();
    }

    int device_;
    cudnnHandle_t handle_ = nullptr;
    std::map<Key, Plan> plans_;
    int refused_ = 0;
    std::string first_refusal_;
    void* workspace_ = nullptr;
    std::int64_t workspace_bytes_ = 0, workspaces_ = 0;
};

}  // namespace

std::unique_ptr<CudnnAttention> make_cudnn_attention(int device) {
    return std::make_unique<FrontendAttention>(device);
}

std::string cudnn_status() { return library_status(kCudnn); }

}  // namespace llmc
