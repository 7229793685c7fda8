// The emulated device: blocks one after another in a random order, a block's threads as fibers.
//
// Checked as they happen, each an error that names the kernel launch: a barrier that some threads of the
// block, or a collective that some lanes of the warp, never reach; a misaligned vector access; more shared
// memory than the smallest supported GPU has; a write past the end of an allocation (seen when it is freed).
//
// cp.async, wgmma: NaNs are where a GPU promises nothing. Shared memory that is being copied to; an accumulator that a
// matmul is adding to; what a matmul reads of tiles whose copies were not followed by the fence of the async proxy and a
// barrier. A matmul reads its tiles when it starts or when it is waited for, drawn at random for each thread. A register
// that is written too early, a missing wgmma.fence, a group that is never waited for: errors.
//
// A stream is a queue of closures. Nothing in it runs until the host waits for the stream, for an event behind
// it, or frees memory; and then only as much as is needed. A missing wait between streams, or a host buffer
// reused too early, is a wrong result. Only if there are other processes whose work waits for this one's, streams go on
// by themselves while the host calls nothing.
//
// A captured graph runs its nodes in a random order that keeps their dependencies. What may not be captured is an
// error, as on a GPU, and invalidates the capture.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
static constexpr std::size_t kUsedStack = 32 << 10;  // of a fiber that has ended: its frames never returned
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// ---- switching between fibers ----

static constexpr std::size_t kStack = 256 << 10;  // address space: only touched pages are memory
#if defined(__x86_64__)
using Context = void*;
// Saves the callee-saved registers and the stack pointer, and takes up the other's.
asm(R"(
.text
.globl llmc_switch_context
.hidden llmc_switch_context
.type llmc_switch_context, @function
llmc_switch_context:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void llmc_switch_context(Context* from, Context* to);
static void switch_context(Context& from, Context& to) { llmc_switch_context(&from, &to); }
static void start_context(Context& c, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack) - 1;
    *top-- = nullptr;  // where entry would return to
    *top = reinterpret_cast<void*>(entry);
    c = top - 6;  // the six registers
}
#else
using Context = ucontext_t;
static void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
static void start_context(Context& c, char* stack, void (*entry)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack;
    c.uc_stack.ss_size = kStack;
    c.uc_link = nullptr;
    makecontext(&c, entry, 0);
}
#endif

