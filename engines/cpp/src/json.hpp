// JSON as a stranger may send it: bounded, each key once, and in one byte form that Python's writer also makes.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace vp {

using Json = nlohmann::json;

constexpr int kMaxJsonDepth = 32;

/// Parse an object.
/// Throws std::invalid_argument (one line): no JSON, a key given twice, nested deeper than kMaxJsonDepth levels, no
/// object.
Json parse_json(std::string_view text);

/// The bytes of Python's json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) and a newline.
/// Whole numbers beyond 64 bits are no longer known as such after parsing and come out as floats do.
std::string canonical_json(const Json& document);

}  // namespace vp
