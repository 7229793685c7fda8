// A stand-in for NCCL's library, for tests on the emulated device: ranks are processes of one machine, and their data go through
// a file that every rank maps, and the last to come unlinks. The id is its name, in the folder LLMC_EMULATION_SHARED; by default
// that of shared memory.
//
// A group of collectives is done in rounds, each of what fits into a slot: every rank puts its operands into its slot, waits for
// the others' and computes what it is to receive, adding in the order of ranks in f32. Ranks that bring different collectives are
// a bug of the program under test, on which NCCL would hang or compute nonsense: here the process aborts and says so.
//
// What makes NCCL hard to use is kept: only blocking=0; a communicator that is not ready yet, and is told so by
// CommGetAsyncError; every other group is launched only after some such calls, and nothing may be called before that; a rank
// that has died leaves the others' streams hanging, until CommAbort. (NCCL reports such ranks only of other machines.)
#include <fcntl.h>
#include <nccl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int kMaxRanks = 16;
constexpr std::size_t kSlotBytes = std::size_t{1} << 20;

// The beginning of the file; the ranks' slots follow. A new file holds zeros.
struct Board {
    std::atomic<int> size;  // what the first rank said
    std::atomic<int> here;
    struct alignas(64) Rank {
        std::atomic<bool> here, left;
        // Rounds whose operands are in its slot, and rounds for which it needs no slot any more.
        std::atomic<std::uint64_t> published, consumed;
        std::uint64_t signature;  // of the round
    } ranks[kMaxRanks];
};

enum class Kind { all_reduce, reduce, reduce_scatter, all_gather, broadcast };

struct Collective {
    Kind kind;
    const char* send;
    char* receive;
    std::size_t count;
    ncclDataType_t type;
    int root;
};
std::size_t bytes_of(ncclDataType_t type) {
    switch (type) {
    case ncclInt8: return 1;
    case ncclBfloat16: return 2;
    case ncclFloat32: return 4;
    case ncclFloat64: return 8;
    }
    return 0;
}