namespace cuda_emulation {
namespace {

constexpr int kMaxThreads = 1024;
constexpr std::size_t kSharedLimit = 99 << 10;  // a block of sm_86 and sm_89
constexpr unsigned char kPoison = 0xff;         // NaN as f32 and as bf16, -1 as an integer

std::minstd_rand& random_bits() {
    static std::minstd_rand engine([] {
        const char* const seed = std::getenv("LLMC_EMULATION_SEED");
        return seed ? static_cast<unsigned>(std::atoi(seed)) + 1u : 1u;
    }());
    return engine;
}
std::size_t random_below(std::size_t n) { return random_bits()() % n; }

struct Fiber {
    Context context;
    uint3 thread;
    int warp, lane;
    unsigned parity;  // of the warp collectives it has been through
    struct Copy {
        void* to;
        const void* from;
        int size, bytes;
    };
    std::vector<Copy> uncommitted;
    std::deque<std::vector<Copy>> committed;
    // Parts of shared memory that its copies wrote: before fence_async_proxy, and behind it until the next barrier.
    std::vector<std::size_t> unfenced, fenced;
    unsigned group_parity;
    struct Matmul {
        float* d;
        bool accumulate;
        std::vector<float> product;  // empty until it is computed
        std::function<void(float*)> compute;
    };
    std::vector<Matmul> uncommitted_matmuls;
    std::deque<std::vector<Matmul>> committed_matmuls;
    struct Accumulator {
        std::vector<float> value;
        int pending = 0;  // matmuls
    };
    std::map<float*, Accumulator> accumulators;
    bool registers_fenced;
};

// Where fibers wait until all of a group have come.
struct Barrier {
    int arrived = 0;
    std::vector<Fiber*> waiting;
};

struct Warp {
    Barrier barrier;
    unsigned char slots[2][32 * kSlot];  // the next collective may begin while this one is still being read
};

struct Group {  // of 4 warps
    Barrier barrier;
    unsigned char slots[2][128 * kSlot];
};

struct Block {
    std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
    std::vector<Warp> warps = std::vector<Warp>(kMaxThreads / 32);
    std::vector<Group> groups = std::vector<Group>(kMaxThreads / 128);
    std::vector<bool> unseen;  // by wgmma, per 16 bytes of dynamic
    Barrier barrier;
    std::vector<Fiber*> ready;
    Fiber* current = nullptr;
    int threads = 0, live = 0;
    Context main;
    char* stacks = nullptr;
    const std::function<void()>* thread = nullptr;
    std::exception_ptr error;
    std::unique_ptr<unsigned char[], decltype(&std::free)> dynamic{nullptr,
                                                                   std::free};  // at a multiple of 1024
    std::size_t dynamic_bytes = 0;
    std::vector<std::vector<unsigned char>> variables;
};
Block block;

void run_next() {
    Context& from = block.current ? block.current->context : block.main;
    if (block.ready.empty()) {
        block.current = nullptr;
        switch_context(from, block.main);
    } else {
        std::swap(block.ready[random_below(block.ready.size())], block.ready.back());
        Fiber* const next = block.ready.back();
        block.ready.pop_back();
        if (next != block.current) {
            block.current = next;
            threadIdx = next->thread;
            switch_context(from, next->context);
            return;
        }
    }
}

void fiber_main() {
    try {
        (*block.thread)();
        Fiber& self = *block.current;
        if (!self.uncommitted.empty() || !self.committed.empty())
            fail("a thread ended without waiting for its cp.async");
        if (!self.uncommitted_matmuls.empty() || !self.committed_matmuls.empty())
            fail("a thread ended without waiting for its wgmma");
    } catch (...) {
        block.error = std::current_exception();
        block.ready.clear();
    }
    --block.live;
    run_next();
    std::abort();  // a finished fiber is never resumed
}

void wait_for(Barrier& barrier, int expected) {
    if (++barrier.arrived == expected) {
        block.ready.insert(block.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
        barrier.waiting.clear();
        barrier.arrived = 0;
        block.ready.push_back(block.current);  // the last to come has no right to go first
    } else {
        barrier.waiting.push_back(block.current);
    }
    Fiber* const self = block.current;
    run_next();
    block.current = self;
    threadIdx = self->thread;
}

void run_block() {
    block.barrier = {};
    for (int w = 0; w < (block.threads + 31) / 32; ++w) block.warps[w].barrier = {};
    for (Group& g : block.groups) g.barrier = {};
    std::fill_n(block.dynamic.get(), block.dynamic_bytes, kPoison);
    block.unseen.assign((block.dynamic_bytes + 15) / 16, false);
    for (auto& v : block.variables) std::fill(v.begin(), v.end(), kPoison);
    block.ready.clear();
    block.live = block.threads;
    for (int i = 0; i < block.threads; ++i) {
        Fiber& f = block.fibers[i];
        const unsigned u = static_cast<unsigned>(i);
        f.thread = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
        f.warp = i / 32, f.lane = i % 32, f.parity = 0;
        f.uncommitted.clear();
        f.committed.clear();
        f.unfenced.clear();
        f.fenced.clear();
        f.group_parity = 0;
        f.uncommitted_matmuls.clear();
        f.committed_matmuls.clear();
        f.accumulators.clear();
        f.registers_fenced = false;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(block.stacks + (i + 1) * kStack - kUsedStack, kUsedStack);
#endif
        start_context(f.context, block.stacks + i * kStack, fiber_main);
        block.ready.push_back(&f);
    }
    block.current = nullptr;
    run_next();
    if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
    if (block.live > 0) fail("threads wait at a barrier that the others of their block or warp never reach");
}

void run_grid(dim3 grid, dim3 threads, std::size_t shared, const std::function<void()>& thread) {
    if (!block.stacks)
        block.stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    gridDim = grid;
    blockDim = threads;
    block.threads = static_cast<int>(threads.x * threads.y * threads.z);
    void* dynamic = nullptr;
    if (posix_memalign(&dynamic, 1024, std::max<std::size_t>(shared, 1)) != 0) throw std::bad_alloc();
    block.dynamic.reset(static_cast<unsigned char*>(dynamic));
    block.dynamic_bytes = shared;
    block.thread = &thread;
    const std::size_t count = std::size_t{grid.x} * grid.y * grid.z;
    std::size_t step =
        random_below(count) + 1;  // a random stride visits every block once where it is coprime
    while (std::gcd(step, count) != 1) ++step;
    std::size_t i = random_below(count);
    for (std::size_t n = 0; n < count; ++n, i = (i + step) % count) {
        blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y)};
        run_block();
    }
}

}  // namespace

