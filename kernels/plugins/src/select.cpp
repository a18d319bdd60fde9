// vp::Select, SelectByScore and SelectFuse, mirror the launchers in kernels/vp_kernels/select/kernel.py.
#include "operator.hpp"

namespace vp {
namespace {

void checkCount(std::int64_t k, std::int64_t n) {
  require(k <= n, "k = " + std::to_string(k), "at most the " + std::to_string(n) + " scores");
}

Plan select(int sm, Fields const& fields, std::vector<Tensor> const& given, bool byScore) {
  auto const B = given[0].shape[0], n = given[0].shape[1], k = at(fields, "k");
  checkCount(k, n);
  Symbols sizes;
  sizes.B = B, sizes.n = n, sizes.k = k;
  Entry const& entry = find(sm, {"select", byScore ? "rank_kernel" : "select_kernel", Dtype::kFp32, {}}, sizes);
  Plan plan;
  plan.calls.push_back({&entry,
                        sizes,
                        {{"scores_ptr", input(0)},
                         {"index_ptr", output(0)},
                         {"stride", number(n)},
                         {"n", number(n)},
                         {"k", number(k)}}});
  return plan;
}

Plan selectFuse(int sm, Fields const& fields, std::vector<Tensor> const& given) {
  Tensor const& x = given[1];
  auto const B = given[0].shape[0], n = given[0].shape[1], k = at(fields, "k");
  auto const N = x.shape[1], D = x.shape[2];
  checkCount(k, n);
  require(n == at(fields, "scored") && N == at(fields, "tokens") && x.shape[0] == B && N >= n,
          "scores of shape " + text(given[0].shape) + " and x of shape " + text(x.shape),
          "[B, scored] and [B, tokens, D]");
  Symbols sizes;
  sizes.B = B, sizes.n = n, sizes.k = k, sizes.N = N, sizes.D = D;
  Entry const& entry = find(sm, {"select", "select_fuse_kernel", x.dtype, {}}, sizes);
  Plan plan;
  plan.calls.push_back({&entry,
                        sizes,
                        {{"scores_ptr", input(0)},
                         {"x_ptr", input(1)},
                         {"index_ptr", output(0)},
                         {"fused_ptr", output(1)},
                         {"stride", number(n)},
                         {"n", number(n)},
                         {"k", number(k)},
                         {"tokens", number(N)},
                         {"width", number(D)}}});
  return plan;
}

}  // namespace

void addSelect(std::vector<Operator>& to) {
  for (bool byScore : {false, true}) {
    to.push_back({byScore ? "SelectByScore" : "Select",
                  {count("k", 1, kMaxTokens)},
                  {{Type::kFp32, 2}},
                  [](Fields const& fields) {
                    return std::vector<Result>{{Type::kInt64, {same(0, 0), fixed(at(fields, "k"))}}};
                  },
                  [byScore](int sm, Fields const& fields, std::vector<Tensor> const& given) {
                    return select(sm, fields, given, byScore);
                  }});
  }
  to.push_back({"SelectFuse",
                {count("k", 1, kMaxTokens), count("scored", 1, kMaxTokens), count("tokens", 1, kMaxTokens)},
                {{Type::kFp32, 2}, {Type::kTokens, 3}},
                [](Fields const& fields) {
                  return std::vector<Result>{{Type::kInt64, {same(0, 0), fixed(at(fields, "k"))}},
                                             {Type::kTokens, {same(1, 0), fixed(1), same(1, 2)}}};
                },
                selectFuse});
}

}  // namespace vp
