#include "entry.hpp"

#include <algorithm>
#include <set>

namespace vp {
namespace {

bool isOf(Entry const& entry, Query const& query) {
  if (entry.op != query.op || (!query.kernel.empty() && entry.kernel != query.kernel) || entry.dtype != query.dtype)
    return false;
  return std::all_of(query.constants.begin(), query.constants.end(), [&](Constant const& wanted) {
    return std::any_of(entry.constants.begin(), entry.constants.end(),
                       [&](Constant const& has) { return has.name == wanted.name && has.value == wanted.value; });
  });
}

// Name of the first size outside the entry's limits, or nullptr.
Range const* refused(Entry const& entry, Symbols const& sizes) {
  auto const* found = std::find_if(entry.shapes.begin(), entry.shapes.end(), [&](Range const& range) {
    return sizes.*range.symbol < range.low || sizes.*range.symbol > range.high;
  });
  return found == entry.shapes.end() ? nullptr : found;
}

std::string capability(int sm) { return std::to_string(sm / 10) + "." + std::to_string(sm % 10); }

}  // namespace

char const* nameOf(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFp32:
      return "fp32";
    case Dtype::kFp16:
      return "fp16";
    case Dtype::kBf16:
      return "bf16";
    case Dtype::kInt64:
      return "int64";
    default:
      return "int32";
  }
}

std::int64_t constantOf(Entry const& entry, std::string_view name) {
  for (Constant const& each : entry.constants) {
    if (each.name == name) return each.value;
  }
  throw Refused("kernel " + std::string(entry.variant) + " without the constant " + std::string(name));
}

Entry const& find(int sm, Query const& query, Symbols const& sizes) {
  std::set<int> capabilities;
  Range const* limit = nullptr;
  bool kind = false;
  for (Entry const& entry : entries()) {
    capabilities.insert(entry.sm);
    if (entry.sm != sm || !isOf(entry, query)) continue;
    kind = true;
    auto const* beyond = refused(entry, sizes);
    if (beyond == nullptr) return entry;
    limit = beyond;
  }
  std::string const what = std::string(query.op) + " in " + nameOf(query.dtype);
  std::string found, has;
  if (capabilities.count(sm) == 0) {
    for (int each : capabilities) has += " " + capability(each);
    found = "no kernel for compute capability " + capability(sm) + ", only for" + (has.empty() ? " none" : has);
  } else if (!kind) {
    for (Constant const& each : query.constants) {
      has += " " + std::string(each.name) + "=" + std::to_string(each.value);
    }
    found = "no " + what + " with" + has + " for compute capability " + capability(sm);
  } else {
    found = what + " at " + std::string(limit->name) + " = " + std::to_string(sizes.*limit->symbol) +
            ", which no kernel for compute capability " + capability(sm) + " takes";
  }
  throw Refused(found + "; compile it with python -m vp_kernels.aot --sm " + std::to_string(sm) +
                " and build the library again");
}

}  // namespace vp
