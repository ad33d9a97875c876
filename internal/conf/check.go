package conf

import (
	"encoding"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sort"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

var (
	durationType = reflect.TypeFor[time.Duration]()
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
)

func isText(t reflect.Type) bool {
	return t.Kind() != reflect.Pointer && reflect.PointerTo(t).Implements(textType)
}

// A checker holds a YAML tree against the type that it is to become.
type checker struct {
	file *File
	errs Errors
}

func (c *checker) errorf(n *yaml.Node, key, format string, args ...any) {
	c.errs = append(c.errs, &Error{File: c.file.path, Line: n.Line, Key: key, Msg: fmt.Sprintf(format, args...)})
}

func (c *checker) value(n *yaml.Node, t reflect.Type, key string) {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		c.errorf(n, key, "anchors and aliases are not taken; write the value out")
	case n.Kind == yaml.ScalarNode && n.Tag == "!!null":
		c.errorf(n, key, "has no value; give one, or remove the key to get the default")
	case t == durationType:
		c.duration(n, key)
	case isText(t):
		c.text(n, t, key)
	default:
		if short, ok := reflect.Zero(t).Interface().(ShortForm); ok && n.Kind == yaml.ScalarNode {
			wrap(n, short.ShortForm())
		}
		c.kind(n, t, key)
	}
}

// A ShortForm is a struct that can be given as a single value too, which is then that of the key that the method names. The
// method is called on a zero value.
type ShortForm interface{ ShortForm() string }

// wrap makes a single value the mapping of name to it.
func wrap(n *yaml.Node, name string) {
	value := *n
	*n = yaml.Node{Kind: yaml.MappingNode, Tag: "!!map", Line: n.Line, Column: n.Column,
		Content: []*yaml.Node{{Kind: yaml.ScalarNode, Tag: "!!str", Value: name, Line: n.Line, Column: n.Column}, &value}}
}

func (c *checker) kind(n *yaml.Node, t reflect.Type, key string) {
	switch t.Kind() {
	case reflect.Struct:
		c.mapping(n, t, key)
	case reflect.Slice, reflect.Array:
		if n.Kind != yaml.SequenceNode {
			c.errorf(n, key, "must be a list (lines that start with \"- \", or [a, b]), not %s", describe(n))
			return
		}
		for i, item := range n.Content {
			k := fmt.Sprintf("%s[%d]", key, i)
			c.file.lines[k] = item.Line
			c.value(item, t.Elem(), k)
		}
	case reflect.Map:
		c.mapping(n, t, key)
	case reflect.Interface:
	case reflect.String:
		// YAML reads 12 and true as other types, but someone who writes them for a string means the text; only
		// a name such as 0x1 or 1e3 would then come out changed, so all of them are refused alike.
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
			c.errorf(n, key, "must be a string, not %s; put it in quotes if it is one", describe(n))
		}
	case reflect.Bool:
		if n.Kind != yaml.ScalarNode || n.Tag != "!!bool" {
			c.errorf(n, key, "must be true or false, not %s", describe(n))
		}
	case reflect.Float32, reflect.Float64:
		if n.Kind != yaml.ScalarNode || n.Tag != "!!float" && n.Tag != "!!int" {
			c.errorf(n, key, "must be a number, not %s", describe(n))
		}
	default:
		c.integer(n, t, key)
	}
}

func (c *checker) integer(n *yaml.Node, t reflect.Type, key string) {
	var v int64
	if n.Kind != yaml.ScalarNode || n.Tag != "!!int" || n.Decode(&v) != nil {
		c.errorf(n, key, "must be a whole number, not %s", describe(n))
		return
	}
	if err := inRange(t, v); err != nil {
		c.errorf(n, key, "%v", err)
	}
}

func inRange(t reflect.Type, v int64) error {
	p := reflect.New(t).Elem()
	if p.CanUint() && (v < 0 || p.OverflowUint(uint64(v))) || p.CanInt() && p.OverflowInt(v) {
		return fmt.Errorf("%d is out of range", v)
	}
	return nil
}

func (c *checker) duration(n *yaml.Node, key string) {
	if n.Kind == yaml.ScalarNode {
		if n.Value == "0" {
			c.errorf(n, key, "write 0s: a duration has a unit")
			return
		}
		if _, err := time.ParseDuration(n.Value); err == nil {
			return
		}
	}
	c.errorf(n, key, "must be a duration with a unit, such as 5s or 1h30m, not %s", describe(n))
}

