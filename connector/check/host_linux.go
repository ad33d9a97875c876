package check

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

const (
	// wantedBuffer is what QUIC asks for as socket buffers, in bytes.
	wantedBuffer = 7 << 20
	procSys      = "/proc/sys/net/"
)

// host looks at what the kernel permits.
func host() []Finding {
	return []Finding{
		pingRange(sysctl("ipv4/ping_group_range"), append(groups(), os.Getegid()), os.Geteuid()),
		buffers(sysctl("core/rmem_max"), sysctl("core/wmem_max")),
		congestion(sysctl("ipv4/tcp_available_congestion_control")),
	}
}

// sysctl reads a setting of the kernel, "" if it is not to be had.
func sysctl(name string) string {
	b, err := os.ReadFile(procSys + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func groups() []int {
	list, err := os.Getgroups()
	if err != nil {
		return nil
	}
	return list
}

// pingRange says whether the process may open ping sockets; see icmp(7).
func pingRange(setting string, gids []int, uid int) Finding {
	f := Finding{Check: "ping sockets", Level: OK}
	var first, last int
	if _, err := fmt.Sscan(setting, &first, &last); err != nil {
		f.Level, f.Detail = Warn, "net.ipv4.ping_group_range cannot be read"
		f.Remedy = "without ping sockets, ping, traceroute and mtr through the tunnel do not work; all else does"
		return f
	}
	f.Detail = fmt.Sprintf("net.ipv4.ping_group_range is %d to %d", first, last)
	if slices.ContainsFunc(gids, func(g int) bool { return first <= g && g <= last }) {
		return f
	}
	f.Level = Warn
	f.Detail += fmt.Sprintf(", and user %d has none of these groups: ping, traceroute and mtr through the tunnel do not work", uid)
	f.Remedy = fmt.Sprintf(`sysctl -w net.ipv4.ping_group_range="0 2147483647", or the group of the connector alone: "%d %d"`, os.Getegid(), os.Getegid())
	return f
}

// buffers says whether the kernel gives UDP sockets large buffers.
func buffers(receive, send string) Finding {
	f := Finding{Check: "udp buffers", Level: OK}
	var r, s int
	_, errR := fmt.Sscan(receive, &r)
	_, errS := fmt.Sscan(send, &s)
	if errR != nil || errS != nil {
		f.Detail = "net.core.rmem_max and wmem_max cannot be read"
		return f
	}
	f.Detail = fmt.Sprintf("net.core.rmem_max is %d, wmem_max %d", r, s)
	if r < wantedBuffer || s < wantedBuffer {
		f.Level = Warn
		f.Detail += ": transfers over QUIC will be slower"
		f.Remedy = "sysctl -w net.core.rmem_max=7500000 net.core.wmem_max=7500000"
	}
	return f
}

// congestion says whether TCP sessions can use BBR.
func congestion(available string) Finding {
	f := Finding{Check: "bbr", Level: OK, Detail: "the kernel has " + available}
	if !slices.Contains(strings.Fields(available), "bbr") {
		f.Level = Warn
		f.Detail = fmt.Sprintf("the kernel has %q without bbr: TCP sessions are slower where packets are lost", available)
		f.Remedy = "modprobe tcp_bbr, and a line tcp_bbr in /etc/modules-load.d"
	}
	return f
}
