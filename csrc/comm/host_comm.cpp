#include "comm/host_comm.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "comm/ordered_sum.h"

namespace llmc {

namespace {

// A buffer of an exchange has about this size at most: long enough for any network, short enough that the sum still
// finds it in a cache.
constexpr std::int64_t kStagingBytes = std::int64_t{8} << 20;
constexpr std::int64_t kAlign = 64;

std::int64_t aligned(std::int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// What ranks tell each other about the collective that they are in.
struct Head {
    std::uint64_t fingerprint;
    char what[120];  // ends with a 0
};

// 64-bit FNV-1a.
class Fingerprint {
  public:
    void add(std::int64_t value) {
        for (int byte = 0; byte < 8; ++byte)
            value_ = (value_ ^ (static_cast<std::uint64_t>(value) >> 8 * byte & 0xff)) * 0x100000001b3u;
    }
    std::uint64_t value() const { return value_; }

  private:
    std::uint64_t value_ = 0xcbf29ce484222325u;
};

std::int64_t total(const std::vector<std::int64_t>& counts) {
    return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}
std::int64_t offset_of(const std::vector<std::int64_t>& counts, int rank) {
    return std::accumulate(counts.begin(), counts.begin() + rank, std::int64_t{0});
}

}  // namespace

void Staging::resize(std::int64_t size) {
    if (size > capacity_) {
        memory_.reset();
        memory_ =
            std::make_unique_for_overwrite<std::byte[]>(static_cast<std::size_t>(std::max(size, kAlign)));
        capacity_ = size;
    }
    size_ = size;
}

// ---- the queue ----

Exchanges::Exchanges(int rank, int size)
    : rank_(rank), size_(size), chunk_(std::max(kStagingBytes / size / kAlign, std::int64_t{1}) * kAlign) {}

Exchanges::~Exchanges() {
    if (moving_)
        for (Staging* memory : {&exchange_.send, &exchange_.receive, &exchange_.head, &exchange_.heads})
            memory->leak();
}

std::int64_t Exchanges::add(Op op, std::vector<Divided> xs, int root, std::vector<double>* values) {
    static constexpr const char* kNames[] = {"all_reduce", "reduce_scatter", "all_gather", "broadcast",
                                             "sum",        "barrier"};
    const std::string name = kNames[static_cast<int>(op)];
    Fingerprint fingerprint;
    fingerprint.add(static_cast<int>(op));
    fingerprint.add(root);
    std::int64_t elements = 0;
    for (const auto& [x, owner] : xs) {
        LLMC_CHECK(is_float(x.dtype) || (op != Op::all_reduce && op != Op::reduce_scatter),
                   "{}: {} is not of floats", name, x);
        LLMC_CHECK(x.data || x.numel() == 0, "{}: {} has no data", name, x);
        fingerprint.add(static_cast<int>(x.dtype));
        fingerprint.add(x.numel());
        fingerprint.add(owner);
        elements += x.numel();
    }
    if (values) fingerprint.add(elements = static_cast<std::int64_t>(values->size()));

    std::unique_lock lock(mutex_);
    throw_if_failed(lock);
    std::string what = filled("{} #{}", name, ++added_);
    if (op == Op::sum)
        what += filled(", {} numbers", elements);
    else if (op != Op::barrier)
        what += filled(", {} tensors, {} elements{}", xs.size(), elements,
                       op == Op::broadcast ? filled(", from rank {}", root) : "");
    jobs_.push_back({op, std::move(xs), values, root, std::move(what), fingerprint.value()});
    changed_.notify_all();
    return added_;
}

void Exchanges::wait(std::int64_t ticket) {
    std::unique_lock lock(mutex_);
    LLMC_CHECK(ticket >= 0 && ticket <= added_, "wait: no collective has the ticket {}", ticket);
    ++awaited_;
    changed_.wait(lock, [&] { return done_ >= ticket || failed_; });
    --awaited_;
    throw_if_failed(lock);
}

void Exchanges::throw_if_failed(std::unique_lock<std::mutex>& lock) {
    if (!failed_) return;
    changed_.wait(lock, [&] { return !touching_; });
    throw Error(error_);
}

const Exchange* Exchanges::next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return closed_ || failed_ || !jobs_.empty(); });
    if (closed_ || failed_) return nullptr;
    LLMC_CHECK(!moving_, "the exchange before is not done yet");
    moving_ = true;
    return touch(lock, &Exchanges::prepare) ? &exchange_ : nullptr;
}

