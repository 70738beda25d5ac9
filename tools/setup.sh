# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Sourced by tools/quickstart, tools/test and .ci/run: installs what a build needs, and configures a build directory.
#
# Packages are installed on Debian 12, Ubuntu 22.04 and newer. Elsewhere it is enough that the same things are there:
# what is asked is the tools themselves, not the package database. If nothing is missing, nothing is installed and no
# network is needed.

# shellcheck disable=SC2034 # used by the scripts that source this one
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
meson_needed=1.0.1
meson_private=$root/build/venv # for distributions whose Meson is too old
meson_pinned=1.4.2

note() {
    printf '%s\n' "$*" >&2
}

die() {
    note "${0##*/}: $*"
    exit 1
}

can_be_root() {
    [ "$(id -u)" -eq 0 ] && return
    command -v sudo >/dev/null || return
    sudo -n true 2>/dev/null || [ -t 0 ] # with a terminal sudo can ask for the password
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# Waits for a lock that another package manager holds, and asks nothing.
apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" \
        </dev/null >&2
}

# Whether the Meson on PATH is new enough; puts the private one there if that one is.
find_meson() {
    local version
    version=$(meson --version 2>/dev/null) || version=0
    [ "$(printf '%s\n' "$meson_needed" "$version" | sort -V | head -n 1)" = "$meson_needed" ] && return
    [ -x "$meson_private/bin/meson" ] || return
    PATH=$meson_private/bin:$PATH
}

# The package that brings Meson: its own, or where that one is too old, what pip needs to fetch it.
meson_package() {
    local offered
    offered=$(apt-cache policy meson 2>/dev/null | awk '$1 == "Candidate:" { print $2 }')
    if [ -z "$offered" ] || dpkg --compare-versions "$offered" ge "$meson_needed"; then
        echo meson
    elif ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        echo python3-venv
    fi
}

# Prints the packages of what is missing.
missing_packages() {
    echo '#include <stdio.h>' | cc -E - >/dev/null 2>&1 || echo gcc libc6-dev
    echo '#include <cstdio>' | c++ -x c++ -E - >/dev/null 2>&1 || echo g++
    command -v ninja >/dev/null || echo ninja-build
    command -v python3 >/dev/null || echo python3
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists libcjson 2>/dev/null || echo libcjson-dev
    pkg-config --exists cmocka 2>/dev/null || echo libcmocka-dev
    find_meson || meson_package
}

# install_packages PACKAGE...
install_packages() {
    command -v apt-get >/dev/null ||
        die "this machine has no apt-get; install by hand what these Debian packages hold: $*"
    can_be_root ||
        die "some packages are missing and neither root nor sudo is at hand; run this as root, then try again:
    apt-get update && apt-get install -y $*"
    note "installing: $*"
    apt_get install --no-install-recommends "$@" ||
        die "apt-get could not install: $*
    its own message stands above; check the network and the package sources, then try again"
}

update_package_lists() {
    if ! command -v apt-get >/dev/null || ! can_be_root; then return 0; fi
    apt_get update && return
    note "apt-get update failed, trying once more"
    sleep 5
    apt_get update || note "apt-get update failed again; going on with the package lists that are here"
}

# Installs what is missing, and puts nvcc on PATH where its usual place has one.
setup() {
    local -a packages
    mapfile -t packages < <(missing_packages | tr ' ' '\n')
    if [ ${#packages[@]} -gt 0 ]; then
        update_package_lists
        # Once more, because only now is it known which Meson is on offer.
        mapfile -t packages < <(missing_packages | tr ' ' '\n')
        install_packages "${packages[@]}"
        # Only `moe bench` uses it, to measure what the CPU can do.
        apt_get install --no-install-recommends libopenblas0-pthread || note "no OpenBLAS: moe bench will say so"
    fi
    if ! find_meson; then
        note "the Meson here is older than $meson_needed; fetching $meson_pinned into ${meson_private#"$root"/}"
        { python3 -m venv "$meson_private" && "$meson_private/bin/pip" install -q "meson==$meson_pinned"; } ||
            die "no Meson >= $meson_needed; install it (for instance: pip install meson==$meson_pinned), then try again"
        find_meson || die "the Meson in $meson_private does not run; remove that directory and try again"
    fi
    if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then
        PATH=$PATH:/usr/local/cuda/bin
    fi
}

# configure DIRECTORY [MESON OPTION...]: makes the build directory, or makes it anew where the options or the presence of
# nvcc have changed.
configure() {
    local directory=$1 wanted log
    shift
    wanted="$* nvcc=$(command -v nvcc || true)"
    log=$directory/configure.log
    if [ -f "$directory/build.ninja" ]; then
        [ "$(cat "$directory/configured" 2>/dev/null)" != "$wanted" ] || return 0
        set -- --reconfigure "$@"
    fi
    note "configuring $directory"
    mkdir -p "$directory"
    if ! meson setup "$directory" "$root" "$@" >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        die "meson could not configure $directory; the reason stands above and in $log.
    If the directory is from another place or an older Meson: rm -rf $directory"
    fi
    printf '%s\n' "$wanted" >"$directory/configured"
}

# build DIRECTORY [TARGET...]
build() {
    ninja -C "$@" ||
        die "the build failed; the first error above says where. If it speaks of a compiler or file that is gone: rm -rf $1"
}
