#!/bin/sh
# Install the Debian packages needed to build and test the C++ loader, unless all of them are present.
# Without root and sudo, prints what to install, and fails only if VP_REQUIRE_CPP is set (continuous integration).
set -u
packages=""
need() { # command or header, package
  command -v "$1" >/dev/null 2>&1 || [ -e "/usr/include/$1" ] || packages="$packages $2"
}
need cmake cmake
need ninja ninja-build
need g++ g++
need nlohmann/json.hpp nlohmann-json3-dev
need openssl/evp.h libssl-dev
need gtest/gtest.h libgtest-dev
[ -z "$packages" ] && exit 0
install="apt-get install -y -qq --no-install-recommends$packages"
if [ "$(id -u)" = 0 ]; then
  as_root=""
elif sudo -n true 2>/dev/null; then
  as_root="sudo -n"
else
  as_root="false"
fi
# shellcheck disable=SC2086
if [ "$as_root" != false ] && command -v apt-get >/dev/null 2>&1 &&
  { $as_root $install || { $as_root apt-get update -qq && $as_root $install; }; } >/dev/null 2>&1; then
  exit 0
fi
echo "the C++ loader is not built or tested: missing$packages; install them as root with 'apt-get install$packages'" >&2
[ -z "${VP_REQUIRE_CPP:-}" ]
