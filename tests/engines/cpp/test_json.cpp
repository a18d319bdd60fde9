// JSON: rejected documents, and the encoding, compared with Python's json.dumps.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

#include "error.hpp"
#include "json.hpp"
#include "sha256.hpp"

namespace {

using vp::canonical_json;
using vp::parse_json;

std::string refused(const std::string& text) {
  try {
    parse_json(text);
  } catch (const std::invalid_argument& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    EXPECT_LT(std::string(error.what()).size(), 700U);
    return error.what();
  }
  return "";
}

std::string repeated(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

TEST(Json, WhatIsNoJsonIsRefused) {
  for (const std::string text : {"", "{", "{]", "nul", "{\"a\": NaN}", "{\"a\": Infinity}", "{\"a\": 1e999}",
                                 "{\"a\": 1,}", "{} {}", "{\"a\": \"\x01\"}", "{\"a\": \"\xff\"}",
                                 "{\"a\": \"\\ud800\"}", "// c\n{}", "{\"a\": 01}", "\xef\xbb\xbf{}"}) {
    EXPECT_NE(refused(text).find("JSON"), std::string::npos) << text;
  }
  EXPECT_NE(refused("[1]").find("expected a JSON object"), std::string::npos);
  EXPECT_NE(refused("null").find("expected a JSON object"), std::string::npos);
}

TEST(Json, AKeyGivenTwiceIsRefusedAtAnyDepth) {
  EXPECT_NE(refused(R"({"a": 1, "a": 1})").find("twice"), std::string::npos);
  EXPECT_NE(refused(R"({"x": [{"a": {"b": 1, "b": 2}}]})").find("twice"), std::string::npos);
  EXPECT_EQ(refused(R"({"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]})"), "");
}

TEST(Json, DepthIsBounded) {
  const auto nested = [](int levels) { return "{\"a\": " + repeated("[", levels) + repeated("]", levels) + "}"; };
  EXPECT_EQ(refused(nested(vp::kMaxJsonDepth - 1)), "");
  EXPECT_NE(refused(nested(vp::kMaxJsonDepth)).find("at most 32 levels"), std::string::npos);
  EXPECT_NE(refused(repeated("[", 4'000'000)), "");
  EXPECT_NE(refused(repeated("{\"a\":", 1'000'000)), "");
}

TEST(Json, TheByteFormIsPythons) {
  // json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n" of Python 3.11
  const std::string python =
      "{\n  \"A\": {},\n  \"a\": [\n    1,\n    -2,\n    0.5,\n    -0.0,\n    1.0,\n    1e-05,\n    0.0001,\n    "
      "1e+16,\n"
      "    1234567890123456.0,\n    1e+22,\n    5e-324,\n    1.7976931348623157e+308,\n    0.1,\n    123.456,\n"
      "    18446744073709551615\n  ],\n  \"b\": [],\n  \"\xc5\xbc\": \"\\\"\\\\/\\b\\f\\n\\r\\t\\u0001\x7f\xc3\xb3\",\n"
      "  \"\xf0\x9f\x90\xa2\": null\n}\n";
  EXPECT_EQ(canonical_json(parse_json(python)), python);
  EXPECT_EQ(canonical_json(parse_json("{\"a\":[10e-1,100e-2, 0.00001,1e15,-0],\"b\":true}")),
            "{\n  \"a\": [\n    1.0,\n    1.0,\n    1e-05,\n    1000000000000000.0,\n    0\n  ],\n  \"b\": true\n}\n");
}

TEST(Sha256, KnownAnswers) {  // FIPS 180-2
  EXPECT_EQ(vp::sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(vp::sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

TEST(Text, AStrangersTextIsMadePrintable) {
  EXPECT_EQ(vp::quote("a\n\x1b[2J\xc5\xbc"), "'a\\x0a\\x1b[2J\\xc5\\xbc'");
  EXPECT_EQ(vp::quote(std::string(500, 'x')), "'" + std::string(100, 'x') + "...'");
  EXPECT_EQ(vp::first_line("\n  first \nsecond"), "first ");
  EXPECT_EQ(vp::first_line(""), "no message");
}

}  // namespace
