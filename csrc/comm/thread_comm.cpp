// Comm between threads of one process. In a collective every rank publishes its tensors and waits for the
// others. All of them check alike whether the tensors fit together. Then rank r computes its piece of the result
// from the tensors of all ranks and stores it where it is wanted. Then they wait for each other once more, and
// each rank may use its own tensors again.
#include <condition_variable>
#include <cstring>
#include <mutex>

#include "comm/comm.h"
#include "comm/ordered_sum.h"

namespace llmc {

namespace {

// What a rank brings to a collective.
struct Operands {
    Operands() = default;
    explicit Operands(std::string op, std::vector<Divided> xs = {}) : op(std::move(op)), xs(std::move(xs)) {}

    std::string op;
    std::vector<Divided> xs;
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
    const std::shared_ptr<Backend>& backend_owner() const override { return backend_; }

    Ticket all_reduce(const std::vector<Tensor>& xs) override {
        return collective(of_floats("all_reduce", {xs.begin(), xs.end()}), [&] {
            for (std::size_t i = 0; i < xs.size(); ++i) sum(i, piece_of(xs[i].numel(), rank_, size_), true);
        });
    }
    Ticket reduce_scatter(const std::vector<Divided>& xs) override {
        return collective(of_floats("reduce_scatter", xs), [&] {
            for (std::size_t i = 0; i < xs.size(); ++i) sum(i, xs[i].piece(rank_, size_), false);
        });
    }
    Ticket all_gather(const std::vector<Divided>& xs) override {
        return collective(owned("all_gather", xs), [&] {
            for (std::size_t i = 0; i < xs.size(); ++i) store(i, xs[i].piece(rank_, size_));
        });
    }
    Ticket broadcast(const std::vector<Tensor>& xs, int root) override {
        Operands mine("broadcast", {xs.begin(), xs.end()});
        mine.root = root;
        if (root < 0 || root >= size_) mine.error = filled("broadcast: root is {} of {} ranks", root, size_);
        return collective(std::move(mine), [&] {
            for (std::size_t i = 0; rank_ == root && i < xs.size(); ++i) store(i, {0, xs[i].numel()});
        });
    }
    using Comm::wait;
    void wait(Ticket) override {}

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
    Ticket collective(Operands operands, Body&& body) {
        Operands& mine = meeting_->published[static_cast<std::size_t>(rank_)];
        mine = std::move(operands);
        meeting_->wait();
        const std::string own = mine.error, verdict = judge();
        if (verdict.empty()) body();
        meeting_->wait();
        mine = Operands();
        if (!own.empty()) throw ArgumentError(own);
        if (!verdict.empty()) throw ArgumentError(verdict);
        return ++last_;
    }

    // Why the collective is impossible, in the same words on every rank; empty if it is possible.
    std::string judge() const {
        const Operands& first = meeting_->published[0];
        for (std::size_t r = 0; r < meeting_->published.size(); ++r) {
            const Operands& other = meeting_->published[r];
            if (!other.error.empty()) return filled("rank {}: {}", r, other.error);
            if (other.op != first.op) return filled("rank 0 is in {}, rank {} in {}", first.op, r, other.op);
            bool alike = other.xs.size() == first.xs.size() && other.values.size() == first.values.size() &&
                         other.root == first.root;
            for (std::size_t i = 0; alike && i < first.xs.size(); ++i)
                alike = other.xs[i].tensor.dtype == first.xs[i].tensor.dtype &&
                        other.xs[i].tensor.is_like(first.xs[i].tensor) &&
                        other.xs[i].owner == first.xs[i].owner;
            if (!alike) return filled("{}: ranks 0 and {} bring different arguments", first.op, r);
        }
        return {};
    }

    // The sum over the ranks of some elements of tensor i, to all ranks or to this one.
    void sum(std::size_t i, Range range, bool to_all) {
        tensor(0, i).dtype == DType::f32 ? sum_as<float>(i, range) : sum_as<bf16>(i, range);
        if (to_all) store(i, range);
    }
    template <class T>
    void sum_as(std::size_t i, Range range) {
        std::vector<const T*> parts;
        for (int r = 0; r < size_; ++r) parts.push_back(tensor(r, i).as<T>() + range.begin);
        ordered_sum(tensor(rank_, i).as<T>() + range.begin, parts, range.size());
    }
    // Some elements of this rank's tensor i, to all other ranks.
    void store(std::size_t i, Range range) {
        const Tensor& x = tensor(rank_, i);
        const std::int64_t begin = range.begin * size_of(x.dtype), bytes = range.size() * size_of(x.dtype);
        for (int r = 0; r < size_; ++r)
            if (tensor(r, i).data != x.data)
                std::memcpy(tensor(r, i).as<char>() + begin, x.as<char>() + begin,
                            static_cast<std::size_t>(bytes));
    }
    // Tensor i of a rank.
    const Tensor& tensor(int rank, std::size_t i) const {
        return meeting_->published[static_cast<std::size_t>(rank)].xs[i].tensor;
    }

    Operands owned(const char* op, const std::vector<Divided>& xs) const {
        Operands mine(op, xs);
        try {
            check_owners(op, xs);
        } catch (const ArgumentError& e) {
            mine.error = e.what();
        }
        return mine;
    }
    Operands of_floats(const char* op, const std::vector<Divided>& xs) const {
        Operands mine = owned(op, xs);
        for (const Divided& x : xs)
            if (!is_float(x.tensor.dtype)) mine.error = filled("{}: {} is not of floats", op, x.tensor);
        return mine;
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
