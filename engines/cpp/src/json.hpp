// JSON from untrusted sources: bounded, without duplicate keys; and the canonical encoding that Python also writes.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace vp {

using Json = nlohmann::json;

constexpr int kMaxJsonDepth = 32;

/// Parse an object.
/// Throws std::invalid_argument (one line) for invalid JSON, a duplicate key, nesting deeper than kMaxJsonDepth levels,
/// or a document that is not an object.
Json parse_json(std::string_view text);

/// Equals Python's json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) plus a newline.
/// Integers beyond 64 bits are parsed as floats and written as such.
std::string canonical_json(const Json& document);

}  // namespace vp
