// vp-run: verify a bundle, run it on raw float32 tensors, print the top classes.
#include <vp_engine/vp_engine.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr const char* kUsage =
    R"(usage: vp-run BUNDLE [--describe]
       vp-run BUNDLE --input FILE [options]

FILE holds preprocessed images as raw float32, in the order [batch, channels, height, width] that --describe shows.

  --describe           verify every file and print what the bundle is, as JSON; nothing is loaded
  --input FILE         the images
  --name NAME          the input that they are for (default: the first one)
  --shape 8,3,224,224  their shape (default: as many images as the file holds)
  --dtype TYPE         their type (default and only one that engines take: float32)
  --output FILE        write the first output there, as raw float32
  --top K              likeliest classes to print for each image (default 1; 0: none)
  --variant NAME       reduced (default) or dense
  --threads N          CPU threads of one run (default: the runtime's choice)
  --runners N          runs at once on one engine (default 1)
  --parallel N         N threads, each of which takes one image after the other
Exit codes: 0 good, 2 bad input, 3 engine unavailable.
)";

[[noreturn]] void fail(const std::string& message, int code = 2) {
  std::cerr << "error: " << message << "\n";
  std::exit(code);
}

void check(vp_status status) {
  if (status != VP_OK) fail(vp_engine_last_error(), vp_engine_exit_code(status));
}

struct Arguments {
  std::string bundle, input, name, shape, dtype = "float32", output, variant = "reduced";
  bool describe = false;
  int top = 1, threads = 0, runners = 0, parallel = 0;
};

int number(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 0 || value > 1'000'000) {
    fail(option + " " + text + "; expected a whole number from 0");
  }
  return static_cast<int>(value);
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--help" || option == "-h") {
      std::cout << kUsage;
      std::exit(0);
    }
    if (option == "--describe") {
      arguments.describe = true;
      continue;
    }
    if (option.rfind("--", 0) != 0) {
      if (!arguments.bundle.empty()) fail("a second bundle, " + option + "; expected one; see vp-run --help");
      arguments.bundle = option;
      continue;
    }
    if (i + 1 == argc) fail(option + " is unknown or has no value; see vp-run --help");
    const std::string value = argv[++i];
    if (option == "--input")
      arguments.input = value;
    else if (option == "--name")
      arguments.name = value;
    else if (option == "--shape")
      arguments.shape = value;
    else if (option == "--dtype")
      arguments.dtype = value;
    else if (option == "--output")
      arguments.output = value;
    else if (option == "--variant")
      arguments.variant = value;
    else if (option == "--top")
      arguments.top = number(option, value);
    else if (option == "--threads")
      arguments.threads = number(option, value);
    else if (option == "--runners")
      arguments.runners = number(option, value);
    else if (option == "--parallel")
      arguments.parallel = number(option, value);
    else
      fail("unknown option " + option + "; see vp-run --help");
  }
  if (arguments.bundle.empty()) fail("no bundle given; expected vp-run NAME.vpe; see vp-run --help");
  if (arguments.input.empty() && !arguments.describe) fail("no --input given; pass --describe to see what it takes");
  return arguments;
}

vp_dtype dtype_of(const std::string& name) {
  const std::vector<std::string> names = {"float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8"};
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) fail("--dtype " + name + "; expected float32");
  return static_cast<vp_dtype>(found - names.begin() + VP_FLOAT32);
}

/// Content of a file, aligned for floats; `bytes` is its size.
std::vector<float> read_file(const std::string& path, std::size_t& bytes) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
  if (size < 0) fail("the input " + path + " cannot be read; expected a file of raw float32");
  bytes = static_cast<std::size_t>(size);
  std::vector<float> data(bytes / sizeof(float) + 1);
  file.seekg(0).read(reinterpret_cast<char*>(data.data()), size);
  if (!file) fail("the input " + path + " cannot be read; expected a file of raw float32");
  return data;
}

std::vector<std::int64_t> shape_of(const Arguments& arguments, const vp_tensor_info& info, std::size_t bytes) {
  std::vector<std::int64_t> shape(info.shape, info.shape + info.rank);
  if (!arguments.shape.empty()) {
    shape.clear();
    const char* rest = arguments.shape.c_str();
    while (true) {
      char* end = nullptr;
      shape.push_back(std::strtoll(rest, &end, 10));
      if (end == rest || (*end != ',' && *end != '\0') || shape.size() > VP_MAX_RANK) {
        fail("--shape " + arguments.shape + "; expected numbers, as in 8,3,224,224");
      }
      if (*end == '\0') return shape;
      rest = end + 1;
    }
  }
  const auto image = std::accumulate(shape.begin() + 1, shape.end(), std::int64_t{sizeof(float)}, std::multiplies<>());
  if (bytes == 0 || bytes % static_cast<std::size_t>(image) != 0) {
    fail("the input " + arguments.input + " has " + std::to_string(bytes) + " bytes; expected a multiple of " +
         std::to_string(image) + ", the size of one image as float32");
  }
  shape[0] = static_cast<std::int64_t>(bytes) / image;
  return shape;
}

