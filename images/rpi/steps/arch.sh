# What differs between the architectures. Sourced with $ARCH (and $KERNEL) set.
#
# boards: the first "compatible" of the device trees that the slot can boot, for slot.json; "pc" and "linux,dummy-virt" are
# virtual machines. imager: the tags of the Raspberry Pi Imager's list.
board_list() { for b in "$@"; do echo "raspberrypi,$b"; done; }

case $ARCH in
arm64)
	goarch=arm64 goarm=
	kernel=linux-image-arm64 dtbs='broadcom/bcm2837-rpi-*.dtb broadcom/bcm2711-rpi-*.dtb'
	firmware='start.elf fixup.dat start4.elf fixup4.dat' kernel_name=kernel8.img
	boards="$(board_list 3-model-b 3-model-b-plus 3-model-a-plus 3-compute-module model-zero-2-w 4-model-b 400 4-compute-module) linux,dummy-virt"
	imager='pi4-64bit pi3-64bit'
	if [ "${KERNEL:-stable}" = backports ]; then
		dtbs="$dtbs broadcom/bcm2712-*.dtb"
		boards="$boards $(board_list 5-model-b 5-compute-module 500)"
		imager="pi5-64bit $imager"
	fi
	;;
armhf)
	goarch=arm goarm=7
	kernel=linux-image-armmp dtbs='bcm2836-rpi-*.dtb bcm2837-rpi-*.dtb bcm2711-rpi-*.dtb broadcom/bcm2836-rpi-*.dtb broadcom/bcm2837-rpi-*.dtb broadcom/bcm2711-rpi-*.dtb'
	firmware='start.elf fixup.dat start4.elf fixup4.dat' kernel_name=kernel7.img
	boards="$(board_list 2-model-b 3-model-b 3-model-b-plus 3-model-a-plus 3-compute-module model-zero-2-w 4-model-b 400 4-compute-module) linux,dummy-virt"
	imager='pi4-32bit pi3-32bit pi2-32bit'
	;;
armel)
	goarch=arm goarm=5
	kernel=linux-image-rpi dtbs='bcm2835-rpi-*.dtb broadcom/bcm2835-rpi-*.dtb'
	firmware='start.elf fixup.dat' kernel_name=kernel.img
	boards="$(board_list model-a model-a-plus model-b model-b-rev2 model-b-plus model-b-i2c0 compute-module model-zero model-zero-w)"
	imager='pi1-32bit'
	;;
amd64)
	# A virtual machine, for trying things out and for tests: no firmware, the kernel is loaded from outside.
	goarch=amd64 goarm=
	kernel=linux-image-amd64 dtbs='' firmware='' kernel_name=vmlinuz boards=pc imager=''
	;;
*)
	echo "image: unknown ARCH $ARCH: arm64, armhf, armel or amd64" >&2
	exit 2
	;;
esac
boards=$(echo $boards)
