package appliance

import (
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// keys lists the keys of a struct, with those of the groups in it.
func keys(t reflect.Type, prefix string) (list []string) {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	for f := range t.Fields() {
		name := f.Tag.Get("mapstructure")
		if name == "" {
			continue
		}
		list = append(list, prefix+name)
		if inner := f.Type; inner.Kind() == reflect.Struct || inner.Kind() == reflect.Pointer && inner.Elem().Kind() == reflect.Struct {
			list = append(list, keys(inner, prefix+name+".")...)
		}
	}
	return list
}

// Every key is in the table of docs/appliance.md and in the example that has all of them.
func TestKeysAreDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/appliance.md")
	if err != nil {
		t.Fatal(err)
	}
	full, err := os.ReadFile("../examples/appliance/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	all := keys(reflect.TypeFor[Config](), "")
	if len(all) < 25 {
		t.Fatalf("%d keys cannot be all", len(all))
	}
	for _, key := range all {
		group := key == "wifi" || key == "network" || key == "ssh" || key == "update"
		if !group && !strings.Contains(string(page), "`"+key+"`") {
			t.Errorf("docs/appliance.md does not explain %s", key)
		}
		if !strings.Contains(string(full), key[strings.LastIndexByte(key, '.')+1:]+":") {
			t.Errorf("examples/appliance/full.yaml does not have %s", key)
		}
	}
	for _, list := range []reflect.Type{reflect.TypeFor[WiFiNetwork](), reflect.TypeFor[Publish](), reflect.TypeFor[Allow]()} {
		for _, key := range keys(list, "") {
			if !strings.Contains(string(page), "`"+key+"`") {
				t.Errorf("docs/appliance.md does not explain %s of an entry", key)
			}
		}
	}
	for state, text := range headline {
		if text == "" {
			t.Errorf("%s has no headline", state)
		}
	}
}

// The table and the picture of the LED's patterns have as many flashes for each state as there are.
func TestLEDIsDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/appliance.md")
	if err != nil {
		t.Fatal(err)
	}
	picture, err := os.ReadFile("../images/rpi/pictures/led.svg")
	if err != nil {
		t.Fatal(err)
	}
	// What table and picture say beside the flashes.
	words := map[State][2]string{
		StateNoNetwork: {"no network", "no network"},
		StateMistake:   {"a mistake in `keyhaven.yaml`", "a mistake in the file"},
		StateRefused:   {"the join token was refused", "token refused, or none"},
		StateNoToken:   {"or there is none", "token refused, or none"},
		StateNoEdge:    {"no connection to the edge", "no connection to the edge"},
	}
	for state, p := range patterns {
		says, flashes := words[state]
		if flashes != (len(p) > 2) {
			t.Errorf("%s: the pattern has %d times; adjust this test", state, len(p))
		}
		if !flashes {
			continue
		}
		n := strconv.Itoa(len(p) / 2)
		if !regexp.MustCompile(`(?m)^\| ` + n + ` flashes \|[^|]*` + regexp.QuoteMeta(says[0])).Match(page) {
			t.Errorf("%s: docs/appliance.md has no row with %s flashes", state, n)
		}
		if !regexp.MustCompile(`(?s)>` + n + ` flashes<[^\n]*\n[^\n]*\n[^\n]*>` + says[1] + `<`).Match(picture) {
			t.Errorf("%s: led.svg has no row with %s flashes", state, n)
		}
	}
}
