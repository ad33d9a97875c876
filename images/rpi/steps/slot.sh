#!/bin/bash
# A slot, in the builder: /stage/slot.img, a FAT16 volume with all that a boot needs. It is the unit of an update.
set -euo pipefail
trap 'echo "image: ${0##*/} failed at line $LINENO" >&2' ERR
. /src/steps/arch.sh
tree=/stage/slot release=$(cat /stage/kernel-release)
rm -rf "$tree"
mkdir "$tree"
raspi=/stage/unpacked/usr/lib/raspi-firmware
for file in $firmware; do cp "$raspi/$file" "$tree/"; done
[ -z "$firmware" ] || cp /stage/unpacked/usr/share/doc/raspi-firmware/copyright "$tree/firmware-copyright.txt"

boards=$virtual
for pattern in $dtbs; do
	for dir in "/stage/unpacked/usr/lib/linux-image-$release" "/stage/unpacked/usr/lib/modules/$release/dtb" "/stage/unpacked/usr/lib/modules/$release/dtbs"; do
		for dtb in "$dir"/$pattern; do
			[ -e "$dtb" ] || continue
			cp "$dtb" "$tree/"
			# The first name in a device tree is the board's.
			boards="$boards $(grep -aoE 'raspberrypi,[a-z0-9-]+' "$dtb" | sed -n 1p)"
		done
	done
done
[ -z "$dtbs" ] || [ "$boards" != "$virtual" ] || { echo "image: the kernel package has none of the device trees $dtbs" >&2; exit 1; }

kernel_image=$(find /stage/unpacked -name 'vmlinuz*' -type f)
case $ARCH in
arm64) # The firmware unpacks it.
	gzip -9nc "$kernel_image" >"$tree/$kernel_name" ;;
*) cp "$kernel_image" "$tree/$kernel_name" ;;
esac
cp /stage/initrd.img "$tree/initrd.img"
mv /stage/root.squashfs "$tree/root.squashfs"

{
	echo "# Keyhaven $VERSION for $ARCH. This partition is replaced as a whole by updates: change nothing here."
	[ "$ARCH" != arm64 ] || echo 'arm_64bit=1'
	printf '%s\n' 'enable_uart=1' 'upstream_kernel=1' 'disable_splash=1' "kernel=$kernel_name" 'initramfs initrd.img'
} >"$tree/config.txt"
# Interfaces keep the kernel's names: eth0, wlan0.
echo 'console=tty1 panic=10 quiet loglevel=4 net.ifnames=0 systemd.show_status=0 consoleblank=0' >"$tree/cmdline.txt"
boards=$(printf '%s\n' $boards | LC_ALL=C sort -u)
printf '{"version":"%s","arch":"%s","boards":[%s],"built":"%s","format":1}\n' "$VERSION" "$ARCH" \
	"$(for b in $boards; do printf '"%s",' "$b"; done | sed 's/,$//')" "$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)" >"$tree/slot.json"

/src/steps/fat.sh /stage/slot.img 256 KH-SLOT 16 "$tree"
