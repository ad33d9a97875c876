# What differs between the architectures. Sourced with $ARCH (and $KERNEL) set.
#
# virtual: what slot.json names besides the boards of the device trees. imager: tags of the Raspberry Pi Imager's list.
# shellcheck disable=SC2034 # used by those that source this

case $ARCH in
arm64)
	goarch=arm64 goarm=
	kernel=linux-image-arm64 dtbs='broadcom/bcm2837-rpi-*.dtb broadcom/bcm2711-rpi-*.dtb'
	firmware='start.elf fixup.dat start4.elf fixup4.dat' kernel_name=kernel8.img
	virtual=linux,dummy-virt
	imager='pi4-64bit pi3-64bit'
	# Newer kernels have what a Pi 5 starts from. Nobody has seen one start, so the Imager does not offer it.
	[ "${KERNEL:-stable}" != backports ] || dtbs="$dtbs broadcom/bcm2712-*.dtb"
	;;
armhf)
	goarch=arm goarm=7
	kernel=linux-image-armmp dtbs='bcm2836-rpi-*.dtb bcm2837-rpi-*.dtb bcm2711-rpi-*.dtb broadcom/bcm2836-rpi-*.dtb broadcom/bcm2837-rpi-*.dtb broadcom/bcm2711-rpi-*.dtb'
	firmware='start.elf fixup.dat start4.elf fixup4.dat' kernel_name=kernel7.img
	virtual=linux,dummy-virt
	imager='pi4-32bit pi3-32bit pi2-32bit'
	;;
armel)
	goarch=arm goarm=5
	kernel=linux-image-rpi dtbs='bcm2835-rpi-*.dtb broadcom/bcm2835-rpi-*.dtb'
	firmware='start.elf fixup.dat' kernel_name=kernel.img
	virtual=
	imager='pi1-32bit'
	;;
amd64)
	# A virtual machine, for trying things out and for tests: no firmware, the kernel is loaded from outside.
	goarch=amd64 goarm=
	kernel=linux-image-amd64 dtbs='' firmware='' kernel_name=vmlinuz virtual=pc imager=''
	;;
*)
	echo "image: unknown ARCH $ARCH: arm64, armhf, armel or amd64" >&2
	exit 2
	;;
esac
