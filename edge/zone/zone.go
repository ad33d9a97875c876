package zone

// A Zone is a compiled [Config]. It is immutable.
type Zone struct{ cfg Config }

// Compile checks configurations and loads their certificates. Faults go to errorf with keys below at ("zones[1].hosts[0]").
func Compile(at string, cfgs []Config, hasGroup func(string) bool, errorf func(key, format string, args ...any)) (zones []*Zone, warnings []string) {
	return nil, nil
}
