// Measurements of benchmarks/cpp_loader.py: the loader's overhead over torch's own. Prints one JSON object.
//
//   vp-bench run BUNDLE BATCH ROUNDS     microseconds of one run: bare AOTI runner, vp_engine_run
//   vp-bench open BUNDLE ROUNDS          milliseconds: sha256sum of every file and bare load, vp_engine_open
#include <ATen/Parallel.h>
#include <ATen/ops/rand.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <vp_engine/vp_engine.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;

void check(vp_status status) {
  if (status == VP_OK) return;
  std::fprintf(stderr, "error: %s\n", vp_engine_last_error());
  std::exit(vp_engine_exit_code(status));
}

double seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void print(const char* name, const std::vector<double>& values, const char* end) {
  std::printf("\"%s\": [", name);
  for (std::size_t i = 0; i < values.size(); ++i) std::printf("%s%.9f", i == 0 ? "" : ", ", values[i]);
  std::printf("]%s", end);
}

/// Interleaves the two, alternating which goes first, so that cache effects are shared equally.
void compare(int rounds, const std::function<void()>& bare, const std::function<void()>& ours) {
  std::vector<double> bare_times, our_times;
  for (int round = -2; round < rounds; ++round) {  // the first two are warm-up
    double one = 0, other = 0;
    if (round % 2 == 0) one = seconds(bare);
    other = seconds(ours);
    if (round % 2 != 0) one = seconds(bare);
    if (round < 0) continue;
    bare_times.push_back(one);
    our_times.push_back(other);
  }
  std::printf("{");
  print("bare", bare_times, ", ");
  print("ours", our_times, "}\n");
}

vp_engine* open(const std::string& bundle, int threads) {
  vp_engine_options options = VP_ENGINE_OPTIONS_INIT;
  options.threads = threads;
  vp_engine* engine = nullptr;
  check(vp_engine_open(bundle.c_str(), &options, &engine));
  return engine;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: vp-bench run BUNDLE BATCH ROUNDS | vp-bench open BUNDLE ROUNDS\n");
    return 2;
  }
  const std::string what = argv[1], bundle = argv[2], package = bundle + "/engine/model.pt2";
  const int threads = at::get_num_threads();
  if (what == "open") {
    const std::string hash = "find '" + bundle + "' -type f -print0 | xargs -0 sha256sum > /dev/null";
    compare(
        std::atoi(argv[3]),
        [&] {
          if (std::system(hash.c_str()) != 0) std::exit(1);
          const Loader loader(package, "model", false, 1, -1);
        },
        [&] { vp_engine_close(open(bundle, threads)); });
    return 0;
  }
  const std::unique_ptr<vp_engine, void (*)(vp_engine*)> engine(open(bundle, threads), vp_engine_close);
  Loader loader(package, "model", false, 1, -1);
  vp_description description;
  check(vp_engine_describe(engine.get(), &description));
  vp_input input{nullptr, VP_FLOAT32, description.inputs[0].rank, {}, nullptr, 0};
  std::copy_n(description.inputs[0].shape, input.rank, input.shape);
  input.shape[0] = std::atoi(argv[3]);
  const c10::InferenceMode no_gradients;
  const at::Tensor images = at::rand(at::IntArrayRef(input.shape, input.rank));
  input.data = images.const_data_ptr();
  input.bytes = images.nbytes();
  std::size_t bytes = 0;
  check(vp_engine_output_bytes(engine.get(), 0, input.shape[0], &bytes));
  std::vector<float> scores(bytes / sizeof(float));
  const vp_output output{nullptr, VP_FLOAT32, scores.data(), bytes};
  compare(
      std::atoi(argv[4]), [&] { loader.run({images}); },
      [&] { check(vp_engine_run(engine.get(), &input, 1, &output, 1)); });
  return 0;
}