void fail(const char* what) { throw std::runtime_error(std::string("CUDA emulation: ") + what); }

void sync_block() {
    for (const std::size_t part : block.current->fenced) block.unseen[part] = false;
    block.current->fenced.clear();
    wait_for(block.barrier, block.threads);
}

const unsigned char* exchange(const void* value, std::size_t bytes) {
    Fiber& self = *block.current;
    if (block.threads % 32 != 0) fail("a warp collective in a block that is not made of whole warps");
    Warp& warp = block.warps[static_cast<std::size_t>(self.warp)];
    unsigned char* const slots = warp.slots[self.parity ^= 1];
    if (bytes > 0) std::memcpy(slots + self.lane * kSlot, value, bytes);
    wait_for(warp.barrier, 32);
    return slots;
}
int lane() { return block.current->lane; }

int new_shared_variable() {
    block.variables.emplace_back();
    return static_cast<int>(block.variables.size()) - 1;
}
void* shared_variable(int id, std::size_t bytes) {
    auto& v = block.variables[static_cast<std::size_t>(id)];
    if (v.empty()) v.assign(bytes, kPoison);
    return v.data();
}
unsigned char* dynamic_shared() { return block.dynamic.get(); }

void async_copy(void* shared, const void* global, int size, int bytes) {
    check_aligned(shared, static_cast<std::size_t>(size));
    if (bytes > 0) check_aligned(global, static_cast<std::size_t>(size));
    std::memset(shared, kPoison, static_cast<std::size_t>(size));
    block.current->uncommitted.push_back({shared, global, size, bytes});
}
void async_commit() {
    block.current->committed.push_back(std::move(block.current->uncommitted));
    block.current->uncommitted.clear();
}
void async_wait(int pending) {
    auto& groups = block.current->committed;
    for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
        for (const Fiber::Copy& c : groups.front()) {
            std::memset(c.to, 0, static_cast<std::size_t>(c.size));
            if (c.bytes > 0) std::memcpy(c.to, c.from, static_cast<std::size_t>(c.bytes));
            const auto part =
                static_cast<std::size_t>(static_cast<unsigned char*>(c.to) - block.dynamic.get()) / 16;
            if (part >= block.unseen.size()) continue;  // in no dynamic memory
            block.unseen[part] = true;
            block.current->unfenced.push_back(part);
        }
}
void fence_async_proxy() {
    Fiber& self = *block.current;
    self.fenced.insert(self.fenced.end(), self.unfenced.begin(), self.unfenced.end());
    self.unfenced.clear();
}

// ---- the matmuls of a warpgroup ----

const unsigned char* exchange_in_group(const void* value, std::size_t bytes) {
    Fiber& self = *block.current;
    if (block.threads % 128 != 0)
        fail("a warpgroup's collective in a block that is not made of whole warpgroups");
    const int thread = self.warp * 32 + self.lane;
    Group& group = block.groups[static_cast<std::size_t>(thread / 128)];
    unsigned char* const slots = group.slots[self.group_parity ^= 1];
    std::memcpy(slots + thread % 128 * kSlot, value, bytes);
    wait_for(group.barrier, 128);
    return slots;
}
int thread_in_group() { return block.current->warp % 4 * 32 + block.current->lane; }

