#include "comm/reduction.h"

#include <utility>

namespace llmc {

Reduction::Reduction(std::shared_ptr<Comm> comm, std::shared_ptr<const Partition> partition,
                     std::int64_t notes)
    : comm_(std::move(comm)), partition_(std::move(partition)), arena_("what ranks tell each other", 256) {
    LLMC_CHECK(comm_ != nullptr, "Reduction: no Comm");
    LLMC_CHECK(notes > 0, "Reduction: {} notes", notes);
    arena_.add(notes_, "notes", DType::f32, {notes});
    arena_.allocate(comm_->backend_owner());
    stopwatch_ = comm_->backend().make_stopwatch();
}

void Reduction::begin(const std::vector<float>& notes) {
    LLMC_CHECK(static_cast<std::int64_t>(notes.size()) == notes_.numel(), "Reduction: {} notes, expected {}",
               notes.size(), notes_.numel());
    comm_->backend().from_host(notes_, notes.data());
    stopwatch_->start();
}

void Reduction::ready(std::span<const Tensor> gradients) {
    if (!partition_) {
        comm_->all_reduce({gradients.begin(), gradients.end()});
        return;
    }
    std::vector<Divided> xs;
    for (const Tensor& gradient : gradients) xs.push_back(partition_->divided(gradient));
    comm_->reduce_scatter(xs);
}

void Reduction::finish(Tensor loss) {
    stopwatch_->stop();
    comm_->all_reduce({loss, notes_});
    comm_->wait();
}

std::vector<float> Reduction::notes() const {
    std::vector<float> values(static_cast<std::size_t>(notes_.numel()));
    comm_->backend().to_host(values.data(), notes_);
    return values;
}

double Reduction::own_seconds() const { return stopwatch_->seconds(); }

}  // namespace llmc
