// vp::DensityMerge, mirrors `launch_density_merge` in kernels/vp_kernels/density_merge/kernel.py.
#include "operator.hpp"

namespace vp {
namespace {

constexpr std::int64_t kLists = 14;  // LISTS in kernels/vp_kernels/density_merge/kernel.py

std::int64_t up(std::int64_t n) { return cdiv(n, 16) * 16; }

Plan densityMerge(int sm, Fields const& fields, std::vector<Tensor> const& given, bool hasSize, bool bySize) {
  Tensor const& x = given[0];
  auto const B = x.shape[0], N = x.shape[1], D = x.shape[2];
  auto const out = at(fields, "tokens_out"), clusters = at(fields, "clusters"), pairs = at(fields, "pairs");
  auto const prefix = at(fields, "prefix"), rest = N - (out - clusters + pairs);
  require(N == at(fields, "tokens") && D == at(fields, "width"), "x of shape " + text(x.shape), "[B, tokens, width]");
  require(rest >= clusters && out - clusters >= prefix + pairs,
          std::to_string(out) + " tokens out with " + std::to_string(clusters) + " clusters and " +
              std::to_string(pairs) + " pairs",
          "counts that " + std::to_string(N) + " tokens allow");
  for (std::size_t each = 1; each < given.size(); ++each) {
    require(given[each].shape == Shape({B, N}), "scores or size of another shape", "[B, N]");
  }
  Symbols sizes;
  sizes.B = B, sizes.N = N, sizes.D = D;
  Entry const& entry = find(sm, {"density_merge", "", x.dtype, {{"HAS_SIZE", hasSize}, {"BY_SIZE", bySize}}}, sizes);
  Plan plan;
  auto const values = kLists * up(N) + up(D) + rest * up(rest);
  plan.calls.push_back({&entry,
                        sizes,
                        {{"x_ptr", input(0)},
                         {"scores_ptr", input(1)},
                         {"size_ptr", hasSize ? input(2) : absent()},
                         {"merged_ptr", output(0)},
                         {"merged_size_ptr", output(1)},
                         {"scratch_ptr", plan.scratch(static_cast<std::size_t>(B * values), Dtype::kFp32)},
                         {"tokens", number(N)},
                         {"width", number(D)},
                         {"tokens_out", number(out)},
                         {"clusters", number(clusters)},
                         {"pairs", number(pairs)},
                         {"prefix", number(prefix)},
                         {"scratch_stride", number(values)}}});
  return plan;
}

}  // namespace

void addDensityMerge(std::vector<Operator>& to) {
  for (int flags = 0; flags < 16; ++flags) {
    bool const clusters = (flags & 8) != 0, pairs = (flags & 4) != 0;
    bool const hasSize = (flags & 2) != 0, bySize = (flags & 1) != 0;
    Operator made;
    made.type = std::string("DensityMerge") + (clusters ? "Clusters" : "") + (pairs ? "Pairs" : "") +
                (hasSize ? "Size" : "") + (bySize ? "BySize" : "");
    made.fields = {count("tokens", 1, kMaxTokens),
                   count("width", 1),
                   count("tokens_out", 1, kMaxTokens),
                   count("clusters", clusters ? 1 : 0, clusters ? kMaxTokens : 0),
                   count("pairs", pairs ? 1 : 0, pairs ? kMaxTokens : 0),
                   count("prefix", 0, kMaxTokens)};
    made.inputs = {{Type::kTokens, 3}, {Type::kFp32, 2}};
    if (hasSize) made.inputs.push_back({Type::kFp32, 2});
    made.outputs = [](Fields const& fields) {
      Size const rows = fixed(at(fields, "tokens_out"));
      return std::vector<Result>{{Type::kTokens, {same(0, 0), rows, same(0, 2)}}, {Type::kFp32, {same(0, 0), rows}}};
    };
    made.plan = [hasSize, bySize](int sm, Fields const& fields, std::vector<Tensor> const& given) {
      return densityMerge(sm, fields, given, hasSize, bySize);
    };
    to.push_back(std::move(made));
  }
}

}  // namespace vp