float to_float(float x) { return x; }
float to_float(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t{x} << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
void from_float(float& to, float x) { to = x; }
void from_float(std::uint16_t& to, float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to = static_cast<std::uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

struct ncclComm {
    int rank = 0, size = 0;
    int file = -1;
    std::string name;
    Board* board = nullptr;
    char* slots = nullptr;
    std::atomic<ncclResult_t> error = ncclSuccess;
    std::string error_text;  // written before `error`
    std::atomic<bool> aborted = false;
    std::uint64_t rounds = 0;  // of all groups so far
    // A group that was not launched at once, by the thread that ended it.
    std::function<void()> delayed;
    std::atomic<int> delay = 0;
    std::thread::id launcher;
    std::uint64_t groups = 0;

    ~ncclComm() {
        if (board) {
            board->ranks[rank].left = true;
            if (board->here < size) unlink(name.c_str());
            munmap(board, file_bytes(size));
        }
        if (file >= 0) close(file);
    }
    static std::size_t file_bytes(int size) {
        return sizeof(Board) + kSlotBytes * static_cast<std::size_t>(size);
    }
    char* slot(int r) const { return slots + kSlotBytes * static_cast<std::size_t>(r); }
    void fail(ncclResult_t result, const std::string& text) {
        if (error != ncclSuccess) return;
        error_text = text;
        error = result;
    }
    // A rank holds a lock on its byte of the file while it lives.
    struct flock byte_lock(int r) const {
        struct flock lock{};
        lock.l_type = F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = r;
        lock.l_len = 1;
        return lock;
    }
    bool is_gone(int r) const {
        struct flock lock = byte_lock(r);
        return board->ranks[r].left || (fcntl(file, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK);
    }
    ncclResult_t join(const char* id) {
        const char* const folder = std::getenv("LLMC_EMULATION_SHARED");
        name = std::string(folder ? folder : "/dev/shm") + "/" + id;
        file = open(name.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
        if (file < 0 || ftruncate(file, static_cast<off_t>(file_bytes(size))) != 0) return ncclSystemError;
        struct flock lock = byte_lock(rank);
        if (fcntl(file, F_SETLK, &lock) != 0) return ncclInvalidUsage;
        void* const memory = mmap(nullptr, file_bytes(size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (memory == MAP_FAILED) return ncclSystemError;
        board = static_cast<Board*>(memory);
        slots = static_cast<char*>(memory) + sizeof(Board);
        int first = 0;
        if (!board->size.compare_exchange_strong(first, size) && first != size) return ncclInvalidUsage;
        if (board->ranks[rank].here.exchange(true)) return ncclInvalidUsage;
        if (++board->here == size) unlink(name.c_str());
        return ncclSuccess;
    }
    ncclResult_t state() {
        if (error != ncclSuccess) return error;
        if (board->here < size) return ncclInProgress;
        if (delay == 0) return ncclSuccess;
        if (std::this_thread::get_id() != launcher || --delay > 0) return ncclInProgress;
        std::exchange(delayed, nullptr)();
        return ncclSuccess;
    }
};

namespace {

// The collectives of a group, in a stream.
class Group {
  public:
    Group(std::shared_ptr<ncclComm> comm, const std::vector<Collective>& collectives)
        : comm_(std::move(comm)), rounds_(1) {
        std::size_t used = 0;
        for (const Collective& c : collectives) {
            const std::size_t item = bytes_of(c.type);
            const std::size_t n =
                c.count * (c.kind == Kind::reduce_scatter ? static_cast<std::size_t>(comm_->size) : 1);
            for (std::size_t begin = 0; begin < n;) {
                if (used + item > kSlotBytes) {
                    rounds_.emplace_back();
                    used = 0;
                }
                const std::size_t end = std::min(n, begin + (kSlotBytes - used) / item);
                rounds_.back().push_back({c, begin, end, used});
                used = (used + (end - begin) * item + 15) / 16 * 16;
                begin = end;
            }
        }
        first_ = comm_->rounds;
        comm_->rounds += rounds_.size();
    }

    // Goes on as far as it can without waiting. True if it is finished.
    bool operator()() {
        Board::Rank& self = comm_->board->ranks[comm_->rank];
        while (done_ < rounds_.size()) {
            if (comm_->aborted) return true;
            const std::uint64_t number = first_ + done_ + 1;
            if (self.published < number) {
                if (!all([&](const Board::Rank& r) { return r.consumed >= number - 1; })) return false;
                for (const Part& p : rounds_[done_]) put(p);
                self.signature = signature();
                self.published = number;
            }
            if (!all([&](const Board::Rank& r) { return r.published >= number; })) return false;
            compare_signatures();
            for (const Part& p : rounds_[done_]) compute(p);
            self.consumed = number;
            ++done_;
        }
        return true;
    }

  private:
    // Elements of a collective, all ranks' one after another if it is a reduce_scatter; and where they lie in the slot.
    struct Part {
        Collective of;
        std::size_t begin, end, place;
    };

    template <class Condition>
    bool all(Condition&& condition) {
        for (int r = 0; r < comm_->size; ++r)
            if (!condition(comm_->board->ranks[r])) {
                if (++waits_ % 64 == 0 && comm_->is_gone(r) && !condition(comm_->board->ranks[r]))
                    comm_->fail(ncclRemoteError, "rank " + std::to_string(r) + " has left");
                return false;
            }
        return true;
    }
    void put(const Part& p) {
        const std::size_t item = bytes_of(p.of.type);
        if (p.of.kind != Kind::broadcast || p.of.root == comm_->rank)
            std::memcpy(comm_->slot(comm_->rank) + p.place, p.of.send + p.begin * item,
                        (p.end - p.begin) * item);
    }
    void compute(const Part& p) {
        const std::size_t item = bytes_of(p.of.type), bytes = (p.end - p.begin) * item;
        char* const out = p.of.receive + p.begin * item;
        switch (p.of.kind) {
        case Kind::broadcast: std::memcpy(out, comm_->slot(p.of.root) + p.place, bytes); break;
        case Kind::all_gather:
            for (int r = 0; r < comm_->size; ++r)
                std::memcpy(out + static_cast<std::size_t>(r) * p.of.count * item, comm_->slot(r) + p.place,
                            bytes);
            break;
        case Kind::reduce:
            if (p.of.root != comm_->rank) break;
            [[fallthrough]];
        case Kind::all_reduce: sum(p, p.begin, p.end, out); break;
        case Kind::reduce_scatter: {
            const std::size_t own = p.of.count * static_cast<std::size_t>(comm_->rank);
            const std::size_t begin = std::max(p.begin, own), end = std::min(p.end, own + p.of.count);
            if (begin < end) sum(p, begin, end, p.of.receive + (begin - own) * item);
        }
        }
    }
    void sum(const Part& p, std::size_t begin, std::size_t end, char* out) {
        const std::size_t place = p.place + (begin - p.begin) * bytes_of(p.of.type);
        p.of.type == ncclFloat32 ? sum_as<float>(place, end - begin, out)
                                 : sum_as<std::uint16_t>(place, end - begin, out);
    }
    template <class T>
    void sum_as(std::size_t place, std::size_t n, char* out) {
        for (std::size_t k = 0; k < n; ++k) {
            float total = 0.0f;
            for (int r = 0; r < comm_->size; ++r) {
                const float x = to_float(reinterpret_cast<const T*>(comm_->slot(r) + place)[k]);
                total = r == 0 ? x : total + x;
            }
            from_float(reinterpret_cast<T*>(out)[k], total);
        }
    }

    std::uint64_t signature() const {
        std::uint64_t hash = 14695981039346656037u;  // FNV-1a
        for (const Part& p : rounds_[done_])
            for (const std::uint64_t x : {static_cast<std::uint64_t>(p.of.kind), std::uint64_t{p.of.count},
                                          static_cast<std::uint64_t>(p.of.type),
                                          static_cast<std::uint64_t>(p.of.root), std::uint64_t{p.begin}})
                hash = (hash ^ x) * 1099511628211u;
        return hash;
    }
    void compare_signatures() const {
        for (int r = 0; r < comm_->size; ++r)
            if (comm_->board->ranks[r].signature != signature()) {
                std::fprintf(stderr, "NCCL's stand-in: ranks %d and %d bring different collectives\n", r,
                             comm_->rank);
                std::abort();
            }
    }

    std::shared_ptr<ncclComm> comm_;
    std::vector<std::vector<Part>> rounds_;
    std::uint64_t first_;
    std::size_t done_ = 0;
    int waits_ = 0;
};

// Communicators live as long as their groups.
std::mutex comms_mutex;
std::vector<std::shared_ptr<ncclComm>> comms;
std::shared_ptr<ncclComm> shared(ncclComm_t comm) {
    const std::lock_guard lock(comms_mutex);
    for (const auto& c : comms)
        if (c.get() == comm) return c;
    return nullptr;
}
void forget(ncclComm_t comm) {
    const std::lock_guard lock(comms_mutex);
    std::erase_if(comms, [&](const auto& c) { return c.get() == comm; });
}

// The group that a thread has begun; of one communicator, in one stream.
struct Open {
    int depth = 0;
    std::shared_ptr<ncclComm> comm;
    cudaStream_t stream = nullptr;
    std::vector<Collective> collectives;
    ncclResult_t result = ncclSuccess;
};
thread_local Open open_group;

ncclResult_t add(ncclComm_t handle, cudaStream_t stream, const Collective& c) {
    Open& g = open_group;
    const std::shared_ptr<ncclComm> comm = shared(handle);
    const bool sums = c.kind != Kind::all_gather && c.kind != Kind::broadcast;
    if (g.depth == 0 || !comm || (g.comm && (g.comm != comm || g.stream != stream)))
        return g.result = ncclInvalidUsage;
    if (bytes_of(c.type) == 0 || (sums && c.type != ncclFloat32 && c.type != ncclBfloat16) || c.root < 0 ||
        c.root >= comm->size || comm->board->here < comm->size || comm->delay > 0)
        return g.result = ncclInvalidArgument;
    // In place they begin at this rank's part, or it is a mistake that goes unnoticed.
    const std::size_t part = c.count * bytes_of(c.type) * static_cast<std::size_t>(comm->rank);
    const char* const own = c.kind == Kind::all_gather       ? c.receive + part
                            : c.kind == Kind::reduce_scatter ? c.receive - part
                                                             : c.receive;
    if (own != c.send) return g.result = ncclInvalidArgument;
    g.comm = comm;
    g.stream = stream;
    g.collectives.push_back(c);
    return ncclSuccess;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    std::uint64_t bits = 0;
    const int file = open("/dev/urandom", O_RDONLY);
    const bool read_all = file >= 0 && read(file, &bits, sizeof bits) == sizeof bits;
    if (file >= 0) close(file);
    std::memset(id, 0, sizeof *id);
    std::snprintf(id->internal, sizeof id->internal, "llmc_nccl_stand_in_%016llx",
                  static_cast<unsigned long long>(bits));
    return read_all ? ncclSuccess : ncclSystemError;
}
const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
    case ncclSuccess: return "no error";
    case ncclSystemError: return "unhandled system error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    case ncclRemoteError: return "remote process exited or there was a network error";
    case ncclInProgress: return "NCCL operation in progress";
    }
    return "unknown result code";
}
const char* ncclGetLastError(ncclComm_t handle) {
    const std::shared_ptr<ncclComm> comm = shared(handle);
    return comm && comm->error != ncclSuccess ? comm->error_text.c_str() : "";
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* handle, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
    *handle = nullptr;
    if (size < 1 || size > kMaxRanks || rank < 0 || rank >= size || config->blocking != 0)
        return ncclInvalidArgument;
    const auto comm = std::make_shared<ncclComm>();
    comm->rank = rank;
    comm->size = size;
    id.internal[sizeof id.internal - 1] = 0;
    if (const ncclResult_t result = comm->join(id.internal); result != ncclSuccess) return result;
    const std::lock_guard lock(comms_mutex);
    comms.push_back(comm);
    *handle = comm.get();
    return ncclInProgress;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* error) {
    const std::shared_ptr<ncclComm> comm = shared(handle);
    if (!comm) return ncclInvalidArgument;
    *error = comm->state();
    return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t handle) {
    return shared(handle) ? ncclInProgress : ncclInvalidArgument;
}
ncclResult_t ncclCommDestroy(ncclComm_t handle) {
    forget(handle);
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t handle) {
    if (const std::shared_ptr<ncclComm> comm = shared(handle)) {
        comm->aborted = true;
        comm->delayed = nullptr;
    }
    forget(handle);
    return ncclSuccess;
}

ncclResult_t ncclGroupStart() { return ++open_group.depth, ncclSuccess; }
ncclResult_t ncclGroupEnd() {
    if (open_group.depth == 0) return ncclInvalidUsage;
    if (--open_group.depth > 0) return ncclSuccess;
    const Open group = std::exchange(open_group, {});
    if (group.result != ncclSuccess || group.collectives.empty()) return group.result;
    auto launch = [stream = reinterpret_cast<cuda_emulation::Queue*>(group.stream),
                   work = Group(group.comm, group.collectives)] { stream->enqueue(work); };
    if (++group.comm->groups % 2 == 0) return launch(), ncclSuccess;
    group.comm->delayed = launch;
    group.comm->launcher = std::this_thread::get_id();
    group.comm->delay = 3;
    return ncclInProgress;
}

ncclResult_t ncclAllReduce(const void* send, void* receive, std::size_t count, ncclDataType_t type,
                           ncclRedOp_t, ncclComm_t comm, cudaStream_t stream) {
    return add(
        comm, stream,
        {Kind::all_reduce, static_cast<const char*>(send), static_cast<char*>(receive), count, type, 0});
}
ncclResult_t ncclReduce(const void* send, void* receive, std::size_t count, ncclDataType_t type, ncclRedOp_t,
                        int root, ncclComm_t comm, cudaStream_t stream) {
    return add(
        comm, stream,
        {Kind::reduce, static_cast<const char*>(send), static_cast<char*>(receive), count, type, root});
}
ncclResult_t ncclReduceScatter(const void* send, void* receive, std::size_t count, ncclDataType_t type,
                               ncclRedOp_t, ncclComm_t comm, cudaStream_t stream) {
    return add(
        comm, stream,
        {Kind::reduce_scatter, static_cast<const char*>(send), static_cast<char*>(receive), count, type, 0});
}
ncclResult_t ncclAllGather(const void* send, void* receive, std::size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
    return add(
        comm, stream,
        {Kind::all_gather, static_cast<const char*>(send), static_cast<char*>(receive), count, type, 0});
}
ncclResult_t ncclBroadcast(const void* send, void* receive, std::size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
    return add(
        comm, stream,
        {Kind::broadcast, static_cast<const char*>(send), static_cast<char*>(receive), count, type, root});
}

}  // extern "C"
#pragma GCC visibility pop
