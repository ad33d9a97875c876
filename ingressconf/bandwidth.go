package ingressconf

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Limits of a bandwidth, in bytes per second.
const (
	minBandwidth = 1_000
	maxBandwidth = 100_000_000_000
)

// bandwidthUnits are bytes per second. A unit stands before all that it ends with.
var bandwidthUnits = []struct {
	name  string
	bytes float64
}{
	{"kbit/s", 1e3 / 8}, {"Mbit/s", 1e6 / 8}, {"Gbit/s", 1e9 / 8}, {"bit/s", 1.0 / 8},
	{"kB/s", 1e3}, {"MB/s", 1e6}, {"GB/s", 1e9}, {"KiB/s", 1 << 10}, {"MiB/s", 1 << 20}, {"GiB/s", 1 << 30}, {"B/s", 1},
}

const bandwidthForms = "write a number with bit/s, kbit/s, Mbit/s or Gbit/s, or B/s, kB/s, MB/s or GB/s, such as 2Mbit/s or 250kB/s"

// ParseBandwidth reads a bandwidth such as 2Mbit/s, 250kB/s or 1.5 MB/s, and returns bytes per second: from 8kbit/s to
// 800Gbit/s. k, M and G are powers of 1000; KiB, MiB and GiB are known too. The case of a unit counts.
func ParseBandwidth(s string) (int64, error) {
	for _, u := range bandwidthUnits {
		number, ok := strings.CutSuffix(s, u.name)
		if !ok {
			continue
		}
		number = strings.TrimRight(number, " ")
		if number == "" || strings.Trim(number, "0123456789.") != "" {
			break
		}
		n, err := strconv.ParseFloat(number, 64)
		if err != nil {
			break
		}
		rate := math.Round(n * u.bytes)
		if rate < minBandwidth || rate > maxBandwidth {
			return 0, fmt.Errorf("%q: must be from 8kbit/s to 800Gbit/s", s)
		}
		return int64(rate), nil
	}
	return 0, fmt.Errorf("%q is no bandwidth; %s", clip(s), bandwidthForms)
}

// clip shortens what is quoted.
func clip(s string) string {
	if len(s) > maxQuoted {
		return strings.ToValidUTF8(s[:maxQuoted], "") + "…"
	}
	return s
}

// maxQuoted bounds what an error quotes of a value, in bytes.
const maxQuoted = 64
