# Fetches Debian packages into a cache and unpacks them, without installing them. Sourced by scripts that run programs or
# machines of them.
#
# Needs bash, apt and dpkg. Sets cache (a directory that runs may share) and expects work (a directory of this run)
# and die.

# shellcheck shell=bash disable=SC2154
cache=${VDPA_TESTBED_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vdpa-live-testbed}

# debian_mirror: prints the Debian archive: VDPA_TESTBED_MIRROR, or the first of apt's sources.
debian_mirror() {
    local mirror=${VDPA_TESTBED_MIRROR:-$( (cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list \
        /etc/apt/sources.list.d/*.list 2>/dev/null || true) |
        sed -nE 's#^(URIs: *|deb (\[[^]]*\] )?)([^ ]*/debian)/?( .*)?$#\3#p' | sed -n 1p)}
    [ -n "$mirror" ] || die 'no Debian archive in the sources of apt: set VDPA_TESTBED_MIRROR'
    echo "$mirror"
}

# apt_conf SUITE [deb-src]: prints the path of a private apt configuration: own sources, lists and an empty package database,
# so that every dependency of a package is fetched. Backports come before the release that they are for. deb-src is for source
# packages in the place of binary ones.
apt_conf() {
    local dir=$cache/apt/$1${2:+-$2} base suites=("${1%-backports}")
    [ "${suites[0]}" = "$1" ] || suites+=("$1")
    if [ -z "$(find "$dir/ok" -mmin -1440 2>/dev/null)" ] || [ "$(wc -l <"$dir/sources.list")" != ${#suites[@]} ]; then
        base=$(debian_mirror)
        mkdir -p "$dir"/{lists,cache/archives}/partial "$dir/none"
        : >"$dir/status"
        base="${2:-deb} [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $base"
        printf '%s main\n' "${suites[@]/#/$base }" >"$dir/sources.list"
        cat >"$dir/apt.conf" <<E
Dir::Etc::sourcelist "$dir/sources.list";
Dir::Etc::sourceparts "$dir/none";
Dir::Etc::preferences "$dir/none/x";
Dir::Etc::preferencesparts "$dir/none";
Dir::State "$dir";
Dir::State::Lists "$dir/lists";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Install-Recommends "false";
APT::Default-Release "$1";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
E
        apt-get -c "$dir/apt.conf" -qq update >&2 || die "apt-get update failed for $1"
        touch "$dir/ok"
    fi
    echo "$dir/apt.conf"
}

# unpack PACKAGE-FILE DIR: unpacks with the merged /usr of newer packages, whether the package has it or not.
unpack() {
    local link
    mkdir -p "$2"/usr/{lib,bin,sbin,lib64}
    for link in lib bin sbin lib64; do [ -e "$2/$link" ] || ln -s "usr/$link" "$2/$link"; done
    dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --keep-directory-symlink --no-same-owner
}

# fetch_root DIR SUITE PACKAGE...: the packages and what they depend on, unpacked in DIR, once.
fetch_root() {
    local root=$1 suite=$2 conf deb
    shift 2
    [ ! -f "$root/.ok" ] || return 0
    conf=$(apt_conf "$suite")
    rm -rf "$root" "$cache/apt/$suite"/cache/archives/*.deb
    apt-get -c "$conf" -qq -y -d install "$@" >"$work/apt.log" 2>&1 ||
        { cat "$work/apt.log" >&2 && die "could not fetch: $*"; }
    for deb in "$cache/apt/$suite"/cache/archives/*.deb; do unpack "$deb" "$root"; done
    rm -rf "$cache/apt/$suite"/cache/archives/*.deb "$root"/usr/share/{doc,man,locale,info,lintian}
    touch "$root/.ok"
}

# fetch_source SUITE PACKAGE=VERSION DIR: the files of a source package, as the archive has them, in DIR.
fetch_source() {
    local conf
    conf=$(apt_conf "$1" deb-src)
    mkdir -p "$3"
    (cd "$3" && apt-get -c "$conf" -qq source --download-only "$2" >&2) || die "no source of $2 in $1"
}

# root_of SUITE PACKAGE...: prints the directory in which fetch_root keeps a set of packages.
root_of() {
    local suite=$1
    shift
    printf '%s/root-%s-%s\n' "$cache" "$suite" "$(printf '%s ' "$@" | cksum | cut -d ' ' -f 1)"
}

# in_root ROOT NAME ARG...: runs a program of an unpacked root with the loader and the libraries of that root. Needs neither chroot
# nor root.
in_root() {
    local root=$1 name=$2 path
    shift 2
    path=$(type -P "$root/usr/bin/$name" || type -P "$root/usr/sbin/$name") || die "no $name in $root"
    "$root/usr/lib64/ld-linux-x86-64.so.2" --argv0 "$name" --library-path "$root/usr/lib/x86_64-linux-gnu" "$path" "$@"
}
