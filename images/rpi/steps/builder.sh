#!/bin/bash
# Makes the builder, a root file system with the suite's tools, and runs a command in it with the sources at /src, the work
# directory at /stage and the package cache at /debs. Called inside the namespaces that build sets up, as their root:
#
#   builder.sh ROOT LOCK DEBS SRC WORK COMMAND...
set -euo pipefail
trap 'echo "image: ${0##*/} failed at line $LINENO" >&2' ERR
root=$1 lock=$2 debs=$3 src=$4 work=$5
shift 5

# A flat repository of the packages that a lock file has for "install".
repository() { # lock, debs, directory
	rm -rf "$3" && mkdir -p "$3"
	awk '$1 == "install" {print $4}' "$1" | while read -r sum; do
		ln -s "$2/$sum.deb" "$3/$sum.deb"
		dpkg-deb -f "$2/$sum.deb"
		printf 'Filename: ./%s.deb\nSize: %s\nSHA256: %s\n\n' "$sum" "$(stat -Lc %s "$2/$sum.deb")" "$sum"
	done >"$3/Packages"
}

exec 9>"$root.lock"
flock 9
stamp=$(sha256sum <"$lock" | cut -c1-64)
if [ "$(cat "$root/.stamp" 2>/dev/null)" != "$stamp" ]; then
	echo "image: making the builder" >&2
	rm -rf "$root" "$root.new" "$root.repo"
	repository "$lock" "$debs" "$root.repo"
	includes=$(awk '$1 == "install" {print $2}' "$lock" | paste -sd,)
	# No package starts anything while it is set up.
	mmdebstrap --quiet --mode=root --variant=custom --skip=check/empty,cleanup/apt --include="$includes" \
		"$SUITE" "$root.new" "deb [trusted=yes] copy:$root.repo ./" ||
		{ echo "image: mmdebstrap could not make the builder" >&2; exit 1; }
	rm -rf "$root.repo" "$root.new/var/cache/apt/archives"/*.deb
	echo "$stamp" >"$root.new/.stamp"
	mv "$root.new" "$root"
fi
exec 9>&-

mkdir -p "$root/src" "$root/stage" "$root/debs"
mount --bind "$src" "$root/src"
mount --bind "$work" "$root/stage"
mount --bind "$debs" "$root/debs"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 TZ=UTC HOME=/root \
	SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" SUITE="$SUITE" ARCH="$ARCH" KERNEL="${KERNEL:-stable}" VERSION="$VERSION" \
	chroot "$root" "$@"
