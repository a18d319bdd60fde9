// vp::MergeRows, mirrors `launch_merge_rows` in kernels/vp_kernels/merge_rows/kernel.py.
#include "operator.hpp"

namespace vp {
namespace {

Plan plan(int sm, Fields const& fields, std::vector<Tensor> const& given, bool hasSource, bool hasKeep) {
  auto const B = given[0].shape[0], rows = given[1].shape[1], sources = given[2].shape[1];
  require(rows == at(fields, "rows"), std::to_string(rows) + " rows that stay",
          std::to_string(at(fields, "rows")) + ", the node's rows");
  std::size_t next = 4;
  auto const weight = hasSource ? input(next++) : absent(), own = hasKeep ? input(next) : absent();
  for (std::size_t each = 1; each < given.size(); ++each) {
    bool const ofKept = each == 1 || (hasKeep && each + 1 == given.size());
    require(given[each].shape == Shape({B, ofKept ? rows : sources}),
            "input " + std::to_string(each) + " of shape " + text(given[each].shape),
            text({B, ofKept ? rows : sources}));
  }
  Plan found;
  found.calls.push_back(mergeRows(
      sm, given[0], rows, sources, hasSource, hasKeep,
      {{"keep", input(1)}, {"source", input(2)}, {"into", input(3)}, {"source_weight", weight}, {"keep_weight", own}}));
  return found;
}

}  // namespace

Call mergeRows(int sm, Tensor const& x, std::int64_t rows, std::int64_t sources, bool hasSourceWeight,
               bool hasKeepWeight, std::map<std::string_view, Argument> arguments) {
  Symbols sizes;
  sizes.B = x.shape[0], sizes.N = x.shape[1], sizes.D = x.shape[2], sizes.K = rows, sizes.R = sources;
  Entry const& entry = find(
      sm, {"merge_rows", "", x.dtype, {{"HAS_SOURCE_WEIGHT", hasSourceWeight}, {"HAS_KEEP_WEIGHT", hasKeepWeight}}},
      sizes);
  arguments["x"] = input(0);
  arguments["merged"] = output(0);
  arguments["mass"] = output(1);
  arguments["N"] = number(sizes.N);
  arguments["K"] = number(rows);
  arguments["R"] = number(sources);
  arguments["D"] = number(sizes.D);
  return {&entry, sizes, std::move(arguments)};
}

void addMergeRows(std::vector<Operator>& to) {
  for (bool hasSource : {false, true}) {
    for (bool hasKeep : {false, true}) {
      Operator made;
      made.type = std::string("MergeRows") + (hasSource ? "SourceWeight" : "") + (hasKeep ? "KeepWeight" : "");
      made.fields = {count("rows", 1, kMaxTokens)};
      made.inputs = {{Type::kTokens, 3}, {Type::kInt64, 2}, {Type::kInt64, 2}, {Type::kInt64, 2}};
      if (hasSource) made.inputs.push_back({Type::kFp32, 2});
      if (hasKeep) made.inputs.push_back({Type::kFp32, 2});
      made.outputs = [](Fields const&) {
        return std::vector<Result>{{Type::kTokens, {same(0, 0), same(1, 1), same(0, 2)}},
                                   {Type::kFp32, {same(0, 0), same(1, 1)}}};
      };
      made.plan = [hasSource, hasKeep](int sm, Fields const& fields, std::vector<Tensor> const& given) {
        return plan(sm, fields, given, hasSource, hasKeep);
      };
      to.push_back(std::move(made));
    }
  }
}

}  // namespace vp
