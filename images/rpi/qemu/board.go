package qemu

import (
	"fmt"
	"slices"
)

// A Board is a machine that QEMU plays.
type Board struct {
	Name    string
	Arch    string   // of the image that it starts
	Program string   // QEMU's
	Args    []string // what makes the machine
	SD      bool     // the card is an SD card; else a virtio disk
	Net     []string // the network interface, on the back end "net"
	Screen  []string // a display; nil if the machine has its own or none
	Console string   // the serial line, as the kernel calls it
	Cmdline string   // what the kernel needs beside, to live in this machine
	DTB     string   // the file of the slot with the device tree; "" if the machine brings its own
	Filter  []string // of config.txt
}

// tcg are the options by which QEMU's translator is fastest: several threads, and room so that it translates once.
func tcg(machine, cpu string, cores string) []string {
	return []string{"-machine", machine, "-cpu", cpu, "-smp", cores, "-m", "1024", "-accel", "tcg,thread=multi,tb-size=1024"}
}

var (
	virtioNet    = []string{"-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"}
	virtioScreen = []string{"-device", "virtio-gpu-pci"}
	usbNet       = []string{"-device", "usb-net,netdev=net,mac=b8:27:eb:4b:56:31"} // a local MAC would make it usb0
)

// Boards are the machines by name. The generic ones are the fast ones; those of the Pi have its devices.
var boards = []Board{
	{
		Name: "arm64", Arch: "arm64", Program: "qemu-system-aarch64", Args: tcg("virt", "max,pauth=off,sve=off", "2"),
		Net: virtioNet, Screen: virtioScreen, Console: "ttyAMA0",
	},
	{
		Name: "armhf", Arch: "armhf", Program: "qemu-system-arm", Args: tcg("virt,highmem=off", "cortex-a15", "2"),
		Net: virtioNet, Screen: virtioScreen, Console: "ttyAMA0",
	},
	{
		Name: "amd64", Arch: "amd64", Program: "qemu-system-x86_64", Args: tcg("q35", "max", "2"),
		Net: virtioNet, Screen: []string{"-vga", "std"}, Console: "ttyS0",
	},
	{
		Name: "raspi3b", Arch: "arm64", Program: "qemu-system-aarch64", Args: []string{"-machine", "raspi3b", "-accel", "tcg,thread=multi,tb-size=1024"},
		SD: true, Net: usbNet, Console: "ttyAMA0", DTB: "bcm2837-rpi-3-b.dtb", Filter: []string{"[pi3]"},
		Cmdline: "kh.nowatchdog", // QEMU resets at once when the watchdog is armed
	},
	{
		Name: "raspi0", Arch: "armel", Program: "qemu-system-arm", Args: []string{"-machine", "raspi0", "-accel", "tcg,tb-size=512"},
		SD: true, Net: usbNet, Console: "ttyAMA0", DTB: "bcm2835-rpi-zero.dtb", Filter: []string{"[pi0]"},
		Cmdline: "kh.nowatchdog initcall_blacklist=bcm2835_power_driver_init",
	},
}

// FindBoard returns the machine of a name: arm64, armhf and amd64 are generic ones, raspi3b and raspi0 are Pis.
func FindBoard(name string) (Board, error) {
	i := slices.IndexFunc(boards, func(b Board) bool { return b.Name == name })
	if i < 0 {
		return Board{}, fmt.Errorf("qemu: no machine %q", name)
	}
	return boards[i], nil
}
