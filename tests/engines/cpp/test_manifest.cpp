// The manifest: paths, every field, consistency, versions.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "machine.hpp"
#include "manifest.hpp"
#include "sample.hpp"
#include "sha256.hpp"

namespace {

using vp::Json;
using vp::parse_manifest;
using vp::safe_path;
using vp::testing::expect_error;
using vp::testing::Sample;

std::string bytes_of(const Json& document) {
  Json full = document;
  full["digest"] = vp::sha256_hex(vp::canonical_json(document));
  return vp::canonical_json(full);
}

TEST(Paths, OnlyPlainRelativeOnes) {
  for (const char* good : {"a", "plan.json", "engine/model.pt2", "a/b/c/d/e/f/g/h", "A-b_c+1.tar.gz", "_x", "console.txt"}) {
    EXPECT_TRUE(safe_path(good)) << good;
  }
  for (const std::string bad :
       {"", "/", "/etc/hostname", "..", "../secret", "engine/../../secret", "engine/..", "./a", "a/", "a//b", ".hidden",
        "engine\\secret", "C:", "a:b", "a b", "a\n", "a.", "a..", "con", "CON.txt", "x/nul", "com1", "LPT9.x", "\xc5\xbc", "~",
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
  const auto manifest = parse_manifest(bytes_of(sample.document));
  EXPECT_EQ(manifest.name, "tiny \xc5\xbc\xc3\xb3\xc5\x82w");
  EXPECT_EQ(manifest.files.size(), 6U);
  EXPECT_EQ(manifest.batch->max, 64);
  EXPECT_EQ(manifest.inputs[0].shape, (std::vector<std::int64_t>{-1, 3, 4, 4}));
  EXPECT_EQ(manifest.classes[1], "dog");
  EXPECT_EQ(manifest.variants.at("dense").files[0], "dense/model.pt2");
}

TEST(Manifest, AnyFieldThatIsMissingUnknownOrWrong) {
  const Sample sample;
  using Change = std::function<void(Json&)>;
  const auto set = [](const char* pointer, Json value) {
    return Change([=](Json& document) { document[Json::json_pointer(pointer)] = value; });
  };
  const auto drop = [](const char* pointer, const char* key) {
    return Change([=](Json& document) { document[Json::json_pointer(pointer)].erase(key); });
  };
  const std::vector<std::pair<Change, std::string>> cases = {
      {set("/extra", 1), "extra is unknown to format 1.0"},
      {set("/engine/extra", 1), "engine.extra is unknown"},
      {set("/variants/third", Json::object()), "variants.third is unknown"},
      {drop("/engine", "name"), "engine.name is missing"},
      {set("/name", ""), "name is \"\""},
      {set("/name", "a\x01"), "name is"},
      {set("/name", std::string(201, 'x')), "1 to 200 characters"},
      {set("/name", 5), "name is 5"},
      {set("/created", "2026-02-30T00:00:00Z"), "created is"},
      {set("/created", "2026-11-21 03:24:00Z"), "created is"},
      {set("/tool/version", nullptr), "tool.version is null"},
      {set("/engine/precision", "int8"), "'fp32' or 'fp16' or 'bf16'"},
      {set("/engine/device", "tpu"), "'cpu' or 'cuda'"},
      {set("/engine/batch/opt", 65), "not in order"},
      {set("/engine/batch/min", 0), "from 1 to 2147483647"},
      {set("/engine/batch/min", 1.0), "engine.batch.min is 1.0"},
      {set("/engine/batch/min", true), "engine.batch.min is true"},
      {set("/files", Json::array()), "files has 0 items"},
      {set("/files/0/size", -1), "files.0.size is -1"},
      {set("/files/0/size", (std::int64_t{32} << 30) + 1), "files.0.size is"},
      {set("/files/0/size", 18446744073709551615U), "files.0.size is"},
      {set("/files/0/sha256", std::string(64, 'A')), "64 hexadecimal digits"},
      {set("/files/0/path", "../x"), "unsafe path '../x'"},
      {set("/files/0/path", 7), "expected a path"},
      {set("/variants/reduced/files", Json::array()), "variants.reduced.files has 0 items"},
      {set("/variants/reduced/files/0", "dense/model.pt2"), "not a listed file in engine/"},
      {set("/variants/reduced/files/0", "engine/none"), "not a listed file"},
      {set("/variants/reduced/artefact", "plan.json"), "not among its files"},
      {set("/variants/reduced/requirements", 5), "variants.reduced.requirements is 5"},
      {drop("/variants", "reduced"), "no 'reduced'"},
      {set("/inputs", Json::array()), "inputs has 0 items"},
      {set("/inputs/0/shape/1", 4), "the preprocessing makes"},
      {set("/inputs/0/shape/1", 0), "inputs.0.shape.1 is 0"},
      {set("/outputs", "x"), "outputs is \"x\""},
      {set("/preprocessing/input_size", Json::array({3, 4})), "input_size has 2 items"},
      {set("/preprocessing/input_size/0", 4), "preprocessing.input_size.0"},
      {set("/preprocessing/std/0", 0.0), "above 0"},
      {set("/preprocessing/crop_mode", "x"), "crop_mode"},
      {set("/preprocessing/resize", Json::array({1, 2, 3})), "resize has 3 items"},
      {set("/classes", Json::array({"cat"})), "1 class names for a model of 2 classes"},
      {set("/classes/0", std::string(4001, 'x')), "at most 4000"},
      {set("/model/num_classes", -1), "model.num_classes is -1"},
      {set("/model/weights_sha256", "x"), "64 hexadecimal digits"},
      {set("/plan/path", "none.json"), "the plan 'none.json' is not a listed file"},
      {set("/plan/tokens", Json::array({Json::array({-1})})), "plan.tokens.0.0 is -1"},
      {set("/validation/status", "x"), "validation.status"},
      {set("/kernels", ""), "kernels is"},
      {set("/format", "zip"), "format 'zip'; expected 'vpe'"},
      {set("/format_version", "1"), "two numbers, as in '1.0'"},
      {set("/format_version", "01.0"), "two numbers"},
      {set("/format_version", 1.0), "two numbers"},
  };
  for (const auto& [change, text] : cases) {
    SCOPED_TRACE(text);
    Json document = sample.document;
    change(document);
    expect_error(VP_ERROR_BUNDLE_CORRUPT, text, [&, &d = document] { parse_manifest(bytes_of(d)); });
  }
}

TEST(Manifest, NamesThatClash) {
  const Sample sample;
  const auto with = [&](const std::string& path) {
    Json document = sample.document;
    document["files"].push_back({{"path", path}, {"size", 0}, {"sha256", std::string(64, '0')}});
    return bytes_of(document);
  };
  for (const char* path : {"Plan.json", "plan.json", "MANIFEST.json"}) {
    expect_error(VP_ERROR_BUNDLE_CORRUPT, "where case is ignored", [&] { parse_manifest(with(path)); });
  }
  for (const char* path : {"Engine/x", "plan.json/x", "engine/model.pt2/x"}) {
    expect_error(VP_ERROR_BUNDLE_CORRUPT, "clashes", [&] { parse_manifest(with(path)); });
  }
}

TEST(Manifest, TooManyFiles) {
  const Sample sample;
  Json document = sample.document;
  for (int i = 0; i < 1000; ++i) {
    document["files"].push_back({{"path", "f" + std::to_string(i)}, {"size", 0}, {"sha256", std::string(64, '0')}});
  }
  expect_error(VP_ERROR_BUNDLE_CORRUPT, "files has 1006 items", [&] { parse_manifest(bytes_of(document)); });
}

TEST(Manifest, Versions) {
  const Sample sample;
  Json document = sample.document;
  document["format_version"] = "2.0";
  document["whatever"] = 1;
  expect_error(VP_ERROR_BUNDLE_INCOMPATIBLE, "has format version 2.0; expected 1.x; upgrade",
               [&] { parse_manifest(bytes_of(document)); });
  document["format_version"] = "0.9";
  expect_error(VP_ERROR_BUNDLE_INCOMPATIBLE, "export the model again", [&] { parse_manifest(bytes_of(document)); });
  document["format_version"] = "1.1";  // a newer minor version may add members and variants
  document["engine"]["new"] = 1;
  document["variants"]["third"] = {{"what", 1}};
  EXPECT_EQ(parse_manifest(bytes_of(document)).variants.size(), 2U);
  document["engine"]["precision"] = 5;  // but not change those that there are
  expect_error(VP_ERROR_BUNDLE_CORRUPT, "engine.precision", [&] { parse_manifest(bytes_of(document)); });
}

TEST(Manifest, EveryFlippedBitIsFoundOrMeansNothing) {
  const Sample sample;
  const std::string sound = bytes_of(sample.document);
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
