package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// A Boot is what the firmware would start.
type Boot struct {
	Slot    int    // partition, from 1
	Trial   bool   // by the try-boot flag
	Kernel  string // files that were copied off the slot
	Initrd  string
	DTB     string // "" for machines that have their own
	Cmdline string // as the slot has it
}

// readAutoboot returns which partition autoboot.txt has the firmware start. See Raspberry Pi's documentation,
// "autoboot.txt": sections in brackets are filters, of which [all] holds always and [tryboot] with the try-boot flag alone.
// The file may have 512 bytes.
func readAutoboot(b []byte, tryboot bool) (int, error) {
	if len(b) > 512 {
		return 0, fmt.Errorf("autoboot.txt has %d bytes; the firmware reads 512", len(b))
	}
	part, holds, ab := 0, true, false
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			holds = line == "[all]" || line == "[tryboot]" && tryboot
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !holds || !ok || strings.HasPrefix(line, "#") {
			continue
		}
		switch key {
		case "boot_partition":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || n > 4 {
				return 0, fmt.Errorf("autoboot.txt: boot_partition=%s", value)
			}
			part = n
		case "tryboot_a_b":
			ab = value == "1"
		}
	}
	if part == 0 {
		return 0, errors.New("autoboot.txt names no boot_partition")
	}
	if !ab {
		return 0, errors.New("autoboot.txt lacks tryboot_a_b=1, without which try-boot reads tryboot.txt in place of config.txt")
	}
	return part, nil
}

// slotConfig is what the harness honours of a slot's config.txt.
type slotConfig struct{ kernel, initrd, cmdline string }

// readConfig reads config.txt for a machine that holds the filters in brackets, such as "[pi3]". What stands before the
// first filter and under [all] holds for all.
func readConfig(b []byte, filters ...string) slotConfig {
	c, holds := slotConfig{cmdline: "cmdline.txt"}, true
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			holds = line == "[all]"
			for _, f := range filters {
				holds = holds || line == f
			}
			continue
		}
		if !holds || strings.HasPrefix(line, "#") {
			continue
		}
		if words := strings.Fields(line); len(words) >= 2 && words[0] == "initramfs" {
			c.initrd = words[1]
		}
		switch key, value, _ := strings.Cut(line, "="); key {
		case "kernel":
			c.kernel = value
		case "cmdline":
			c.cmdline = value
		}
	}
	return c
}

// PlayFirmware reads off the disk what the Pi's firmware would start, with or without the try-boot flag, and copies it
// into dir. dtb is the name of the device tree to take along, "" for none. Where the slot that try-boot names cannot be
// read, the firmware starts the other, and so does this.
func PlayFirmware(d *Disk, dir string, tryboot bool, dtb string, filters ...string) (*Boot, error) {
	config, err := Extract(d, 1, filepath.Join(dir, "p1.fat"))
	if err != nil {
		return nil, err
	}
	auto, err := config.Read("autoboot.txt")
	if err != nil {
		return nil, err
	}
	slot, err := readAutoboot(auto, tryboot)
	if err != nil {
		return nil, err
	}
	b, err := readSlot(d, slot, dir, dtb, filters)
	if err != nil && tryboot {
		return PlayFirmware(d, dir, false, dtb, filters...)
	}
	if err != nil {
		return nil, fmt.Errorf("the firmware cannot start partition %d: %w", slot, err)
	}
	b.Trial = tryboot
	return b, nil
}

func readSlot(d *Disk, slot int, dir, dtb string, filters []string) (*Boot, error) {
	fat, err := Extract(d, slot, filepath.Join(dir, "slot.fat"))
	if err != nil {
		return nil, err
	}
	text, err := fat.Read("config.txt")
	if err != nil {
		return nil, err
	}
	c := readConfig(text, filters...)
	if c.kernel == "" || c.initrd == "" {
		return nil, errors.New("config.txt names no kernel or no initramfs")
	}
	cmdline, err := fat.Read(c.cmdline)
	if err != nil {
		return nil, err
	}
	b := &Boot{Slot: slot, Cmdline: strings.TrimSpace(string(cmdline))}
	for _, f := range []struct {
		name string
		to   *string
	}{{c.kernel, &b.Kernel}, {c.initrd, &b.Initrd}, {dtb, &b.DTB}} {
		if f.name == "" {
			continue
		}
		data, err := fat.Read(f.name)
		if err != nil {
			return nil, err
		}
		*f.to = filepath.Join(dir, "boot-"+filepath.Base(f.name))
		if err := os.WriteFile(*f.to, data, 0o600); err != nil {
			return nil, err
		}
	}
	return b, nil
}