unsigned shared_address(const void* p) {
    return static_cast<unsigned>(static_cast<const unsigned char*>(p) - block.dynamic.get());
}
std::uint16_t shared_bf16(unsigned address) {
    if (address + 2 > block.dynamic_bytes) fail("wgmma reads outside of shared memory");
    std::uint16_t bits = 0xffff;
    if (!block.unseen[address / 16]) std::memcpy(&bits, block.dynamic.get() + address, sizeof bits);
    return bits;
}

void fence_registers() { block.current->registers_fenced = true; }
void start_matmul(float* d, int count, bool accumulate, std::function<void(float*)> compute) {
    Fiber& self = *block.current;
    if (!self.registers_fenced) fail("wgmma without wgmma.fence since the last wait");
    const auto n = static_cast<std::size_t>(count);
    Fiber::Accumulator& sum = self.accumulators[d];
    if (sum.pending++ == 0) {
        sum.value.assign(d, d + n);
        std::memset(d, kPoison, n * sizeof *d);
    }
    Fiber::Matmul m{d, accumulate, {}, std::move(compute)};
    if (random_below(2) == 0) {  // it reads shared memory now, else at the end
        m.product.resize(n);
        m.compute(m.product.data());
    }
    self.uncommitted_matmuls.push_back(std::move(m));
}
void commit_matmuls() {
    Fiber& self = *block.current;
    self.committed_matmuls.push_back(std::move(self.uncommitted_matmuls));
    self.uncommitted_matmuls.clear();
}
void wait_matmuls(int pending) {
    Fiber& self = *block.current;
    auto& groups = self.committed_matmuls;
    for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
        for (Fiber::Matmul& m : groups.front()) {
            Fiber::Accumulator& sum = self.accumulators[m.d];
            const std::size_t n = sum.value.size();
            if (m.product.empty()) {
                m.product.resize(n);
                m.compute(m.product.data());
            }
            for (std::size_t i = 0; i < n; ++i)
                sum.value[i] = (m.accumulate ? sum.value[i] : 0.0f) + m.product[i];
            if (--sum.pending > 0) continue;
            const auto* const bytes = reinterpret_cast<const unsigned char*>(m.d);
            if (std::any_of(bytes, bytes + n * sizeof *m.d,
                            [](unsigned char byte) { return byte != kPoison; }))
                fail("an accumulator of wgmma was written before the wait");
            std::copy(sum.value.begin(), sum.value.end(), m.d);
            self.accumulators.erase(m.d);
        }
    self.registers_fenced = false;
}

}  // namespace cuda_emulation

// ---- streams and events ----

struct EmulatedGraph {
    struct Node {
        std::function<void()> work;
        std::set<std::size_t> after;
    };
    std::vector<Node> nodes;
    void run() const {
        std::vector<std::size_t> waits, ready;
        for (std::size_t i = 0; i < nodes.size(); ++i) {
            waits.push_back(nodes[i].after.size());
            if (waits[i] == 0) ready.push_back(i);
        }
        while (!ready.empty()) {
            std::swap(ready[cuda_emulation::random_below(ready.size())], ready.back());
            const std::size_t next = ready.back();
            ready.pop_back();
            nodes[next].work();
            for (std::size_t i = next + 1; i < nodes.size(); ++i)
                if (nodes[i].after.count(next) && --waits[i] == 0) ready.push_back(i);
        }
    }
};
struct EmulatedGraphExec {
    std::shared_ptr<const EmulatedGraph> graph;  // which the streams' queues share
};
// Of one stream, and of those that wait for its events meanwhile.
struct Capture {
    EmulatedStream* origin;
    EmulatedGraph graph;
    bool valid = true;
};
// Held by every function of the API, as long as it runs.
static std::recursive_mutex device;
// While work waits for another process, other threads may ask for things.
static void pause(int& times) {
    device.unlock();
    if (++times < 200)
        std::this_thread::yield();
    else
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    device.lock();
}
struct EmulatedStream final : cuda_emulation::Queue {
    std::deque<std::function<bool()>> queue;
    std::shared_ptr<Capture> capture;
    std::set<std::size_t> last;  // the nodes that the next one comes after
    // False if its first work cannot be done yet.
    bool run_one() {
        auto work = std::move(queue.front());
        queue.pop_front();
        if (work()) return true;
        queue.push_front(std::move(work));
        return false;
    }
    // False if it cannot be empty yet.
    bool run() {
        while (!queue.empty())
            if (!run_one()) return false;
        return true;
    }
    void drain() {
        for (int times = 0; !run();) pause(times);
    }
    void enqueue(std::function<bool()> work) override;
};
struct EmulatedEvent {
    // What the streams' queues share: the event may be destroyed before they come to it.
    struct Record {
        EmulatedStream* stream = nullptr;
        std::uint64_t recorded = 0, reached = 0;
        std::chrono::steady_clock::time_point time;
        bool run(std::uint64_t until) {
            while (reached < until)
                if (!stream->run_one()) return false;
            return true;
        }
        void wait(std::uint64_t until) {
            for (int times = 0; !run(until);) pause(times);
        }
    };
    std::shared_ptr<Record> record = std::make_shared<Record>();
    std::shared_ptr<Capture> capture;  // that it was recorded in, if it was
    std::set<std::size_t> last;
};

