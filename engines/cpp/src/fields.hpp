// Read a JSON object member by member, with strict types; members never asked for are an error.
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

/// One value of a manifest and its location, such as "variants.reduced.files.0". Every check throws Error (corrupt).
class Field {
 public:
  Field(const Json& value, std::string where) : value_(value), where_(std::move(where)) {}

  [[noreturn]] void refuse(const std::string& expected) const;

  const Json& json() const { return value_; }
  const std::string& where() const { return where_; }
  bool is_null() const { return value_.is_null(); }

  /// String of at most `most` characters.
  const std::string& text(std::size_t most = 4000) const;
  /// String of 1 to 200 characters without control characters.
  const std::string& name() const;
  const std::string& one_of(std::initializer_list<std::string_view> words) const;
  const std::string& sha256() const;
  /// A path accepted by safe_path.
  const std::string& path() const;
  std::int64_t whole(std::int64_t least = 1, std::int64_t most = kMaxPositive) const;
  double number() const;
  /// Items of an array, of bounded length (`most` 0: any).
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
  /// null if the member is absent.
  Field maybe(const char* name);
  /// Throws if a member was not asked for, unless `newer`: a later minor version may have unknown members.
  void done(bool newer) const;

 private:
  std::string below(const std::string& name) const;

  Field object_;
  std::set<std::string> asked_;
};

}  // namespace vp
