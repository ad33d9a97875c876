#!/bin/bash
# The initramfs, in the builder: /stage/initrd.img. Our init, busybox, the modules that a card may hang on, and the programs that
# look after the file systems, with the libraries they were linked to.
set -euo pipefail
trap 'echo "image: ${0##*/} failed at line $LINENO" >&2' ERR
root=/stage/root tree=/stage/initrd release=$(cat /stage/kernel-release)
rm -rf "$tree"
mkdir -p "$tree"/{dev,proc,sys,run,new,slot,etc,usr/bin,usr/lib}
ln -s usr/bin "$tree/bin"
ln -s usr/bin "$tree/sbin"
ln -s usr/lib "$tree/lib"
install -m 755 /src/initramfs/init "$tree/init"
install -m 644 /src/initramfs/*.sh "$tree/etc/"
install -m 755 /stage/unpacked/usr/bin/busybox "$tree/bin/busybox"
for applet in sh modprobe; do ln -s busybox "$tree/bin/$applet"; done
ln -s ../proc/mounts "$tree/etc/mtab"

# The closure of what the programs need, by their own word.
queue=()
for program in e2fsck mke2fs resize2fs fsck.fat; do
	install -m 755 "$root/usr/sbin/$program" "$tree/bin/$program"
	queue+=("$tree/bin/$program")
done
cp "$root/etc/mke2fs.conf" "$tree/etc/"
# A Raspberry Pi starts in 1970: times in the future are no damage.
printf '[options]\nbroken_system_clock = true\n' >"$tree/etc/e2fsck.conf"
while [ ${#queue[@]} -gt 0 ]; do
	file=${queue[0]} queue=("${queue[@]:1}")
	for library in $(grep -aoE '(lib[a-z0-9_]+\.so\.[0-9]+|ld-linux[a-z0-9-]*\.so\.[0-9]+)' "$file" | sort -u); do
		found=$(compgen -G "$root/usr/lib/*-linux-*/$library" | sed -n 1p) || continue
		# As the loader looks for it: a path below /lib that holds in the system holds here, too.
		target=$tree${found#"$root"}
		[ ! -e "$target" ] || continue
		mkdir -p "$(dirname "$target")"
		cp -L "$found" "$target"
		queue+=("$target")
	done
done
# The loader is named by a link.
(cd "$root" && { find usr/lib usr/lib64 -maxdepth 1 -name "ld-linux*" 2>/dev/null || true; } | cpio --quiet -pdm "$tree")
[ ! -e "$tree/usr/lib64" ] || ln -s usr/lib64 "$tree/lib64"

/src/steps/modules.sh /stage/unpacked "$release" /src/modules.initrd "$tree"
# busybox reads the text forms.
rm -f "$tree/usr/lib/modules/$release"/*.bin

find "$tree" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
(cd "$tree" && find . -mindepth 1 -print0 | LC_ALL=C sort -z | cpio -0 --quiet -o -H newc --reproducible -R 0:0) | gzip -9n >/stage/initrd.img
