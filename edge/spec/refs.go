package spec

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// CheckPools returns the faults of each pool, by itself and in what it refers to: names that are there twice, members and
// fall-back pools that do not exist, and circles. The map has an entry for each pool at fault, by its place in pools.
func CheckPools(pools []PoolConfig) map[int][]error {
	bad := map[int][]error{}
	byName := map[string]int{}
	for i := range pools {
		if errs := pools[i].Validate(); len(errs) > 0 {
			bad[i] = errs
		}
		if _, twice := byName[pools[i].Name]; twice {
			bad[i] = append(bad[i], &FieldError{"name", fmt.Sprintf("%q names two pools", pools[i].Name)})
			continue
		}
		byName[pools[i].Name] = i
	}
	for i := range pools {
		p := &pools[i]
		refer := func(field, name string) {
			if _, ok := byName[name]; !ok {
				bad[i] = append(bad[i], &FieldError{field, fmt.Sprintf("there is no pool %q", name)})
			}
		}
		for j, m := range p.Members {
			refer(fmt.Sprintf("members[%d]", j), m)
		}
		if p.Next != "" {
			refer("next", p.Next)
		}
		if path := circle(pools, byName, i); path != nil {
			bad[i] = append(bad[i], &FieldError{"members", "the pool leads back to itself: " + strings.Join(path, " → ")})
		}
	}
	return bad
}

// circle returns a way from pool i back to it through members and fall-back pools, or nil.
func circle(pools []PoolConfig, byName map[string]int, i int) []string {
	seen := map[int]bool{}
	var walk func(j int, path []string) []string
	walk = func(j int, path []string) []string {
		next := pools[j].Members
		if n := pools[j].Next; n != "" {
			next = append(next[:len(next):len(next)], n)
		}
		for _, name := range next {
			k, ok := byName[name]
			switch {
			case !ok:
			case k == i:
				return append(path, name)
			case !seen[k]:
				seen[k] = true
				if found := walk(k, append(path[:len(path):len(path)], name)); found != nil {
					return found
				}
			}
		}
		return nil
	}
	return walk(i, []string{pools[i].Name})
}

// Codes is a set of HTTP status codes.
type Codes []codeRange

type codeRange struct{ from, to int }

// ParseCodes reads codes and ranges with commas between them. The empty string is "200-399".
func ParseCodes(s string) (Codes, error) {
	if s == "" {
		return Codes{{200, 399}}, nil
	}
	if len(s) > 256 {
		return nil, errors.New("is longer than 256 bytes")
	}
	var out Codes
	for part := range strings.SplitSeq(s, ",") {
		from, to, ranged := strings.Cut(strings.TrimSpace(part), "-")
		if !ranged {
			to = from
		}
		a, err1 := strconv.Atoi(strings.TrimSpace(from))
		b, err2 := strconv.Atoi(strings.TrimSpace(to))
		if err1 != nil || err2 != nil || a < 100 || b > 599 || a > b {
			return nil, fmt.Errorf("%q is not a status code or a range of them, such as 200-399", part)
		}
		out = append(out, codeRange{a, b})
	}
	return out, nil
}

// Has reports whether the code is in the set.
func (c Codes) Has(code int) bool {
	for _, r := range c {
		if r.from <= code && code <= r.to {
			return true
		}
	}
	return false
}
