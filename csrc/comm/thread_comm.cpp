// Comm between threads of one process. In a collective every rank publishes its tensors and waits for the
// others. All of them check alike whether the tensors fit together. Then rank r computes the r-th stripe of
// the result from the tensors of all ranks and stores it into all of them. Then they wait for each other once
// more, and each rank may use its own tensors again.
#include <condition_variable>
#include <cstring>
#include <mutex>

#include "comm/comm.h"

namespace llmc {

namespace {

// What a rank brings to a collective.
struct Operands {
    Operands() = default;
    explicit Operands(std::string op, std::vector<Tensor> out = {}, std::vector<Tensor> in = {})
        : op(std::move(op)), out(std::move(out)), in(std::move(in)) {}

    std::string op;
    std::vector<Tensor> out, in;
    std::vector<double> values;
    int root = 0;
    std::string error;  // what it found wrong with its own
};

class Meeting {
  public:
    explicit Meeting(int size) : published(static_cast<std::size_t>(size)), size_(size) {}

    // Returns when all ranks have come.
    void wait() {
        std::unique_lock lock(mutex_);
        const std::int64_t round = round_;
        if (!left_ && ++here_ == size_) {
            here_ = 0;
            ++round_;
            changed_.notify_all();
        } else {
            changed_.wait(lock, [&] { return round_ != round || left_; });
        }
        if (round_ == round) throw Error("a rank has left: its thread ended, or dropped its Comm");
    }

    void leave() {
        const std::lock_guard lock(mutex_);
        left_ = true;
        changed_.notify_all();
    }

    std::vector<Operands> published;  // by rank

  private:
    const int size_;
    int here_ = 0;
    std::int64_t round_ = 0;
    bool left_ = false;
    std::mutex mutex_;
    std::condition_variable changed_;
};

class ThreadComm final : public Comm {
  public:
    ThreadComm(std::shared_ptr<Meeting> meeting, std::shared_ptr<Backend> backend, int rank, int size)
        : meeting_(std::move(meeting)), backend_(std::move(backend)), rank_(rank), size_(size) {}
    ~ThreadComm() override { meeting_->leave(); }

    int rank() const override { return rank_; }
    int size() const override { return size_; }
    Backend& backend() const override { return *backend_; }

    void all_reduce(const std::vector<Tensor>& xs) override {
        Operands mine("all_reduce", xs, xs);
        for (const Tensor& x : xs) check_float(mine, x);
        collective(std::move(mine), [&] {
            for (std::size_t i = 0; i < xs.size(); ++i) {
                const std::int64_t n = xs[i].numel();
                sum(i, n * rank_ / size_, n * (rank_ + 1) / size_, true);
            }
        });
    }
    void reduce_scatter(Tensor shard, Tensor full) override {
        Operands mine("reduce_scatter", {shard}, {full});
        check_float(mine, full);
        check_pieces(mine, full, shard);
        const std::int64_t n = shard.numel();
        collective(std::move(mine), [&] { sum(0, n * rank_, n * (rank_ + 1), false); });
    }
    void all_gather(Tensor full, Tensor shard) override {
        Operands mine("all_gather", {full}, {shard});
        check_pieces(mine, full, shard);
        collective(std::move(mine), [&] {
            for (const Operands& other : meeting_->published)
                std::memcpy(other.out[0].as<char>() + rank_ * shard.bytes(), shard.data,
                            static_cast<std::size_t>(shard.bytes()));
        });
    }
    void broadcast(Tensor x, int root) override {
        Operands mine("broadcast", {x}, {x});
        mine.root = root;
        if (root < 0 || root >= size_) mine.error = filled("broadcast: root is {} of {} ranks", root, size_);
        collective(std::move(mine), [&] {
            if (rank_ != root) return;
            for (const Operands& other : meeting_->published)
                if (other.out[0].data != x.data)
                    std::memcpy(other.out[0].data, x.data, static_cast<std::size_t>(x.bytes()));
        });
    }
    void wait() override {}

    void sum(std::vector<double>& x) override {
        Operands mine("sum");
        mine.values = x;
        collective(std::move(mine), [&] {
            for (std::size_t i = 0; i < x.size(); ++i) {
                x[i] = 0.0;
                for (const Operands& other : meeting_->published) x[i] += other.values[i];
            }
        });
    }
    void barrier() override {
        collective(Operands("barrier"), [] {});
    }

