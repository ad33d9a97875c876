package qemu

import (
	"strings"
	"testing"
)

func TestReadAutoboot(t *testing.T) {
	const ours = "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n"
	for _, c := range []struct {
		name, text string
		tryboot    bool
		want       int // 0: an error
	}{
		{"default", ours, false, 2},
		{"trial", ours, true, 3},
		{"the other way round", strings.NewReplacer("2", "3", "3", "2").Replace(ours), false, 3},
		{"line ends of Windows", strings.ReplaceAll(ours, "\n", "\r\n"), true, 3},
		{"empty", "", false, 0},
		{"no partition without the flag", "[tryboot]\nboot_partition=3\ntryboot_a_b=1\n", false, 0},
		{"not A/B", "[all]\nboot_partition=2\n[tryboot]\nboot_partition=3\n", true, 0},
		{"no number", "[all]\ntryboot_a_b=1\nboot_partition=two\n", false, 0},
		{"another model's section", "[all]\ntryboot_a_b=1\nboot_partition=2\n[cm4]\nboot_partition=4\n", false, 2},
		{"too long for the firmware", ours + strings.Repeat("#", 512), false, 0},
	} {
		got, err := readAutoboot([]byte(c.text), c.tryboot)
		if got != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("%s: got %d, %v; want %d", c.name, got, err, c.want)
		}
	}
}

func TestReadConfig(t *testing.T) {
	const text = "# ours\narm_64bit=1\nkernel=vmlinuz\ninitramfs initrd.img followkernel\n[pi5]\nkernel=vmlinuz-16k\n[pi3]\ncmdline=pi3.txt\n[all]\nenable_uart=1\n"
	for _, c := range []struct {
		filters []string
		want    slotConfig
	}{
		{nil, slotConfig{"vmlinuz", "initrd.img", "cmdline.txt"}},
		{[]string{"[pi3]"}, slotConfig{"vmlinuz", "initrd.img", "pi3.txt"}},
		{[]string{"[pi5]", "[pi3]"}, slotConfig{"vmlinuz-16k", "initrd.img", "pi3.txt"}},
	} {
		if got := readConfig([]byte(text), c.filters...); got != c.want {
			t.Errorf("%v: got %+v, want %+v", c.filters, got, c.want)
		}
	}
}

func TestCmdline(t *testing.T) {
	for _, c := range []struct{ slot, want string }{
		{"console=serial0,115200 console=tty1 quiet", "console=ttyS0,115200 console=tty1 quiet kh.part=3 more"},
		{"quiet", "console=ttyS0,115200 quiet kh.part=3 more"},
		{"console=ttyS0,9600", "console=ttyS0,9600 kh.part=3 more"},
	} {
		r := &Run{m: Machine{Board: Board{Console: "ttyS0"}, Append: "more"}}
		if got := r.cmdline(&Boot{Slot: 3, Cmdline: c.slot}); got != c.want {
			t.Errorf("%q: got %q, want %q", c.slot, got, c.want)
		}
	}
	if _, err := FindBoard("pdp11"); err == nil {
		t.Error("an unknown machine was found")
	}
	for _, b := range boards {
		if got, err := FindBoard(b.Name); err != nil || got.Program == "" || got.Arch == "" || len(got.Net) == 0 {
			t.Errorf("%s: %+v, %v", b.Name, got, err)
		}
	}
}
