package fleet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
)

// parse reads one flat JSON object into the struct that dst points to. encoding/json alone is too lenient: it takes "NAME"
// for "name", and the last of two.
func parse(b []byte, dst any) error {
	if len(b) > MaxSize {
		return fmt.Errorf("fleet: %d bytes, at most %d allowed", len(b), MaxSize)
	}
	if err := checkNames(b, namesOf(reflect.TypeOf(dst).Elem())); err != nil {
		return fmt.Errorf("fleet: %w", err)
	}
	if err := json.Unmarshal(b, dst); err != nil {
		return fmt.Errorf("fleet: %w", err)
	}
	return nil
}

// namesOf returns the names that the fields of a struct have in JSON.
func namesOf(t reflect.Type) map[string]bool {
	names := map[string]bool{}
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		names[name] = true
	}
	return names
}

// checkNames takes each of names out when it is found; what is not there any more was repeated or is unknown.
func checkNames(b []byte, names map[string]bool) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return errors.New("not a JSON object")
	}
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return fmt.Errorf("not valid JSON: %w", err)
		}
		if name, _ := tok.(string); !names[name] {
			return fmt.Errorf("the name %.40q is unknown or given twice", name)
		} else {
			delete(names, name)
		}
		switch v, err := dec.Token(); {
		case err != nil:
			return fmt.Errorf("not valid JSON: %w", err)
		case v == json.Delim('{') || v == json.Delim('['):
			return errors.New("an object in an object")
		}
	}
	if _, err := dec.Token(); err != nil {
		return fmt.Errorf("not valid JSON: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more data after the object")
	}
	return nil
}
