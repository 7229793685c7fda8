// The only file that names the folders cpu/ and cuda/ together, and the process.
#include "backends.h"

#include "cpu/make_cpu.h"
#include "cuda/make_cuda.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace llmc {

int process_id() {
#if defined(_WIN32)
    return 1;  // there is no fork
#else
    return static_cast<int>(getpid());
#endif
}

std::shared_ptr<Backend> make_backend(const std::string& device, int threads) {
    if (device == "cpu") return make_cpu(threads);
    if (device == "cuda") return make_cuda(0);
    if (device.rfind("cuda:", 0) == 0 && device.size() > 5 && device.size() < 9 &&
        device.find_first_not_of("0123456789", 5) == std::string::npos)
        return make_cuda(std::stoi(device.substr(5)));
    throw ArgumentError(filled("unknown device '{}': expected 'cpu', 'cuda' or 'cuda:N'", device));
}

}  // namespace llmc