namespace {

using namespace cuda_emulation;
std::vector<EmulatedStream*> streams;
std::atomic<std::chrono::steady_clock::time_point> last_call;
struct Call {
    std::lock_guard<std::recursive_mutex> lock{device};
    ~Call() { last_call = std::chrono::steady_clock::now(); }
};

// Goes on with the streams while the host calls nothing, for a time that is longer than it takes between two ops.
class Background {
  public:
    void start() {
        if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
    }
    ~Background() {
        ended_ = true;
        if (thread_.joinable()) thread_.join();
    }

  private:
    void run() {
        using namespace std::chrono_literals;
        for (; !ended_; std::this_thread::sleep_for(1ms)) {
            if (std::chrono::steady_clock::now() - last_call.load() < 20ms) continue;
            const std::unique_lock lock(device, std::try_to_lock);
            if (!lock) continue;
            try {
                for (std::size_t i = 0; i < streams.size(); ++i) streams[i]->run();
            } catch (const std::exception& e) {
                std::fprintf(stderr, "%s\n", e.what());
                std::abort();
            }
        }
    }
    std::atomic<bool> ended_ = false;
    std::thread thread_;
} background;
std::map<std::uintptr_t, std::size_t> device_memory, pinned_memory;
std::size_t allocated = 0;
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kGuard = 0;  // the sanitizer has its own, which sees reads too
#else
constexpr std::size_t kGuard = 256;
#endif

std::size_t total_memory() {
    const char* const mb = std::getenv("LLMC_EMULATION_MEMORY_MB");
    return std::size_t{mb ? static_cast<unsigned>(std::atoi(mb)) : 4096u} << 20;
}
bool inside(const std::map<std::uintptr_t, std::size_t>& ranges, const void* p) {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    auto it = ranges.upper_bound(address);
    return it != ranges.begin() && (--it, address < it->first + it->second);
}
void drain_all() {
    for (std::size_t i = 0; i < streams.size(); ++i) streams[i]->drain();
}
// What a stream that is captured, or its thread, may not do: it invalidates the capture.
cudaError_t refused_by_captures() {
    cudaError_t error = cudaSuccess;
    for (EmulatedStream* s : streams)
        if (s->capture) {
            if (error == cudaSuccess)
                error =
                    s->capture->valid ? cudaErrorStreamCaptureUnsupported : cudaErrorStreamCaptureInvalidated;
            s->capture->valid = false;
        }
    return error;
}
cudaError_t invalidate(Capture& capture, cudaError_t error) {
    capture.valid = false;
    return error;
}
#define REFUSED_BY_CAPTURES()                                                                                \
    const Call call;                                                                                         \
    if (const cudaError_t error = refused_by_captures(); error != cudaSuccess) return error

}  // namespace