func (c *checker) text(n *yaml.Node, t reflect.Type, key string) {
	if n.Kind != yaml.ScalarNode {
		c.errorf(n, key, "must be a single value, not %s", describe(n))
		return
	}
	v := reflect.New(t).Interface().(encoding.TextUnmarshaler)
	if err := v.UnmarshalText([]byte(n.Value)); err != nil {
		c.errorf(n, key, "%v", err)
	}
	n.Tag = "!!str" // the text as it stands, also where it looks like a number
}

func (c *checker) mapping(n *yaml.Node, t reflect.Type, key string) {
	switch {
	case n.Kind == yaml.MappingNode:
	case key == "": // the file as a whole, which may be that of a PIN, or of a token: nothing of it is shown
		c.errorf(n, key, "holds no keys with values; is this the right file?")
		return
	default:
		c.errorf(n, key, "must be a group of keys, not %s", describe(n))
		return
	}
	var known map[string]reflect.Type
	if t.Kind() == reflect.Struct {
		known = fields(t)
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		full := join(key, k.Value)
		if first, dup := c.file.lines[full]; dup {
			c.errorf(k, full, "is given twice, first in line %d; remove one", first)
			continue
		}
		c.file.lines[full] = k.Line
		ft, ok := known[k.Value]
		switch {
		case t.Kind() == reflect.Map:
			c.value(v, t.Elem(), full)
		case ok:
			c.value(v, ft, full)
		default:
			c.errorf(k, full, "unknown key%s", suggest(k.Value, known))
		}
	}
}

func join(key, name string) string {
	if key == "" {
		return name
	}
	return key + "." + name
}

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.SequenceNode:
		return "a list"
	case yaml.MappingNode:
		return "a group of keys"
	}
	v := n.Value
	if len(v) > 40 {
		v = v[:40] + "…"
	}
	return fmt.Sprintf("%q", v)
}

// fields returns the keys of a struct and their types.
func fields(t reflect.Type) map[string]reflect.Type {
	m := map[string]reflect.Type{}
	for f := range t.Fields() {
		name, opts, _ := strings.Cut(f.Tag.Get("mapstructure"), ",")
		switch {
		case !f.IsExported() || name == "-":
		case strings.Contains(opts, "squash"):
			for k, v := range fields(f.Type) {
				m[k] = v
			}
		case name == "":
			m[strings.ToLower(f.Name)] = f.Type
		default:
			m[name] = f.Type
		}
	}
	return m
}

type leaf struct {
	key string
	typ reflect.Type
}

// leaves lists the keys below t that hold single values or lists.
func leaves(t reflect.Type, key string) []leaf {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || isText(t) {
		return []leaf{{key, t}}
	}
	var ls []leaf
	for name, ft := range fields(t) {
		ls = append(ls, leaves(ft, join(key, name))...)
	}
	sort.Slice(ls, func(i, j int) bool { return ls[i].key < ls[j].key })
	return ls
}

func leafAt(t reflect.Type, key string) reflect.Type {
	for _, l := range leaves(t, "") {
		if l.key == key {
			return l.typ
		}
	}
	return nil
}

// suggest names the known key that is nearest to an unknown one, or all of them if none is near.
func suggest(name string, known map[string]reflect.Type) string {
	if best := nearest(strings.ToLower(name), known); best != "" {
		return fmt.Sprintf("; did you mean %s?", best)
	}
	return "; known here: " + strings.Join(slices.Sorted(maps.Keys(known)), ", ")
}

// suggestEnv is suggest for variables, which are too many to list them all.
func suggestEnv(name string, known map[string]reflect.Type) string {
	if best := nearest(name, known); best != "" {
		return fmt.Sprintf("; did you mean %s?", best)
	}
	return ""
}

// nearest returns the known name that differs from name in one or two letters, or "" if there is none.
func nearest(name string, known map[string]reflect.Type) string {
	best, dist := "", 3
	for k := range known {
		if d := Distance(name, k); d < dist || d == dist && k < best {
			best, dist = k, d
		}
	}
	return best
}

// Distance is the Levenshtein distance of two short names: the number of letters in which they differ.
func Distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		prev := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			prev, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, prev+cost)
		}
	}
	return row[len(b)]
}
