// The manifest: paths, every field, consistency, versions.
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "machine.hpp"
#include "manifest.hpp"
#include "sample.hpp"

namespace {

using vp::parse_manifest;
using vp::safe_path;
using vp::testing::drop;
using vp::testing::expect_error;
using vp::testing::Sample;
using vp::testing::set;
using vp::testing::text;

TEST(Paths, OnlyPlainRelativeOnes) {
  for (const char* good :
       {"a", "plan.json", "engine/model.pt2", "a/b/c/d/e/f/g/h", "A-b_c+1.tar.gz", "_x", "console.txt"}) {
    EXPECT_TRUE(safe_path(good)) << good;
  }
  for (const std::string bad : {"",
                                "/",
                                "/etc/hostname",
                                "..",
                                "../secret",
                                "engine/../../secret",
                                "engine/..",
                                "./a",
                                "a/",
                                "a//b",
                                ".hidden",
                                "engine\\secret",
                                "C:",
                                "a:b",
                                "a b",
                                "a\n",
                                "a.",
                                "a..",
                                "con",
                                "CON.txt",
                                "x/nul",
                                "com1",
                                "LPT9.x",
                                "\xc5\xbc",
                                "~",
                                "a/b/c/d/e/f/g/h/i"}) {
    EXPECT_FALSE(safe_path(bad)) << bad;
  }
  EXPECT_FALSE(safe_path(std::string("secret\0", 7)));
  EXPECT_TRUE(safe_path(std::string(128, 'a')));
  EXPECT_FALSE(safe_path(std::string(129, 'a')));
  EXPECT_FALSE(safe_path(std::string(127, 'a') + "/" + std::string(127, 'a') + "/" + std::string(127, 'a') + "/" +
                         std::string(127, 'a')));
}

TEST(Manifest, ASoundOne) {
  const Sample sample;
  const auto manifest = parse_manifest(sample.patched("[]"));
  EXPECT_EQ(manifest.name, "tiny \xc5\xbc\xc3\xb3\xc5\x82w");
  EXPECT_EQ(manifest.files.size(), 6U);
  EXPECT_EQ(manifest.batch->max, 64);
  EXPECT_EQ(manifest.inputs[0].shape, (std::vector<std::int64_t>{-1, 3, 4, 4}));
  EXPECT_EQ(manifest.classes[1], "dog");
  EXPECT_EQ(manifest.variants.at("dense").files[0], "dense/model.pt2");
}

TEST(Manifest, AnyFieldThatIsMissingUnknownOrWrong) {
  const Sample sample;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {set("/extra", "1"), "extra is unknown to format 1.0"},
      {set("/engine/extra", "1"), "engine.extra is unknown"},
      {set("/variants/third", "{}"), "variants.third is unknown"},
      {drop("/engine/name"), "engine.name is missing"},
      {set("/name", text("")), "name is \"\""},
      {set("/name", text("a\x01")), "name is"},
      {set("/name", text(std::string(201, 'x'))), "1 to 200 characters"},
      {set("/name", "5"), "name is 5"},
      {set("/created", text("2026-02-30T00:00:00Z")), "created is"},
      {set("/created", text("2026-11-21 03:24:00Z")), "created is"},
      {set("/tool/version", "null"), "tool.version is null"},
      {set("/engine/precision", text("int8")), "'fp32' or 'fp16' or 'bf16'"},
      {set("/engine/device", text("tpu")), "'cpu' or 'cuda'"},
      {set("/engine/batch/opt", "65"), "not in order"},
      {set("/engine/batch/min", "0"), "from 1 to 2147483647"},
      {set("/engine/batch/min", "1.0"), "engine.batch.min is 1.0"},
      {set("/engine/batch/min", "true"), "engine.batch.min is true"},
      {set("/files", "[]"), "files has 0 items"},
      {set("/files/0/size", "-1"), "files.0.size is -1"},
      {set("/files/0/size", "34359738369"), "files.0.size is"},
      {set("/files/0/size", "18446744073709551615"), "files.0.size is"},
      {set("/files/0/sha256", text(std::string(64, 'A'))), "64 hexadecimal digits"},
      {set("/files/0/path", text("../x")), "unsafe path '../x'"},
      {set("/files/0/path", "7"), "expected a path"},
      {set("/variants/reduced/files", "[]"), "variants.reduced.files has 0 items"},
      {set("/variants/reduced/files/0", text("dense/model.pt2")), "not a listed file in engine/"},
      {set("/variants/reduced/files/0", text("engine/none")), "not a listed file"},
      {set("/variants/reduced/artefact", text("plan.json")), "not among its files"},
      {set("/variants/reduced/requirements", "5"), "variants.reduced.requirements is 5"},
      {drop("/variants/reduced"), "no 'reduced'"},
      {set("/inputs", "[]"), "inputs has 0 items"},
      {set("/inputs/0/shape/1", "4"), "the preprocessing makes"},
      {set("/inputs/0/shape/1", "0"), "inputs.0.shape.1 is 0"},
      {set("/outputs", text("x")), "outputs is \"x\""},
      {set("/preprocessing/input_size", "[3, 4]"), "input_size has 2 items"},
      {set("/preprocessing/input_size/0", "4"), "preprocessing.input_size.0"},
      {set("/preprocessing/std/0", "0.0"), "above 0"},
      {set("/preprocessing/crop_mode", text("x")), "crop_mode"},
      {set("/preprocessing/resize", "[1, 2, 3]"), "resize has 3 items"},
      {set("/classes", "[\"cat\"]"), "1 class names for a model of 2 classes"},
      {set("/classes/0", text(std::string(4001, 'x'))), "at most 4000"},
      {set("/model/num_classes", "-1"), "model.num_classes is -1"},
      {set("/model/weights_sha256", text("x")), "64 hexadecimal digits"},
      {set("/plan/path", text("none.json")), "the plan 'none.json' is not a listed file"},
      {set("/plan/tokens", "[[-1]]"), "plan.tokens.0.0 is -1"},
      {set("/validation/status", text("x")), "validation.status"},
      {set("/kernels", text("")), "kernels is"},
      {set("/format", text("zip")), "format 'zip'; expected 'vpe'"},
      {set("/format_version", text("1")), "two numbers, as in '1.0'"},
      {set("/format_version", text("01.0")), "two numbers"},
      {set("/format_version", "1.0"), "two numbers"},
  };
  for (const auto& [patch, message] : cases) {
    SCOPED_TRACE(message);
    const std::string data = sample.patched(patch);
    expect_error(VP_ERROR_BUNDLE_CORRUPT, message, [&] { parse_manifest(data); });
  }
}

