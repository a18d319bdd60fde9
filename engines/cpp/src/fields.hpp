// Reading one JSON object member by member: types are strict, and a member that nobody asked for is an error.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "json.hpp"

namespace vp {

constexpr std::int64_t kMaxPositive = 2147483647;

/// One value of a manifest and where it stands, as "variants.reduced.files.0". Every check throws Error (corrupt).
class Field {
 public:
  Field(const Json& value, std::string where) : value_(value), where_(std::move(where)) {}

  [[noreturn]] void refuse(const std::string& expected) const;

  const Json& json() const { return value_; }
  const std::string& where() const { return where_; }
  bool is_null() const { return value_.is_null(); }

  /// Text of at most that many characters.
  const std::string& text(std::size_t most = 4000) const;
  /// Text of 1 to 200 characters without control characters.
  const std::string& name() const;
  const std::string& one_of(std::initializer_list<std::string_view> words) const;
  const std::string& sha256() const;
  /// A path that safe_path allows.
  const std::string& path() const;
  std::int64_t whole(std::int64_t least = 1, std::int64_t most = kMaxPositive) const;
  double number() const;
  /// The items of an array of that many (`most` 0: any number).
  std::vector<Field> items(std::size_t least = 0, std::size_t most = 0) const;
  std::vector<std::string> texts(std::size_t most = 4000) const;

 private:
  const Json& value_;
  std::string where_;
};

class Members {
 public:
  explicit Members(const Field& object);

  Field need(const char* name);
  /// null where the member is absent.
  Field maybe(const char* name);
  /// Throws where a member was not asked for; `newer`: a later minor version may have members that we do not know.
  void done(bool newer) const;

 private:
  std::string below(const std::string& name) const;

  Field object_;
  std::set<std::string> asked_;
};

}  // namespace vp