void Exchanges::done() {
    std::unique_lock lock(mutex_);
    LLMC_CHECK(moving_, "there is no exchange that could be done");
    moving_ = false;
    if (closed_ || failed_) return;  // the tensors may be gone
    if (!touch(lock, &Exchanges::finish)) return;
    if (is_last_step(jobs_.front())) {
        jobs_.pop_front();
        ++done_;
        step_ = 0;
    } else {
        ++step_;
    }
    changed_.notify_all();
}

bool Exchanges::touch(std::unique_lock<std::mutex>& lock, void (Exchanges::*step)(const Job&)) {
    touching_ = true;
    const Job& job = jobs_.front();  // stays where it is when others are added
    lock.unlock();
    std::string error;
    try {
        (this->*step)(job);
    } catch (const std::exception& e) {  // no memory
        error = filled("{}: {}", job.what, e.what());
    }
    lock.lock();
    touching_ = false;
    if (!error.empty()) set_failed(error);
    changed_.notify_all();
    return error.empty();
}

void Exchanges::fail(const std::string& message) {
    const std::lock_guard lock(mutex_);
    set_failed(message);
    changed_.notify_all();
}

void Exchanges::set_failed(const std::string& message) {
    if (!failed_) error_ = message;
    failed_ = true;
}

bool Exchanges::ended() const {
    const std::lock_guard lock(mutex_);
    return closed_ || failed_;
}

bool Exchanges::idle() const {
    const std::lock_guard lock(mutex_);
    return done_ == added_;
}

void Exchanges::close() {
    {
        const std::lock_guard lock(mutex_);
        closed_ = true;
        changed_.notify_all();
    }
    let_go();
}

void Exchanges::let_go() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !touching_; });
}

// ---- an exchange ----

std::int64_t Exchanges::pieces_bytes(const Job& job, int rank, int ranks) const {
    std::int64_t bytes = 0;
    for (const Divided& x : job.xs) bytes += aligned(x.piece(rank, ranks).size() * size_of(x.tensor.dtype));
    return bytes;
}

// Of the rank that has the most.
std::int64_t Exchanges::chunks(const Job& job) const {
    const int ranks = job.op == Op::broadcast ? 1 : size_;
    std::int64_t most = 1;
    for (int r = 0; r < ranks; ++r) most = std::max(most, pieces_bytes(job, r, ranks));
    return (most + chunk_ - 1) / chunk_;
}

bool Exchanges::is_last_step(const Job& job) const {
    return step_ + 1 == chunks(job) * (job.op == Op::all_reduce ? 2 : 1);
}

// Whether this step gathers pieces; an all_reduce does in its second half.
bool Exchanges::gathers(const Job& job) const {
    return job.op == Op::all_gather || (job.op == Op::all_reduce && step_ >= chunks(job));
}

// By rank, the bytes of this step's chunk.
std::vector<std::int64_t> Exchanges::chunk_bytes(const Job& job, int ranks) const {
    const std::int64_t begin = step_ % chunks(job) * chunk_;
    std::vector<std::int64_t> bytes;
    for (int r = 0; r < ranks; ++r)
        bytes.push_back(std::clamp(pieces_bytes(job, r, ranks) - begin, std::int64_t{0}, chunk_));
    return bytes;
}

// Calls visit(x, elements, offset) for what lies in this step's chunk of the rank's pieces: these elements of x, in order,
// from this offset of the chunk on.
template <class Visit>
void Exchanges::visit_chunk(const Job& job, int rank, int ranks, Visit&& visit) const {
    const std::int64_t begin = step_ % chunks(job) * chunk_, end = begin + chunk_;
    std::int64_t at = 0;
    for (const Divided& x : job.xs) {
        const Range piece = x.piece(rank, ranks);
        const std::int64_t width = size_of(x.tensor.dtype), bytes = piece.size() * width;
        const std::int64_t first = std::max(begin, at), last = std::min(end, at + bytes);
        if (first < last)
            visit(x.tensor, Range{piece.begin + (first - at) / width, piece.begin + (last - at) / width},
                  first - begin);
        at += aligned(bytes);
    }
}

