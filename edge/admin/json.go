package admin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
)

// maxBody bounds the body of a request, in bytes; maxReply that of a reply.
const (
	maxBody  = 64 << 10
	maxReply = 1 << 30
	maxDepth = 8
)

// decodeStrict decodes one JSON object into dst. Unknown names, names in other letters, names given twice and anything
// after the object are errors, which say where.
func decodeStrict(b []byte, dst any) error {
	if err := checkNames(b, dst); err != nil {
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

// checkNames walks over the tokens of b, which encoding/json alone would read too leniently: it takes "NAME" for
// "name", and the last of two.
func checkNames(b []byte, dst any) error {
	known := fieldNames(dst)
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	type level struct {
		object bool
		key    bool // a name comes next
		names  map[string]bool
	}
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
		top := len(stack) - 1
		switch d, isDelim := tok.(json.Delim); {
		case first && (!isDelim || d != '{'):
			return errors.New("the body must be a JSON object")
		case isDelim && (d == '}' || d == ']'):
			stack = stack[:top]
			continue
		case top >= 0 && stack[top].object && stack[top].key:
			name := tok.(string)
			if stack[top].names[name] {
				return fmt.Errorf("%q is given twice", name)
			}
			if top == 0 && !known[name] {
				return fmt.Errorf("unknown name %q", name)
			}
			stack[top].names[name] = true
			stack[top].key = false
			continue
		case isDelim:
			if top >= 0 {
				stack[top].key = stack[top].object
			}
			if len(stack) == maxDepth {
				return errors.New("nested too deeply")
			}
			stack = append(stack, level{object: d == '{', key: d == '{', names: map[string]bool{}})
			continue
		}
		if top >= 0 {
			stack[top].key = stack[top].object
		}
	}
}

func eof(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func fieldNames(v any) map[string]bool {
	names := map[string]bool{}
	for f := range reflect.TypeOf(v).Elem().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		names[name] = true
	}
	return names
}