TEST(Manifest, NamesThatClash) {
  const Sample sample;
  const auto with = [&](const std::string& path) { return sample.patched(Sample::listing(path, "")); };
  for (const char* path : {"Plan.json", "plan.json", "MANIFEST.json"}) {
    expect_error(VP_ERROR_BUNDLE_CORRUPT, "where case is ignored", [&] { parse_manifest(with(path)); });
  }
  for (const char* path : {"Engine/x", "plan.json/x", "engine/model.pt2/x"}) {
    expect_error(VP_ERROR_BUNDLE_CORRUPT, "clashes", [&] { parse_manifest(with(path)); });
  }
}

TEST(Manifest, TooManyFiles) {
  const Sample sample;
  std::string many;
  const std::string entry = "\", \"size\": 0, \"sha256\": \"" + std::string(64, '0') + "\"}";
  for (int i = 0; i < 1001; ++i) many += (i == 0 ? "[{\"path\": \"f" : ", {\"path\": \"f") + std::to_string(i) + entry;
  expect_error(VP_ERROR_BUNDLE_CORRUPT, "files has 1001 items; expected 1 to 1000",
               [&] { parse_manifest(sample.patched(set("/files", many + "]"))); });
}

TEST(Manifest, Versions) {
  const Sample sample;
  const auto version = [&](const std::string& number, const std::string& more) {
    const std::string patch = set("/format_version", text(number));
    return sample.patched(patch.substr(0, patch.size() - 1) + more + "]");
  };
  const std::string unknown = R"(, {"op": "add", "path": "/engine/new", "value": 1},
    {"op": "add", "path": "/variants/third", "value": {"what": 1}})";
  expect_error(VP_ERROR_BUNDLE_INCOMPATIBLE, "has format version 2.0; expected 1.x; upgrade",
               [&] { parse_manifest(version("2.0", unknown)); });
  expect_error(VP_ERROR_BUNDLE_INCOMPATIBLE, "export the model again", [&] { parse_manifest(version("0.9", "")); });
  // A newer minor version may add members and variants, but not change existing ones.
  EXPECT_EQ(parse_manifest(version("1.1", unknown)).variants.size(), 2U);
  expect_error(VP_ERROR_BUNDLE_CORRUPT, "engine.precision", [&] {
    parse_manifest(version("1.1", R"(, {"op": "replace", "path": "/engine/precision", "value": 5})"));
  });
}

TEST(Manifest, EveryFlippedBitIsFoundOrMeansNothing) {
  const Sample sample;
  const std::string sound = sample.patched("[]");
  const auto digest = parse_manifest(sound).digest;
  int refused = 0;
  for (std::size_t position = 0; position < sound.size(); position += 3) {
    std::string data = sound;
    data[position] = static_cast<char>(data[position] ^ (1 << (position % 8)));
    try {
      EXPECT_EQ(parse_manifest(data).digest, digest);
    } catch (const vp::Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 500);
}

TEST(Manifest, TooLong) {
  expect_error(VP_ERROR_BUNDLE_CORRUPT, "bytes long; expected at most 8388608",
               [] { parse_manifest(std::string(vp::kMaxManifestBytes + 1, ' ')); });
}

TEST(Machine, Versions) {
  EXPECT_EQ(vp::version_numbers("2.11.0+cu130", 2), (std::vector<int>{2, 11}));
  EXPECT_EQ(vp::version_numbers("2.11.0+cu130", 5), (std::vector<int>{2, 11, 0}));
  EXPECT_EQ(vp::version_numbers("", 2), std::vector<int>{});
  EXPECT_EQ(vp::version_numbers("x", 2), std::vector<int>{});
  EXPECT_EQ(vp::version_numbers("99999999999999999999.1", 1).size(), 1U);
}

}  // namespace