// Between the tensors and the staging memory.
void Exchanges::copy_chunk(const Job& job, int rank, int ranks, std::byte* staging, bool out) const {
    visit_chunk(job, rank, ranks, [&](const Tensor& x, Range elements, std::int64_t offset) {
        std::byte* const tensor = x.as<std::byte>() + elements.begin * size_of(x.dtype);
        const auto bytes = static_cast<std::size_t>(elements.size() * size_of(x.dtype));
        out ? std::memcpy(tensor, staging + offset, bytes) : std::memcpy(staging + offset, tensor, bytes);
    });
}

void Exchanges::prepare(const Job& job) {
    Exchange& e = exchange_;
    e.what = job.what;
    e.root = job.root;
    e.send_counts.assign(static_cast<std::size_t>(size_), 0);
    e.receive_counts = e.send_counts;
    e.has_heads = step_ == 0;
    if (e.has_heads) {
        Head head{job.fingerprint, {}};
        job.what.copy(head.what, sizeof head.what - 1);
        e.head.resize(sizeof head);
        e.heads.resize(sizeof head * size_);
        std::memcpy(e.head.data(), &head, sizeof head);
    }

    const auto own = static_cast<std::size_t>(rank_);
    std::int64_t bytes = 0;  // to other ranks
    if (job.op == Op::barrier) {
        e.kind = Exchange::Kind::barrier;
    } else if (job.op == Op::sum) {
        e.kind = Exchange::Kind::all_gather;
        const auto each = static_cast<std::int64_t>(job.values->size() * sizeof(double));
        e.receive_counts.assign(static_cast<std::size_t>(size_), each);
        e.receive.resize(each * size_);
        if (each)
            std::memcpy(e.receive.data() + each * rank_, job.values->data(), static_cast<std::size_t>(each));
        bytes = each * (size_ - 1);
    } else if (job.op == Op::broadcast) {
        e.kind = Exchange::Kind::broadcast;
        e.receive.resize(chunk_bytes(job, 1)[0]);
        if (rank_ == job.root) {
            copy_chunk(job, 0, 1, e.receive.data(), false);
            bytes = e.receive.size() * (size_ - 1);
        }
    } else if (gathers(job)) {
        e.kind = Exchange::Kind::all_gather;
        e.receive_counts = chunk_bytes(job, size_);
        e.receive.resize(total(e.receive_counts));
        copy_chunk(job, rank_, size_, e.receive.data() + offset_of(e.receive_counts, rank_), false);
        bytes = e.receive_counts[own] * (size_ - 1);
    } else {
        e.kind = Exchange::Kind::all_to_all;
        e.send_counts = chunk_bytes(job, size_);
        e.receive_counts.assign(static_cast<std::size_t>(size_), e.send_counts[own]);
        e.send_counts[own] = e.receive_counts[own] = 0;
        bytes = total(e.send_counts);
        e.send.resize(bytes);
        e.receive.resize(total(e.receive_counts));
        for (int r = 0; r < size_; ++r)
            if (r != rank_) copy_chunk(job, r, size_, e.send.data() + offset_of(e.send_counts, r), false);
    }
    if (e.kind != Exchange::Kind::all_to_all) e.send.resize(0);
    if (e.kind == Exchange::Kind::barrier) e.receive.resize(0);
    bytes_sent_ += bytes;
}

void Exchanges::check() const {
    if (!exchange_.has_heads) return;
    std::vector<Head> heads(static_cast<std::size_t>(size_));
    std::memcpy(heads.data(), exchange_.heads.data(), sizeof(Head) * heads.size());
    const Head& first = heads[0];
    for (std::size_t r = 1; r < heads.size(); ++r) {
        Head& other = heads[r];
        if (other.fingerprint == first.fingerprint) continue;
        other.what[sizeof other.what - 1] = 0;
        if (std::strcmp(first.what, other.what) == 0)
            throw Error(filled("ranks 0 and {} bring different tensors to {}", r, first.what));
        throw Error(filled("ranks disagree: rank 0 is in {}; rank {} is in {}", first.what, r, other.what));
    }
}

