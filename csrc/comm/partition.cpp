#include "comm/partition.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace llmc {

Partition::Partition(std::span<const Parameter> parameters, const std::vector<bool>& whole, int ranks) {
    struct Layer {
        std::size_t parameter;
        std::int64_t layer, unit, numel;
    };
    std::vector<Layer> layers;  // that are to have one owner
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const Parameter& p = parameters[i];
        owners_.emplace_back(static_cast<std::size_t>(p.layers), kEachRank);
        for (std::int64_t l = 0; whole[i] && l < p.layers; ++l)
            layers.push_back({i, l, p.first_unit + l, p.grad.numel() / p.layers});
    }
    std::stable_sort(layers.begin(), layers.end(), [](const Layer& a, const Layer& b) {
        return std::tuple(-a.numel, a.unit) < std::tuple(-b.numel, b.unit);
    });
    std::vector<std::int64_t> load(static_cast<std::size_t>(ranks));
    std::map<std::pair<std::int64_t, std::size_t>, std::int64_t> load_of_unit;  // by unit and rank
    for (const Layer& layer : layers) {
        std::size_t best = 0;
        for (std::size_t r = 1; r < load.size(); ++r)
            if (std::pair(load[r], load_of_unit[{layer.unit, r}]) <
                std::pair(load[best], load_of_unit[{layer.unit, best}]))
                best = r;
        load[best] += layer.numel;
        load_of_unit[{layer.unit, best}] += layer.numel;
        owners_[layer.parameter][static_cast<std::size_t>(layer.layer)] = static_cast<int>(best);
    }
    for (std::size_t i = 0; i < parameters.size(); ++i)
        for (std::int64_t l = 0; l < parameters[i].layers; ++l) {
            const std::int64_t numel = parameters[i].grad.numel() / parameters[i].layers;
            const Tensor gradient =
                parameters[i].grad.view({parameters[i].grad.numel()}).slice(l * numel, (l + 1) * numel);
            gradients_.insert_or_assign(gradient.data, Divided(gradient, owner(i, l)));
        }
}

int Partition::owner(std::size_t parameter, std::int64_t layer) const {
    return owners_.at(parameter).at(static_cast<std::size_t>(layer));
}

Divided Partition::divided(const Tensor& gradient) const {
    const auto found = gradients_.find(gradient.data);
    LLMC_CHECK(found != gradients_.end() && found->second.tensor.numel() == gradient.numel(),
               "{} is no gradient of the model whose parameters are divided among the ranks", gradient);
    return found->second;
}

}  // namespace llmc
