package check

import (
	"strings"
	"testing"
)

func TestHost(t *testing.T) {
	for _, tt := range []struct {
		name  string
		got   Finding
		level Level
		says  string
	}{
		{"groups in the range", pingRange("0\t2147483647", []int{1000}, 1000), OK, ""},
		{"an empty range", pingRange("1\t0", []int{0, 1000}, 1000), Warn, "ping_group_range"},
		{"another group", pingRange("5 5", []int{4, 6}, 1000), Warn, "ping_group_range"},
		{"one of the groups", pingRange("5 5", []int{4, 5}, 1000), OK, ""},
		{"no setting", pingRange("", nil, 0), Warn, "ping sockets"},
		{"large buffers", buffers("7500000", "7500000"), OK, ""},
		{"small buffers", buffers("212992", "212992"), Warn, "rmem_max=7500000"},
		{"a small send buffer", buffers("7500000", "212992"), Warn, "wmem_max=7500000"},
		{"bbr", congestion("reno cubic bbr"), OK, ""},
		{"no bbr", congestion("reno cubic"), Warn, "modprobe tcp_bbr"},
	} {
		if tt.got.Level != tt.level || !strings.Contains(tt.got.Remedy, tt.says) || (tt.level == OK) != (tt.got.Remedy == "") {
			t.Errorf("%s: %+v, want %s and a remedy with %q", tt.name, tt.got, tt.level, tt.says)
		}
	}
	if got := host(); len(got) != 3 || got[0].Detail == "" {
		t.Errorf("this host: %+v, want three findings", got)
	}
}
