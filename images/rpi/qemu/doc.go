// Package qemu boots images of the appliance as a Raspberry Pi would, without one: it plays the firmware, which reads
// autoboot.txt, config.txt and the kernel off the card and knows the try-boot flag, runs the kernel in QEMU, and serves the
// card over NBD out of memory, with a record of every write from which the card can be had as a power cut would have left it.
//
// The tests that boot images carry the build tag "image"; see "make image-e2e" and "make image-check".
package qemu
