// vp::GatherNorm, mirrors `launch_gather_norm` in kernels/vp_kernels/gather_norm/kernel.py.
#include "operator.hpp"

namespace vp {
namespace {

Plan gatherNorm(int sm, Fields const& fields, std::vector<Tensor> const& given, bool image, bool residual, bool extra) {
  Tensor const& x = given[0];
  Shape const& index = given[1].shape;
  auto const B = x.shape[0], N = x.shape[1], D = x.shape[2], K = index.back();
  std::size_t const own = 4, behind = own + residual;
  auto const E = extra ? given[behind].shape[1] : 0;
  require(!image || index[0] == B, "an index of shape " + text(index), "[B, K]");
  require(given[2].shape == Shape{D} && given[3].shape == Shape{D}, "weight and bias of another width", "[D], as x");
  require(!residual || given[own].shape == x.shape, "a residual of another shape", text(x.shape) + ", as x");
  require(!extra || (given[behind].shape[0] == B && given[behind].shape[2] == D), "extra rows of another shape",
          "[B, E, D]");
  Symbols sizes;
  sizes.B = B, sizes.N = N, sizes.K = K, sizes.E = E, sizes.D = D;
  Plan plan;
  if (K + E == 0) return plan;
  Entry const& entry = find(
      sm, {"gather_norm", "", x.dtype, {{"HAS_RESIDUAL", residual}, {"HAS_EXTRA", E > 0}, {"INDEX_PER_IMAGE", image}}},
      sizes);
  plan.calls.push_back({&entry,
                        sizes,
                        {{"x_ptr", input(0)},
                         {"index_ptr", input(1)},
                         {"weight_ptr", input(2)},
                         {"bias_ptr", input(3)},
                         {"residual_ptr", residual ? input(own) : absent()},
                         {"extra_ptr", E > 0 ? input(behind) : absent()},
                         {"kept_ptr", output(0)},
                         {"normed_ptr", output(1)},
                         {"rows", number(B * (K + E))},
                         {"tokens", number(N)},
                         {"kept", number(K)},
                         {"extras", number(E)},
                         {"eps", number(fields.find("eps")->second)}}});
  return plan;
}

}  // namespace

void addGatherNorm(std::vector<Operator>& to) {
  for (int flags = 0; flags < 8; ++flags) {
    bool const image = (flags & 4) != 0, residual = (flags & 2) != 0, extra = (flags & 1) != 0;
    Operator made;
    made.type =
        std::string("GatherNorm") + (image ? "Image" : "") + (residual ? "Residual" : "") + (extra ? "Extra" : "");
    made.fields = {{"eps", true, 0, 1}};
    made.inputs = {{Type::kTokens, 3}, {Type::kInt64, image ? 2 : 1}, {Type::kTokens, 1}, {Type::kTokens, 1}};
    if (residual) made.inputs.push_back({Type::kTokens, 3});
    if (extra) made.inputs.push_back({Type::kTokens, 3});
    made.outputs = [image, residual, extra](Fields const&) {
      Size rows = same(1, image ? 1 : 0);
      if (extra) rows.added = {{residual ? 5 : 4, 1}};
      Result const one{Type::kTokens, {same(0, 0), rows, same(0, 2)}};
      return std::vector<Result>{one, one};
    };
    made.plan = [image, residual, extra](int sm, Fields const& fields, std::vector<Tensor> const& given) {
      return gatherNorm(sm, fields, given, image, residual, extra);
    };
    to.push_back(std::move(made));
  }
}

}  // namespace vp
