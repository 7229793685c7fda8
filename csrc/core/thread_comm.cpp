// Comm between threads of one process. A collective: every rank publishes its tensors and meets the others;
// then rank r computes the r-th stripe of the result from all tensors and stores it into all of them; then
// they meet again, and the tensors are their owners' once more.
#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>

#include "core/comm.h"

namespace llmc {

namespace {

class Meeting {
  public:
    explicit Meeting(int size) : published(static_cast<std::size_t>(size)), size_(size) {}

    // Returns when all ranks have come.
    void wait() {
        std::unique_lock lock(mutex_);
        const std::int64_t round = round_;
        if (++here_ == size_) {
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

    struct Operands {
        std::vector<Tensor> out, in;
        std::vector<double> values;
    };
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
    ThreadComm(std::shared_ptr<Meeting> meeting, int rank, int size)
        : meeting_(std::move(meeting)), rank_(rank), size_(size) {}
    ~ThreadComm() override { meeting_->leave(); }

    int rank() const override { return rank_; }
    int size() const override { return size_; }

    void all_reduce(const std::vector<Tensor>& xs) override {
        for (const Tensor& x : xs) check_float("all_reduce", x);
        collective("all_reduce", xs, xs, [&](std::size_t i) {
            const std::int64_t n = xs[i].numel();
            sum(i, n * rank_ / size_, n * (rank_ + 1) / size_, true);
        });
    }
    void reduce_scatter(Tensor shard, Tensor full) override {
        check_pieces("reduce_scatter", full, shard);
        check_float("reduce_scatter", full);
        const std::int64_t n = shard.numel();
        collective("reduce_scatter", {shard}, {full},
                   [&](std::size_t i) { sum(i, n * rank_, n * (rank_ + 1), false); });
    }
    void all_gather(Tensor full, Tensor shard) override {
        check_pieces("all_gather", full, shard);
        collective("all_gather", {full}, {shard}, [&](std::size_t i) {
            for (const auto& other : meeting_->published)
                std::memcpy(other.out[i].as<char>() + rank_ * shard.bytes(), shard.data,
                            static_cast<std::size_t>(shard.bytes()));
        });
    }
    void broadcast(Tensor x, int root) override {
        LLMC_CHECK(root >= 0 && root < size_, "broadcast: root is {} of {} ranks", root, size_);
        collective("broadcast", {x}, {x}, [&](std::size_t i) {
            if (rank_ != root) return;
            for (const auto& other : meeting_->published)
                if (other.out[i].data != x.data)
                    std::memcpy(other.out[i].data, x.data, static_cast<std::size_t>(x.bytes()));
        });
    }
    void wait() override {}

    void sum(std::vector<double>& x) override {
        mine().values = x;
        meeting_->wait();
        std::fill(x.begin(), x.end(), 0.0);
        bool alike = true;
        for (const auto& other : meeting_->published) {
            alike = alike && other.values.size() == x.size();
            for (std::size_t i = 0; alike && i < x.size(); ++i) x[i] += other.values[i];
        }
        meeting_->wait();
        LLMC_CHECK(alike, "sum: the ranks have different numbers of values");
    }
    void barrier() override { meeting_->wait(); }

  private:
    Meeting::Operands& mine() { return meeting_->published[static_cast<std::size_t>(rank_)]; }

    template <class Body>
    void collective(const char* op, const std::vector<Tensor>& out, const std::vector<Tensor>& in,
                    Body&& body) {
        mine().out = out, mine().in = in;
        meeting_->wait();
        // Every rank comes to the same verdict, so that none is left waiting for one that gave up.
        const auto& first = meeting_->published[0];
        bool alike = true;
        for (const auto& other : meeting_->published) {
            alike = alike && other.in.size() == first.in.size();
            for (std::size_t i = 0; alike && i < first.in.size(); ++i)
                alike = other.in[i].dtype == first.in[i].dtype && other.in[i].is_like(first.in[i]);
        }
        for (std::size_t i = 0; alike && i < in.size(); ++i) body(i);
        meeting_->wait();
        LLMC_CHECK(alike, "{}: the ranks have different tensors", op);
    }

    // Elements [begin, end) of tensor i, over all ranks, to all ranks or to this one's shard.
    void sum(std::size_t i, std::int64_t begin, std::int64_t end, bool to_all) {
        mine().in[i].dtype == DType::f32 ? sum_as<float>(i, begin, end, to_all)
                                         : sum_as<bf16>(i, begin, end, to_all);
    }
    template <class T>
    void sum_as(std::size_t i, std::int64_t begin, std::int64_t end, bool to_all) {
        const auto& ranks = meeting_->published;
        for (std::int64_t k = begin; k < end; ++k) {
            float total = 0.0f;
            for (const auto& r : ranks) total += to_float(r.in[i].as<T>()[k]);
            if (to_all)
                for (const auto& r : ranks) r.out[i].as<T>()[k] = from_float<T>(total);
            else
                mine().out[i].as<T>()[k - begin] = from_float<T>(total);
        }
    }

    static void check_float(const char* op, const Tensor& x) {
        LLMC_CHECK(is_float(x.dtype), "{}: {} is not of floats", op, x);
    }
    void check_pieces(const char* op, const Tensor& full, const Tensor& shard) const {
        LLMC_CHECK(full.dtype == shard.dtype && full.numel() == size_ * shard.numel(),
                   "{}: full is {} and shard is {} for {} ranks", op, full, shard, size_);
    }

    std::shared_ptr<Meeting> meeting_;
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
        LLMC_CHECK(backend->info().name == "cpu", "threads share the CPU's memory, not that of {}",
                   backend->info().name);
        ranks.push_back(std::make_shared<ThreadComm>(meeting, rank, size));
    }
    return ranks;
}

}  // namespace llmc
