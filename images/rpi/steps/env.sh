# What build and lock have in common. Sourced with $here set. The compiler is part of what makes the bytes: it is the makefile's.
export GOTOOLCHAIN=${GOTOOLCHAIN:-$(sed -n 's/^toolchain //p' "$here/../../go.mod")+auto}
export ARCH=${ARCH:-arm64} SUITE=${SUITE:-trixie} KERNEL=${KERNEL:-stable}
GO=${GO:-go} DIST=${DIST:-dist/image} BUILD=${BUILD:-build/image}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/keyhaven/image
mkdir -p "$cache/debs"
host=$(dpkg --print-architecture)
lock_name=$ARCH
[ "$KERNEL" = stable ] || lock_name=$ARCH-$KERNEL

# in_namespace runs a command with mounts and processes of its own: as root, or as the root of a user namespace.
in_namespace() {
	if [ "$(id -u)" -eq 0 ]; then
		unshare --mount --pid --fork --kill-child -- "$@"
	else
		unshare --user --map-auto --map-root-user --mount --pid --fork --kill-child -- "$@"
	fi
}
