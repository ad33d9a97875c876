package admin

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
)

// Bounds on bodies, in bytes. A pool, a zone or a tunnel's configuration may be larger than other requests.
const (
	maxBody      = 64 << 10
	maxLargeBody = 512 << 10
	maxReply     = 1 << 30
	maxDepth     = 16
)

// decodeStrict decodes one JSON object into dst. Unknown names, names in other letters, names given twice and anything
// after the object are errors, which say where.
func decodeStrict(b []byte, dst any) error {
	if err := checkNames(b, reflect.TypeOf(dst).Elem()); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(dst); err != nil {
		if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
			return fmt.Errorf("%q must be of type %s, not %s", e.Field, e.Type, e.Value)
		}
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	return nil
}

// A level is an object or array that is being read.
type level struct {
	object bool
	key    bool                    // a name comes next
	names  map[string]bool         // so far
	fields map[string]reflect.Type // of a struct; nil: any name is good
	next   reflect.Type            // of the value that comes next; nil: unknown
}

// checkNames walks over the tokens of b, which encoding/json alone would read too leniently: it takes "NAME" for
// "name", and the last of two. t is the type that b is decoded into.
func checkNames(b []byte, t reflect.Type) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	var stack []level
	for first := true; ; first = false {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) && len(stack) == 0 && !first {
			return nil
		}
		if err != nil {
			return fmt.Errorf("not valid JSON at byte %d: %w", dec.InputOffset(), eof(err))
		}
		if !first && len(stack) == 0 {
			return fmt.Errorf("more data after the JSON object, at byte %d", dec.InputOffset())
		}
		d, isDelim := tok.(json.Delim)
		if first && (!isDelim || d != '{') {
			return errors.New("the body must be a JSON object")
		}
		if isDelim && (d == '}' || d == ']') {
			stack = stack[:len(stack)-1]
			continue
		}
		var top *level
		if len(stack) > 0 {
			top = &stack[len(stack)-1]
		}
		if top != nil && top.object && top.key {
			if err := top.name(tok.(string)); err != nil {
				return err
			}
			continue
		}
		if top != nil {
			t = top.next
			top.key = top.object
		}
		if !isDelim {
			continue
		}
		if len(stack) == maxDepth {
			return errors.New("nested too deeply")
		}
		stack = append(stack, newLevel(d == '{', t))
	}
}

func newLevel(object bool, t reflect.Type) level {
	l := level{object: object, key: object, names: map[string]bool{}}
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil || reflect.PointerTo(t).Implements(unmarshaler) || reflect.PointerTo(t).Implements(textUnmarshaler) {
		return l
	}
	switch {
	case t.Kind() == reflect.Struct:
		l.fields = map[string]reflect.Type{}
		addFields(l.fields, t)
	case t.Kind() == reflect.Map, t.Kind() == reflect.Slice, t.Kind() == reflect.Array:
		l.next = t.Elem()
	}
	return l
}

var (
	unmarshaler     = reflect.TypeFor[json.Unmarshaler]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// addFields lists the names that encoding/json gives to the fields of t, in the way in which our types are written: each
// field has a tag, but for embedded structs.
func addFields(fields map[string]reflect.Type, t reflect.Type) {
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-":
		case name == "" && f.Anonymous:
			addFields(fields, f.Type)
		default:
			fields[name] = f.Type
		}
	}
}

// name takes the next name of an object.
func (l *level) name(name string) error {
	if l.names[name] {
		return fmt.Errorf("%q is given twice", name)
	}
	if l.fields != nil {
		t, known := l.fields[name]
		if !known {
			return fmt.Errorf("unknown name %q", name)
		}
		l.next = t
	}
	l.names[name] = true
	l.key = false
	return nil
}

func eof(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
