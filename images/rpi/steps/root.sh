#!/bin/bash
# The root file system and its squashfs, in the builder: /stage/root, /stage/root.squashfs. Packages are installed without
# running a program of the target architecture (dpkg's DPKG_ROOT, "chrootless").
set -euo pipefail
trap 'echo "image: ${0##*/} failed at line $LINENO" >&2' ERR
. /src/steps/arch.sh
root=/stage/root
rm -rf "$root" /stage/repo /stage/unpacked

# 1. Debian's packages.
mkdir /stage/repo
awk '$1 == "install" {print $4}' /stage/lock.txt | while read -r sum; do
	ln -s "/debs/$sum.deb" "/stage/repo/$sum.deb"
	dpkg-deb -f "/debs/$sum.deb"
	printf 'Filename: ./%s.deb\nSize: %s\nSHA256: %s\n\n' "$sum" "$(stat -Lc %s "/debs/$sum.deb")" "$sum"
done >/stage/repo/Packages
includes=$(awk '$1 == "install" {print $2}' /stage/lock.txt | paste -sd,)
mmdebstrap --quiet --mode=chrootless --architectures="$ARCH" --variant=custom --include="$includes" \
	--skip=check/chrootless,check/empty,cleanup/apt \
	--setup-hook='for d in bin sbin lib; do mkdir -p "$1/usr/$d"; ln -s "usr/$d" "$1/$d"; done' \
	--setup-hook='[ "$ARCH" != amd64 ] || { mkdir -p "$1/usr/lib64"; ln -s usr/lib64 "$1/lib64"; }' \
	"$SUITE" "$root" "deb [trusted=yes] copy:/stage/repo ./" ||
	{ echo "image: mmdebstrap could not install the packages" >&2; exit 1; }

# 2. What is only unpacked: into the system, or beside it, as the initramfs, the slot and the choice of modules take from it.
# Its status goes into dpkg's, so that the list of what the image has is whole.
mkdir /stage/unpacked
awk '$1 == "unpack" {print $2, $4}' /stage/lock.txt | while read -r package sum; do
	case $package in
	openssh-server | dosfstools | firmware-*) dpkg-deb -x "/debs/$sum.deb" "$root" ;;
	*) dpkg-deb -x "/debs/$sum.deb" /stage/unpacked ;;
	esac
	{
		dpkg-deb -f "/debs/$sum.deb" | sed '/^Package:/a Status: install ok installed'
		echo
	} >>"$root/var/lib/dpkg/status"
done
cp /stage/root/var/lib/dpkg/status /stage/dpkg-status
release=$(basename "$(echo /stage/unpacked/usr/lib/modules/*)")
echo "$release" >/stage/kernel-release
mkdir -p "$root/usr/lib/modules" "$root/usr/lib/firmware"
[ -e /stage/unpacked/lib ] || ln -s usr/lib /stage/unpacked/lib
depmod -b /stage/unpacked "$release"
/src/steps/modules.sh /stage/unpacked "$release" /src/modules.root "$root"
# The radio's settings for some boards come with the Pi's firmware.
[ -z "$firmware" ] || cp -a /stage/unpacked/usr/lib/firmware/. "$root/usr/lib/firmware/"
rm -rf "$root"/usr/lib/firmware/{cypress,brcm}/*pcie*
(cd /stage/unpacked && find usr/share/doc -name copyright -print0 | cpio -0 --quiet -pdm "$root")

# 3. What triggers and first boots would make.
cat "$root"/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
(cd "$root/etc/ssl/certs" && ln -sf ca-certificates.crt ../cert.pem)
cp "$root/usr/share/openssh/sshd_config" "$root/etc/ssh/sshd_config"
ln -sf dash "$root/usr/bin/sh"
ln -sfn ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
ln -sfn /usr/share/zoneinfo/Etc/UTC "$root/etc/localtime"

# 4. Our own.
cp -r --no-preserve=mode,ownership /src/rootfs/. "$root/"
(cd /src/rootfs && find . -type f -perm -u+x -exec chmod 755 "$root/{}" \;)
install -D -m 755 /stage/in/keyhaven-connector "$root/usr/bin/keyhaven-connector"
install -D -m 644 /stage/in/keyhaven-connector.service "$root/usr/lib/systemd/system/keyhaven-connector.service"
install -D -m 644 /stage/in/keyhaven-connector.sysctl.conf "$root/usr/lib/sysctl.d/60-keyhaven-connector.conf"
install -D -m 644 -t "$root/usr/share/keyhaven/update-keys" /stage/in/keys/*.pub
install -D -m 644 /stage/in/LICENSE "$root/usr/share/doc/keyhaven/copyright"
mkdir -p "$root"/data "$root"/boot/keyhaven "$root"/boot/slot "$root"/var/lib/systemd
printf 'IMAGE_ID=keyhaven-appliance\nIMAGE_VERSION=%s\n' "$VERSION" >>"$root/usr/lib/os-release"
: >"$root/usr/lib/clock-epoch"
/src/steps/harden.sh "$root"

# 5. The squashfs. Times are those of the sources.
rm -f /stage/root.squashfs
env -u SOURCE_DATE_EPOCH mksquashfs "$root" /stage/root.squashfs -noappend -quiet -no-progress -no-xattrs -comp zstd \
	-Xcompression-level 15 -b 256K -mkfs-time "$SOURCE_DATE_EPOCH" -all-time "$SOURCE_DATE_EPOCH" \
	-p '/dev/console c 600 0 0 5 1' -p '/dev/null c 666 0 0 1 3'
