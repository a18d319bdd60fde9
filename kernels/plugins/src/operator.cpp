#include "operator.hpp"

namespace vp {

std::vector<Operator> const& operators() {
  static std::vector<Operator> const all = [] {
    std::vector<Operator> made;
    for (auto* add : {addAttention, addGatherNorm, addSelect, addMergeRows, addMatchMerge, addDensityMerge}) {
      add(made);
    }
    return made;
  }();
  return all;
}

std::string text(Shape const& shape) {
  std::string made;
  for (auto size : shape) made += (made.empty() ? "" : ", ") + std::to_string(size);
  return "[" + made + "]";
}

}  // namespace vp