  private:
    template <class Body>
    void collective(Operands operands, Body&& body) {
        Operands& mine = meeting_->published[static_cast<std::size_t>(rank_)];
        mine = std::move(operands);
        meeting_->wait();
        const std::string own = mine.error, verdict = judge();
        if (verdict.empty()) body();
        meeting_->wait();
        mine = Operands();
        if (!own.empty()) throw ArgumentError(own);
        if (!verdict.empty()) throw ArgumentError(verdict);
    }

    // Why the collective is impossible, in the same words on every rank; empty if it is possible.
    std::string judge() const {
        const Operands& first = meeting_->published[0];
        for (std::size_t r = 0; r < meeting_->published.size(); ++r) {
            const Operands& other = meeting_->published[r];
            if (!other.error.empty()) return filled("rank {}: {}", r, other.error);
            if (other.op != first.op) return filled("rank 0 is in {}, rank {} in {}", first.op, r, other.op);
            bool alike = other.in.size() == first.in.size() && other.values.size() == first.values.size() &&
                         other.root == first.root;
            for (std::size_t i = 0; alike && i < first.in.size(); ++i)
                alike = other.in[i].dtype == first.in[i].dtype && other.in[i].is_like(first.in[i]);
            if (!alike) return filled("{}: ranks 0 and {} bring different arguments", first.op, r);
        }
        return {};
    }

    // Elements [begin, end) of tensor i, over all ranks, to all ranks or to this one's shard.
    void sum(std::size_t i, std::int64_t begin, std::int64_t end, bool to_all) {
        const DType dtype = meeting_->published[0].in[i].dtype;
        dtype == DType::f32 ? sum_as<float>(i, begin, end, to_all) : sum_as<bf16>(i, begin, end, to_all);
    }
    template <class T>
    void sum_as(std::size_t i, std::int64_t begin, std::int64_t end, bool to_all) {
        const auto& ranks = meeting_->published;
        T* const shard = ranks[static_cast<std::size_t>(rank_)].out[i].template as<T>();
        for (std::int64_t k = begin; k < end; ++k) {
            float total = 0.0f;
            for (const Operands& r : ranks) total += to_float(r.in[i].template as<T>()[k]);
            if (to_all)
                for (const Operands& r : ranks) r.out[i].template as<T>()[k] = from_float<T>(total);
            else
                shard[k - begin] = from_float<T>(total);
        }
    }

    static void check_float(Operands& mine, const Tensor& x) {
        if (!is_float(x.dtype)) mine.error = filled("{}: {} is not of floats", mine.op, x);
    }
    void check_pieces(Operands& mine, const Tensor& full, const Tensor& shard) const {
        if (full.dtype != shard.dtype || full.numel() != size_ * shard.numel())
            mine.error = filled("{}: full is {} and shard is {} for {} ranks", mine.op, full, shard, size_);
    }

    std::shared_ptr<Meeting> meeting_;
    std::shared_ptr<Backend> backend_;
    int rank_, size_;
};

}  // namespace

std::vector<std::shared_ptr<Comm>> make_thread_comms(const std::vector<std::shared_ptr<Backend>>& backends) {
    const int size = static_cast<int>(backends.size());
    LLMC_CHECK(size > 0, "no backend, expected one per rank");
    const auto meeting = std::make_shared<Meeting>(size);
    std::vector<std::shared_ptr<Comm>> ranks;
    for (int rank = 0; rank < size; ++rank) {
        const auto& backend = backends[static_cast<std::size_t>(rank)];
        LLMC_CHECK(backend != nullptr, "the backend of rank {} is None", rank);
        LLMC_CHECK(backend->info().name == "cpu", "threads share the CPU's memory, not that of {}",
                   backend->info().name);
        for (const auto& other : ranks)
            LLMC_CHECK(&other->backend() != backend.get(), "ranks {} and {} have the same backend",
                       other->rank(), rank);
        ranks.push_back(std::make_shared<ThreadComm>(meeting, backend, rank, size));
    }
    return ranks;
}

}  // namespace llmc
