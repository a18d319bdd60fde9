// The C API: results, and that nothing is loaded from a bundle that is invalid or not for this machine.
#include <gtest/gtest.h>
#include <vp_engine/vp_engine.h>

#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "sample.hpp"

namespace {

using vp::testing::drop;
using vp::testing::Sample;
using vp::testing::set;

vp_engine_options verify_only() {
  vp_engine_options options = VP_ENGINE_OPTIONS_INIT;
  options.verify_only = 1;
  return options;
}

struct Opened {
  Opened(const Sample& sample, const vp_engine_options& options)
      : status(vp_engine_open(sample.path().c_str(), &options, &engine)) {}
  ~Opened() { vp_engine_close(engine); }
  vp_engine* engine = nullptr;
  vp_status status;
};

void expect_failure(vp_status status, vp_status wanted, const std::string& text) {
  EXPECT_EQ(status, wanted) << vp_engine_last_error();
  EXPECT_NE(std::string(vp_engine_last_error()).find(text), std::string::npos) << vp_engine_last_error();
}

TEST(Api, DescribesWithoutLoading) {
  const Sample sample;
  const Opened opened(sample, verify_only());
  ASSERT_EQ(opened.status, VP_OK) << vp_engine_last_error();
  vp_description description;
  ASSERT_EQ(vp_engine_describe(opened.engine, &description), VP_OK);
  EXPECT_STREQ(description.name, "tiny \xc5\xbc\xc3\xb3\xc5\x82w");
  EXPECT_STREQ(description.engine, "aoti");
  EXPECT_STREQ(description.precision, "fp32");
  EXPECT_STREQ(description.variant, "reduced");
  EXPECT_EQ(std::strlen(description.digest), 64U);
  EXPECT_EQ(description.max_batch, 64);
  ASSERT_EQ(description.input_count, 1U);
  EXPECT_STREQ(description.inputs[0].name, "images");
  EXPECT_EQ(description.inputs[0].rank, 4U);
  EXPECT_EQ(description.inputs[0].shape[0], -1);
  EXPECT_EQ(description.inputs[0].shape[3], 4);
  ASSERT_EQ(description.class_count, 2U);
  EXPECT_STREQ(description.classes[1], "dog");
  EXPECT_NE(std::string(description.json).find("\"digest\":\"" + std::string(description.digest) + "\""),
            std::string::npos);
  std::size_t bytes = 0;
  ASSERT_EQ(vp_engine_output_bytes(opened.engine, 0, 5, &bytes), VP_OK);
  EXPECT_EQ(bytes, 40U);
  expect_failure(vp_engine_output_bytes(opened.engine, 1, 5, &bytes), VP_ERROR_INPUT, "output 1; expected below 1");
  expect_failure(vp_engine_output_bytes(opened.engine, 0, 65, &bytes), VP_ERROR_INPUT, "65 images; expected 1 to 64");
  expect_failure(vp_engine_output_bytes(opened.engine, 0, 0, &bytes), VP_ERROR_INPUT, "0 images");
  vp_input input{};
  expect_failure(vp_engine_run(opened.engine, &input, 1, nullptr, 0), VP_ERROR_INPUT, "verify_only");
}

TEST(Api, NullPointersAndSenselessOptions) {
  vp_engine* engine = nullptr;
  expect_failure(vp_engine_open(nullptr, nullptr, &engine), VP_ERROR_INPUT, "null pointer");
  expect_failure(vp_engine_open("x", nullptr, nullptr), VP_ERROR_INPUT, "null pointer");
  expect_failure(vp_engine_describe(nullptr, nullptr), VP_ERROR_INPUT, "null pointer");
  expect_failure(vp_engine_run(nullptr, nullptr, 0, nullptr, 0), VP_ERROR_INPUT, "null pointer");
  vp_engine_close(nullptr);
  const Sample sample;
  const auto refuse = [&](auto change, const std::string& text) {
    vp_engine_options options = verify_only();
    change(options);
    const Opened opened(sample, options);
    expect_failure(opened.status, VP_ERROR_INPUT, text);
    EXPECT_EQ(opened.engine, nullptr);
  };
  refuse([](auto& options) { options.struct_size = 0; }, "struct_size 0");
  refuse([](auto& options) { options.variant = "both"; }, "variant 'both'; expected reduced or dense");
  refuse([](auto& options) { options.threads = -1; }, "threads -1");
  refuse([](auto& options) { options.runners = 65; }, "runners 65");
}

TEST(Api, WhatCannotRunHereIsRefusedBeforeItIsLoaded) {
  // The artefact is noise, so loading it would fail with another message.
  const vp_engine_options plain = VP_ENGINE_OPTIONS_INIT;
  const auto refuse = [&](const std::string& engine, vp_status status, const std::string& text) {
    const Sample sample(engine);
    expect_failure(Opened(sample, plain).status, status, text);
  };
  const bool aoti = std::string(vp_engine_backends()).find("aoti") != std::string::npos;
  refuse("ort", VP_ERROR_ENGINE_UNAVAILABLE, "the engine 'ort' of the bundle cannot run here: another engine");
  refuse("openvino", VP_ERROR_ENGINE_UNAVAILABLE, "export with --engine aoti");
  refuse("trt-rtx", VP_ERROR_ENGINE_UNAVAILABLE, "another engine");
  refuse("abacus", VP_ERROR_BUNDLE_INCOMPATIBLE, "for the engine 'abacus'; expected aoti or trt; upgrade");
  refuse("aoti", aoti ? VP_ERROR_BUNDLE_INCOMPATIBLE : VP_ERROR_ENGINE_UNAVAILABLE,
         aoti ? "compiled for another machine: torch 0.0, here 2." : "without libtorch");
  if (std::string(vp_engine_backends()).find("trt") == std::string::npos) {
    refuse("trt", VP_ERROR_ENGINE_UNAVAILABLE, "built without TensorRT; configure it with -DTENSORRT_ROOT");
  }
}

TEST(Api, AnotherMachinesEngine) {
  if (std::string(vp_engine_backends()).find("aoti") == std::string::npos) GTEST_SKIP() << "built without libtorch";
  const Sample sample;
  const auto refuse = [&](const std::string& requirements, vp_status status, const std::string& text) {
    sample.forge(set("/variants/reduced/requirements", requirements));
    expect_failure(Opened(sample, VP_ENGINE_OPTIONS_INIT).status, status, text);
  };
  refuse(R"({"device": "cpu", "platform": "linux-mips"})", VP_ERROR_BUNDLE_INCOMPATIBLE,
         "platform linux-mips, here linux-");
  refuse(R"({"device": "cpu", "cpu_flags": ["avx9000", 7]})", VP_ERROR_BUNDLE_INCOMPATIBLE, "a CPU with avx9000 7");
  refuse(R"({"device": "cuda"})", VP_ERROR_ENGINE_UNAVAILABLE, "compiled for a GPU");
}

TEST(Api, NoDenseBaseline) {
  const Sample sample;
  sample.forge(drop("/variants/dense"));
  vp_engine_options options = verify_only();
  options.variant = "dense";
  expect_failure(Opened(sample, options).status, VP_ERROR_BUNDLE_INCOMPATIBLE, "holds no dense baseline");
}

TEST(Api, SignaturesThatThisVersionCannotRun) {
  const Sample sample;
  sample.forge(set("/outputs/0/dtype", "\"float16\""));
  expect_failure(Opened(sample, verify_only()).status, VP_ERROR_BUNDLE_INCOMPATIBLE, "'logits' is float16");
  sample.forge(set("/outputs/0/shape", R"(["batch", "classes"])"));
  expect_failure(Opened(sample, verify_only()).status, VP_ERROR_BUNDLE_INCOMPATIBLE, "the first one alone dynamic");
}

TEST(Api, TheLastErrorIsOfTheThreadAndOneLine) {
  vp_engine* engine = nullptr;
  EXPECT_EQ(vp_engine_open("no\nsuch\tplace", nullptr, &engine), VP_ERROR_BUNDLE);
  const std::string here = vp_engine_last_error();
  EXPECT_EQ(here, "'no such place' is not there; expected the folder of a bundle (NAME.vpe)");
  std::thread([] {
    EXPECT_STREQ(vp_engine_last_error(), "");
    vp_engine* other = nullptr;
    vp_engine_open("elsewhere", nullptr, &other);
  }).join();
  EXPECT_EQ(vp_engine_last_error(), here);
}

TEST(Api, ManyThreadsOpenAtOnce) {
  const Sample sample;
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      const Opened opened(sample, verify_only());
      good += opened.status == VP_OK ? 1 : 0;
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(good, 8);
}

TEST(Api, ExitCodesAndVersion) {
  EXPECT_EQ(vp_engine_exit_code(VP_OK), 0);
  EXPECT_EQ(vp_engine_exit_code(VP_ERROR_BUNDLE_CORRUPT), 2);
  EXPECT_EQ(vp_engine_exit_code(VP_ERROR_ENGINE_UNAVAILABLE), 3);
  EXPECT_EQ(vp_engine_api_version(), VP_ENGINE_API_VERSION);
}

}  // namespace
