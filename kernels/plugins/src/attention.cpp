// vp::Attention, mirrors `launch_attention` in kernels/vp_kernels/attention/kernel.py.
#include "operator.hpp"

namespace vp {
namespace {

Plan attention(int sm, Fields const& fields, std::vector<Tensor> const& given, bool bias, bool ofClass, bool mean) {
  Tensor const& qkv = given[0];
  auto const B = qkv.shape[0], N = qkv.shape[1], H = qkv.shape[3], d = qkv.shape[4];
  require(qkv.shape[2] == 3 && N == at(fields, "tokens") && H == at(fields, "heads") && d == at(fields, "head_dim"),
          "qkv of shape " + text(qkv.shape), "[B, tokens, 3, heads, head_dim]");
  bool const single = bias && given[1].shape[0] == 1;
  if (bias) {
    require((single || given[1].shape[0] == B) && given[1].shape[1] == N, "key_bias of shape " + text(given[1].shape),
            "[1 or B, N]");
  }
  Symbols sizes;
  sizes.B = B, sizes.N = N, sizes.H = H, sizes.d = d;
  Entry const& entry =
      find(sm, {"attention", "", qkv.dtype, {{"HAS_BIAS", bias}, {"CLASS", ofClass}, {"MEAN", mean}}}, sizes);

  Plan plan;
  // Partial sums of the importance: one row per head, for the mean one per head and query tile.
  auto const rows = H * (mean ? cdiv(N, constantOf(entry, "BLOCK_M")) : 1);
  auto const partial = ofClass || mean ? plan.scratch(static_cast<std::size_t>(B * rows * N), Dtype::kFp32) : absent();
  plan.calls.push_back({&entry,
                        sizes,
                        {{"qkv", input(0)},
                         {"key_bias", bias ? input(1) : absent()},
                         {"out", output(0)},
                         {"partial", partial},
                         {"N", number(N)},
                         {"H", number(H)},
                         {"bias_stride", number(bias && !single ? N : 0)}}});
  if (ofClass || mean) {
    sizes.rows = rows;
    Entry const& sum = find(sm, {"attention", "sum_partials", Dtype::kFp32, {{"ROWS", ofClass ? 16 : 32}}}, sizes);
    plan.calls.push_back({&sum,
                          sizes,
                          {{"partial", partial},
                           {"importance", output(1)},
                           {"rows", number(rows)},
                           {"N", number(N)},
                           {"count", number(H * (mean ? N : 1))}}});
  }
  return plan;
}

}  // namespace

void addAttention(std::vector<Operator>& to) {
  for (bool bias : {false, true}) {
    for (std::string const importance : {"", "Class", "Mean"}) {
      Operator made;
      made.type = "Attention" + std::string(bias ? "Bias" : "") + importance;
      if (made.type == "Attention") made.type = "AttentionPlain";
      made.fields = {count("tokens", 1, kMaxTokens), count("heads", 1), count("head_dim", 1)};
      made.inputs = {{Type::kTokens, 5}};
      if (bias) made.inputs.push_back({Type::kFp32, 2});
      bool const two = !importance.empty();
      made.outputs = [two](Fields const&) {
        std::vector<Result> found{{Type::kTokens, {same(0, 0), same(0, 1), {{{0, 3}, {0, 4}}}}}};
        if (two) found.push_back({Type::kFp32, {same(0, 0), same(0, 1)}});
        return found;
      };
      made.plan = [bias, importance](int sm, Fields const& fields, std::vector<Tensor> const& given) {
        return attention(sm, fields, given, bias, importance == "Class", importance == "Mean");
      };
      to.push_back(std::move(made));
    }
  }
}

}  // namespace vp