namespace cuda_emulation {

void enqueue(cudaStream_t stream, std::function<void()> work) {
    const Call call;
    if (!stream->capture) return stream->queue.push_back([work = std::move(work)] { return work(), true; });
    auto& nodes = stream->capture->graph.nodes;
    nodes.push_back({std::move(work), stream->last});
    stream->last = {nodes.size() - 1};
}

void launch(cudaStream_t stream, dim3 grid, dim3 threads, std::size_t shared, std::function<void()> thread) {
    if (threads.x * threads.y * threads.z == 0 || threads.x * threads.y * threads.z > kMaxThreads ||
        std::size_t{grid.x} * grid.y * grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535)
        fail("a launch with an impossible grid or block");
    if (shared > kSharedLimit) fail("a launch with more shared memory than a block of sm_86 has");
    enqueue(stream, [=] { run_grid(grid, threads, shared, thread); });
}

}  // namespace cuda_emulation

void EmulatedStream::enqueue(std::function<bool()> work) {
    const Call call;
    if (capture)
        invalidate(*capture, cudaErrorStreamCaptureUnsupported);
    else
        queue.push_back(std::move(work));
    background.start();
}

// ---- the runtime API ----

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    default: return "invalid argument";
    }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
// Several differ in nothing but their number.
cudaError_t cudaGetDeviceCount(int* count) {
    const char* const devices = std::getenv("LLMC_EMULATION_DEVICES");
    return *count = devices ? std::atoi(devices) : 1, cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    int count = 0;
    cudaGetDeviceCount(&count);
    return device >= 0 && device < count ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    const char* const capability = std::getenv("LLMC_EMULATION_CAPABILITY");  // "9.0" is Hopper
    *p = {"CUDA emulated on the CPU",
          {},
          capability ? capability[0] - '0' : 8,
          0,
          3,
          kSharedLimit,
          total_memory()};
    p->uuid.bytes[15] = static_cast<char>(device);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1000000, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
    const Call call;
    *total = total_memory();
    *free = *total - std::min(*total, allocated);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, std::size_t bytes) {
    REFUSED_BY_CAPTURES();
    if (allocated + bytes > total_memory()) return cudaErrorMemoryAllocation;
    if (posix_memalign(p, 256, bytes + kGuard) != 0) return cudaErrorMemoryAllocation;
    std::memset(*p, kPoison, bytes + kGuard);
    device_memory[reinterpret_cast<std::uintptr_t>(*p)] = bytes;
    allocated += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
    if (!p) return cudaSuccess;
    REFUSED_BY_CAPTURES();
    drain_all();
    const auto it = device_memory.find(reinterpret_cast<std::uintptr_t>(p));
    if (it == device_memory.end()) return cudaErrorInvalidValue;
    const std::size_t bytes = it->second;
    for (std::size_t i = bytes; i < bytes + kGuard; ++i)
        if (static_cast<unsigned char*>(p)[i] != kPoison) {
            std::fprintf(stderr, "CUDA emulation: a write %zu bytes past the end of %zu\n", i - bytes, bytes);
            std::abort();
        }
    allocated -= bytes;
    device_memory.erase(it);
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, std::size_t bytes) {
    REFUSED_BY_CAPTURES();
    *p = std::malloc(bytes);
    pinned_memory[reinterpret_cast<std::uintptr_t>(*p)] = bytes;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
    REFUSED_BY_CAPTURES();
    drain_all();
    pinned_memory.erase(reinterpret_cast<std::uintptr_t>(p));
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t s) {
    const Call call;
    // A graph's copy would read or write the host's memory at each launch: nothing here means that.
    if (s->capture && kind != cudaMemcpyDeviceToDevice)
        return invalidate(*s->capture, cudaErrorStreamCaptureUnsupported);
    if (kind != cudaMemcpyHostToDevice && !inside(device_memory, from)) return cudaErrorInvalidValue;
    if (kind != cudaMemcpyDeviceToHost && !inside(device_memory, to)) return cudaErrorInvalidValue;
    if (kind == cudaMemcpyHostToDevice && !inside(pinned_memory, from)) {  // pageable: read at once
        const auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
        enqueue(s, [=] { std::memcpy(to, staged->data(), bytes); });
        return cudaSuccess;
    }
    enqueue(s, [=] { std::memmove(to, from, bytes); });
    if (kind == cudaMemcpyDeviceToHost && !inside(pinned_memory, to)) s->drain();
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t s) {
    const Call call;
    if (bytes > 0 && !inside(device_memory, p)) return cudaErrorInvalidValue;
    enqueue(s, [=] { std::memset(p, value, bytes); });
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
    const Call call;
    streams.push_back(*s = new EmulatedStream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int) {
    return cudaStreamCreateWithFlags(s, flags);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
    return *lowest = 0, *highest = -1, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    REFUSED_BY_CAPTURES();
    s->drain();
    streams.erase(std::find(streams.begin(), streams.end(), s));
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    REFUSED_BY_CAPTURES();
    return s->drain(), cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
    REFUSED_BY_CAPTURES();
    return s->run() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    const Call call;
    if (!e->capture) {
        if (s->capture) return invalidate(*s->capture, cudaErrorStreamCaptureIsolation);
        s->queue.push_back([record = e->record, until = e->record->recorded] { return record->run(until); });
        return cudaSuccess;
    }
    if (!e->capture->origin) return cudaErrorCapturedEvent;  // that capture has ended
    if (s->capture && s->capture != e->capture)
        return invalidate(*s->capture, cudaErrorStreamCaptureIsolation);
    s->capture = e->capture;
    s->last.insert(e->last.begin(), e->last.end());
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return *e = new EmulatedEvent, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    const Call call;
    e->capture = s->capture;
    e->last = s->last;
    if (s->capture) return cudaSuccess;
    e->record->stream = s;
    enqueue(s, [record = e->record, now = ++e->record->recorded] {
        record->reached = now;
        record->time = std::chrono::steady_clock::now();
    });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    REFUSED_BY_CAPTURES();
    if (e->capture) return cudaErrorCapturedEvent;
    e->record->wait(e->record->recorded);
    return cudaSuccess;
}
// Of what the device has done so far; nobody waits.
cudaError_t cudaEventQuery(cudaEvent_t e) {
    const Call call;
    return e->record->reached < e->record->recorded ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    const Call call;
    for (const cudaEvent_t e : {begin, end}) {
        if (e->record->recorded == 0) return cudaErrorInvalidValue;
        if (e->record->reached < e->record->recorded) return cudaErrorNotReady;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->record->time - begin->record->time).count();
    return cudaSuccess;
}

// ---- graphs ----

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    const Call call;
    if (s->capture) return invalidate(*s->capture, cudaErrorStreamCaptureUnsupported);
    s->capture = std::make_shared<Capture>(Capture{s, {}, true});
    s->last.clear();
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
    *status = s->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
    const Call call;
    *graph = nullptr;
    const std::shared_ptr<Capture> capture = s->capture;
    if (!capture || capture->origin != s) return cudaErrorStreamCaptureUnmatched;
    // Every node must come before what this stream would do next.
    const auto& nodes = capture->graph.nodes;
    std::set<std::size_t> before = s->last;
    for (std::size_t i = nodes.size(); i-- > 0;)
        if (before.count(i)) before.insert(nodes[i].after.begin(), nodes[i].after.end());
    const bool joined = before.size() == nodes.size();
    for (EmulatedStream* other : streams)
        if (other->capture == capture) other->capture = nullptr, other->last.clear();
    capture->origin = nullptr;
    if (!capture->valid) return cudaErrorStreamCaptureInvalidated;
    if (!joined) return cudaErrorStreamCaptureUnjoined;
    *graph = new EmulatedGraph(std::move(capture->graph));
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    *exec = new EmulatedGraphExec{std::make_shared<const EmulatedGraph>(*graph)};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    const Call call;
    if (s->capture) return invalidate(*s->capture, cudaErrorStreamCaptureUnsupported);
    enqueue(s, [graph = exec->graph] { graph->run(); });
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