void Exchanges::finish(const Job& job) {
    const Exchange& e = exchange_;
    if (job.op == Op::sum) {
        for (std::size_t i = 0; i < job.values->size(); ++i) {
            (*job.values)[i] = 0.0;
            for (int r = 0; r < size_; ++r) {
                double x;
                std::memcpy(&x, e.receive.data() + offset_of(e.receive_counts, r) + i * sizeof x, sizeof x);
                (*job.values)[i] += x;
            }
        }
    } else if (job.op == Op::broadcast) {
        if (rank_ != job.root) copy_chunk(job, 0, 1, e.receive.data(), true);
    } else if (gathers(job)) {
        for (int r = 0; r < size_; ++r)
            if (r != rank_)
                copy_chunk(job, r, size_, e.receive.data() + offset_of(e.receive_counts, r), true);
    } else if (job.op != Op::barrier) {
        sum_chunk(job);
    }
}

// This rank's own summand is still where the sum will be.
void Exchanges::sum_chunk(const Job& job) {
    const Exchange& e = exchange_;
    visit_chunk(job, rank_, size_, [&](const Tensor& x, Range elements, std::int64_t offset) {
        const auto sum_as = [&]<class T>(T* out) {
            std::vector<const T*> parts;
            for (int r = 0; r < size_; ++r) {
                const std::byte* part = e.receive.data() + offset_of(e.receive_counts, r) + offset;
                parts.push_back(r == rank_ ? out : reinterpret_cast<const T*>(part));
            }
            ordered_sum(out, parts, elements.size());
        };
        x.dtype == DType::f32 ? sum_as(x.as<float>() + elements.begin)
                              : sum_as(x.as<bf16>() + elements.begin);
    });
}

// ---- HostComm ----

HostComm::HostComm(std::shared_ptr<Backend> backend, int rank, int size)
    : backend_(std::move(backend)), rank_(rank), size_(size) {
    LLMC_CHECK(backend_ != nullptr, "the backend is None");
    LLMC_CHECK(size > 0 && rank >= 0 && rank < size, "rank {} of {}", rank, size);
    LLMC_CHECK(backend_->info().name == "cpu", "HostComm is for the CPU's memory, not that of {}",
               backend_->info().name);
    exchanges_.reset(new Exchanges(rank, size));
}

HostComm::~HostComm() { exchanges_->close(); }

Comm::Ticket HostComm::all_reduce(const std::vector<Tensor>& xs) {
    return last_ = exchanges_->add(Exchanges::Op::all_reduce, {xs.begin(), xs.end()}, 0, nullptr);
}
Comm::Ticket HostComm::reduce_scatter(const std::vector<Divided>& xs) {
    check_owners("reduce_scatter", xs);
    return last_ = exchanges_->add(Exchanges::Op::reduce_scatter, xs, 0, nullptr);
}
Comm::Ticket HostComm::all_gather(const std::vector<Divided>& xs) {
    check_owners("all_gather", xs);
    return last_ = exchanges_->add(Exchanges::Op::all_gather, xs, 0, nullptr);
}
Comm::Ticket HostComm::broadcast(const std::vector<Tensor>& xs, int root) {
    LLMC_CHECK(root >= 0 && root < size_, "broadcast: root is {} of {} ranks", root, size_);
    return last_ = exchanges_->add(Exchanges::Op::broadcast, {xs.begin(), xs.end()}, root, nullptr);
}
void HostComm::wait(Ticket ticket) { exchanges_->wait(ticket); }
void HostComm::sum(std::vector<double>& x) { wait(last_ = exchanges_->add(Exchanges::Op::sum, {}, 0, &x)); }
void HostComm::barrier() { wait(last_ = exchanges_->add(Exchanges::Op::barrier, {}, 0, nullptr)); }

void HostComm::give_up(const std::string& why) {
    exchanges_->fail(why);
    exchanges_->let_go();
}

}  // namespace llmc
