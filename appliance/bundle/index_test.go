package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func exampleIndex() Index {
	sum := strings.Repeat("ab", 32)
	return Index{
		Arch: "arm64", Channel: "stable", Published: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Releases: []Release{
			{Version: "0.5.0", URL: "a.update", Size: 1000, SHA256: sum, Percent: 100, Salt: "x"},
			{Version: "0.6.0", URL: "https://cdn.example.com/b.update", Size: 1000, SHA256: sum, Percent: 10, Salt: "y"},
		},
	}
}

func TestIndexRoundTrip(t *testing.T) {
	pub, key := newKey(t)
	var b, again bytes.Buffer
	for _, w := range []*bytes.Buffer{&b, &again} {
		if err := WriteIndex(w, exampleIndex(), Signer(key, "index")); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(b.Bytes(), again.Bytes()) {
		t.Error("written twice, the indexes differ")
	}
	x, err := ReadIndex(&b, keysOf(pub))
	if err != nil {
		t.Fatal(err)
	}
	if r, ok := x.Release(""); !ok || r.Version != "0.6.0" {
		t.Errorf("the newest is %+v", r)
	}
	if r, ok := x.Release("0.5.0"); !ok || r.URL != "a.update" {
		t.Errorf("0.5.0 is %+v", r)
	}
	if _, ok := x.Release("0.7.0"); ok {
		t.Error("there is no 0.7.0")
	}
}

func TestIndexRefuses(t *testing.T) {
	pub, key := newKey(t)
	_, other := newKey(t)
	for name, c := range map[string]struct {
		change func(*Index)
		want   error
	}{
		"arch":       {func(x *Index) { x.Arch = "vax" }, ErrFormat},
		"channel":    {func(x *Index) { x.Channel = ".." }, ErrFormat},
		"published":  {func(x *Index) { x.Published = time.Time{} }, ErrFormat},
		"version":    {func(x *Index) { x.Releases[0].Version = "x" }, ErrFormat},
		"no address": {func(x *Index) { x.Releases[0].URL = "" }, ErrFormat},
		"scheme":     {func(x *Index) { x.Releases[0].URL = "file:///etc/passwd" }, ErrFormat},
		"password":   {func(x *Index) { x.Releases[0].URL = "https://u:p@example.com/x" }, ErrFormat},
		"size":       {func(x *Index) { x.Releases[0].Size = 0 }, ErrFormat},
		"sha256":     {func(x *Index) { x.Releases[0].SHA256 = "ab" }, ErrFormat},
		"percent":    {func(x *Index) { x.Releases[0].Percent = 101 }, ErrFormat},
		"expired":    {func(x *Index) { x.Expires = x.Published }, ErrFormat},
		"twice":      {func(x *Index) { x.Releases[0].Version = "0.6.0" }, ErrFormat},
	} {
		x := exampleIndex()
		c.change(&x)
		if err := WriteIndex(new(bytes.Buffer), x, Signer(key, "")); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}

	var good, foreign bytes.Buffer
	if err := errors.Join(WriteIndex(&good, exampleIndex(), Signer(key, "")), WriteIndex(&foreign, exampleIndex(), Signer(other, ""))); err != nil {
		t.Fatal(err)
	}
	manifest := made(t, key, example(), image(512))
	for name, c := range map[string]struct {
		b    string
		want error
	}{
		"another key": {foreign.String(), ErrKey},
		"altered":     {strings.Replace(good.String(), "a.update", "c.update", 1), ErrSignature},
		"a page":      {"<html>", ErrFormat},
		"a bundle":    {string(manifest), ErrFormat},
		"large":       {strings.Repeat(" ", MaxIndex+1), ErrTooLarge},
		"two":         {good.String() + good.String(), ErrFormat},
		"not signed":  {`{"index":"{}","signature":""}`, ErrSignature},
	} {
		if _, err := ReadIndex(strings.NewReader(c.b), keysOf(pub)); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	// The signature of a bundle's manifest is none of an index, and the other way around.
	text := `{"format":1}`
	sig, err := Signer(key, "")([]byte(Magic + text))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadIndex(strings.NewReader(fmt.Sprintf(`{"index":%q,"signature":%q}`, text, sig)), keysOf(pub)); !errors.Is(err, ErrSignature) {
		t.Errorf("a manifest's signature: got %v", err)
	}
}
