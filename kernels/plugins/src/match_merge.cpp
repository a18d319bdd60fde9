// vp::MatchMerge, mirrors `launch_match_merge` in kernels/vp_kernels/match_merge/kernel.py: matching, then merge.
#include "operator.hpp"

namespace vp {
namespace {

Plan matchMerge(int sm, Fields const& fields, std::vector<Tensor> const& given, bool hasSize, bool hasScores) {
  Tensor const &x = given[0], &metric = given[1];
  auto const B = x.shape[0], N = x.shape[1], H = metric.shape[2], d = metric.shape[3];
  auto const r = at(fields, "r"), prefix = at(fields, "prefix");
  require(N == at(fields, "tokens") && metric.shape[0] == B && metric.shape[1] == N,
          "x of shape " + text(x.shape) + " and metric of shape " + text(metric.shape),
          "[B, tokens, D] and [B, tokens, H, d]");
  require(r >= 1 && prefix + 2 * r <= N, "r = " + std::to_string(r) + " of " + std::to_string(N) + " tokens",
          "at most half of those behind the prefix");
  require(!hasSize || given[2].shape == Shape({B, N}), "size of another shape", "[B, N]");
  require(!hasScores || given.back().shape == Shape({B, N - prefix}), "scores of another shape", "[B, N - prefix]");
  Symbols sizes;
  sizes.B = B, sizes.n = N - prefix, sizes.H = H, sizes.d = d;
  Entry const& entry =
      find(sm, {"match_merge", "", metric.dtype, {{"HAS_SIZE", hasSize}, {"HAS_SCORES", hasScores}}}, sizes);

  Plan plan;
  auto const scratch = [&](std::int64_t values, Dtype dtype) {
    return plan.scratch(static_cast<std::size_t>(B * values), dtype);
  };
  auto const keep = scratch(N - r, Dtype::kInt64), source = scratch(r, Dtype::kInt64);
  auto const into = scratch(r, Dtype::kInt64);
  auto const weight = hasSize || hasScores ? scratch(r, Dtype::kFp32) : absent();
  auto const keepWeight = hasSize ? scratch(N - r, Dtype::kFp32) : absent();
  // If A is a single tile, the unit rows stay in registers.
  auto const unit = constantOf(entry, "ONE_TILE") ? absent() : scratch(N * constantOf(entry, "BLOCK_K"), Dtype::kFp32);
  plan.calls.push_back({&entry,
                        sizes,
                        {{"metric", input(1)},
                         {"size", hasSize ? input(2) : absent()},
                         {"scores", hasScores ? input(given.size() - 1) : absent()},
                         {"keep", keep},
                         {"source", source},
                         {"into", into},
                         {"weight", weight},
                         {"keep_weight", keepWeight},
                         {"unit", unit},
                         {"best", scratch(N - prefix, Dtype::kInt32)},
                         {"partner", scratch(N - prefix, Dtype::kInt32)},
                         {"tau", number(hasScores ? fields.find("tau")->second : 0)},
                         {"N", number(N)},
                         {"H", number(H)},
                         {"prefix", number(prefix)},
                         {"r", number(r)},
                         {"stride_b", number(N * H * d)},
                         {"stride_n", number(H * d)},
                         {"stride_h", number(d)},
                         {"stride_s", number(hasScores ? N - prefix : 0)}}});
  plan.calls.push_back(mergeRows(
      sm, x, N - r, r, hasSize || hasScores, hasSize,
      {{"keep", keep}, {"source", source}, {"into", into}, {"source_weight", weight}, {"keep_weight", keepWeight}}));
  return plan;
}

}  // namespace

void addMatchMerge(std::vector<Operator>& to) {
  for (bool hasSize : {false, true}) {
    for (bool hasScores : {false, true}) {
      Operator made;
      made.type = std::string("MatchMerge") + (hasSize ? "Size" : "") + (hasScores ? "Scores" : "");
      made.fields = {count("tokens", 2, kMaxTokens), count("r", 1, kMaxTokens), count("prefix", 0, kMaxTokens)};
      if (hasScores) made.fields.push_back({"tau", true, -kLargest, kLargest});
      made.inputs = {{Type::kTokens, 3}, {Type::kMetric, 4}};
      if (hasSize) made.inputs.push_back({Type::kFp32, 2});
      if (hasScores) made.inputs.push_back({Type::kFp32, 2});
      made.outputs = [](Fields const& fields) {
        Size const rows{{{0, 1}}, -at(fields, "r")};
        return std::vector<Result>{{Type::kTokens, {same(0, 0), rows, same(0, 2)}}, {Type::kFp32, {same(0, 0), rows}}};
      };
      made.plan = [hasSize, hasScores](int sm, Fields const& fields, std::vector<Tensor> const& given) {
        return matchMerge(sm, fields, given, hasSize, hasScores);
      };
      to.push_back(std::move(made));
    }
  }
}

}  // namespace vp