void print_top(const vp_description& description, const float* scores, std::size_t count, std::size_t image, int top) {
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto shown = std::min(order.size(), static_cast<std::size_t>(top));
  std::partial_sort(
      order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end(),
      [&](std::size_t a, std::size_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
  for (std::size_t i = 0; i < shown; ++i) {
    const char* name = order[i] < description.class_count ? description.classes[order[i]] : "";
    std::printf("%zu\t%zu\t%.6f\t%s\n", image, order[i], static_cast<double>(scores[order[i]]), name);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments = parse(argc, argv);
  vp_engine_options options = VP_ENGINE_OPTIONS_INIT;
  options.variant = arguments.variant.c_str();
  options.threads = arguments.threads;
  options.runners = arguments.runners;
  options.verify_only = arguments.describe ? 1 : 0;
  vp_engine* opened = nullptr;
  check(vp_engine_open(arguments.bundle.c_str(), &options, &opened));
  const std::unique_ptr<vp_engine, void (*)(vp_engine*)> engine(opened, vp_engine_close);
  vp_description description;
  check(vp_engine_describe(engine.get(), &description));
  if (arguments.describe) {
    std::cout << description.json << "\n";
    return 0;
  }

  std::size_t bytes = 0;
  const auto images = read_file(arguments.input, bytes);
  const auto shape = shape_of(arguments, description.inputs[0], bytes);
  vp_input input{};
  input.name = arguments.name.empty() ? nullptr : arguments.name.c_str();
  input.dtype = dtype_of(arguments.dtype);
  input.rank = shape.size();
  std::copy(shape.begin(), shape.end(), input.shape);
  input.data = images.data();
  input.bytes = bytes;
  const std::int64_t batch = std::max<std::int64_t>(shape[0], 1);
  std::size_t image_bytes = 0;  // of one image's scores
  check(vp_engine_output_bytes(engine.get(), 0, std::max<std::int64_t>(description.min_batch, 1), &image_bytes));
  image_bytes /= static_cast<std::size_t>(std::max<std::int64_t>(description.min_batch, 1));
  // Check the batch before allocating memory for it.
  if (static_cast<std::size_t>(batch) > bytes) fail("--shape " + arguments.shape + " is larger than the file");
  std::vector<float> scores(image_bytes / sizeof(float) * static_cast<std::size_t>(batch));
  const std::size_t per_image = image_bytes / sizeof(float);

  if (arguments.parallel == 0) {
    const vp_output output{description.outputs[0].name, VP_FLOAT32, scores.data(), scores.size() * sizeof(float)};
    check(vp_engine_run(engine.get(), &input, 1, &output, 1));
  } else {
    std::atomic<std::int64_t> next{0};
    std::mutex failing;
    vp_status failure = VP_OK;
    std::string reason;
    const auto work = [&] {
      for (std::int64_t i = next++; i < batch; i = next++) {
        const auto index = static_cast<std::size_t>(i);
        vp_input one = input;
        one.shape[0] = 1;
        one.bytes = bytes / static_cast<std::size_t>(batch);
        one.data = images.data() + index * (one.bytes / sizeof(float));
        const vp_output output{description.outputs[0].name, VP_FLOAT32, scores.data() + index * per_image, image_bytes};
        if (const vp_status status = vp_engine_run(engine.get(), &one, 1, &output, 1); status != VP_OK) {
          const std::lock_guard<std::mutex> lock(failing);
          failure = status;
          reason = vp_engine_last_error();  // thread-local
          next = batch;
        }
      }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < arguments.parallel; ++i) threads.emplace_back(work);
    for (auto& thread : threads) thread.join();
    if (failure != VP_OK) fail(reason, vp_engine_exit_code(failure));
  }

  if (!arguments.output.empty()) {
    std::ofstream file(arguments.output, std::ios::binary);
    file.write(reinterpret_cast<const char*>(scores.data()),
               static_cast<std::streamsize>(scores.size() * sizeof(float)));
    if (!file.flush()) fail("the output " + arguments.output + " cannot be written");
  }
  for (std::size_t image = 0; image < static_cast<std::size_t>(batch); ++image) {
    print_top(description, scores.data() + image * per_image, per_image, image, arguments.top);
  }
  return 0;
}
