#!/bin/bash
# Copies the modules that a list names, with all that they need, and their indexes:
#
#   modules.sh FROM RELEASE LIST TO
#
# A line of the list is a module's name, or a directory below kernel/ with a slash at its end. What this kernel does not have
# is passed over: the list serves all architectures.
set -euo pipefail
trap 'echo "image: ${0##*/} failed at line $LINENO" >&2' ERR
from=$1 release=$2 list=$3 to=$4
source=$from/usr/lib/modules/$release target=$to/usr/lib/modules/$release
mkdir -p "$target"
[ -e "$to/lib" ] || ln -s usr/lib "$to/lib"
awk '
	NR == FNR { sub(/#.*/, ""); if ($1 ~ /\/$/) dirs["kernel/" $1]; else if ($1) names[$1]; next }
	{
		path = $1; sub(/:$/, "", path)
		name = path; sub(/.*\//, "", name); sub(/\.ko.*/, "", name); gsub(/-/, "_", name)
		want = name in names
		for (d in dirs) if (index(path, d) == 1) want = 1
		if (want) { sub(/:/, ""); for (i = 1; i <= NF; i++) print $i }
	}' "$list" "$source/modules.dep" | LC_ALL=C sort -u >"$target.list"
(cd "$source" && cpio --quiet -pdm "$target" <"$target.list")
rm "$target.list"
find "$target" -name '*.xz' -print0 | xargs -0 -r -P2 -n32 xz -d
find "$target" -name '*.zst' -print0 | xargs -0 -r -P2 -n32 zstd -q -d --rm
cp "$source"/modules.{order,builtin,builtin.modinfo} "$target"
depmod -b "$to" "$release"
# What only depmod reads, and what kmod finds in the binary forms.
rm -f "$target"/modules.{order,builtin,builtin.modinfo,devname.bin,symbols,symbols.bin}
