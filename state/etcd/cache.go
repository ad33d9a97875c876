package etcd

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/state"
)

// A snapshot is what the store held at a revision, by key.
type snapshot struct {
	rev     state.Revision
	entries map[string]state.Entry
}

func (s *snapshot) list(prefix string) []state.Entry {
	var list []state.Entry
	for key, e := range s.entries {
		if strings.HasPrefix(key, prefix) {
			e.Value = bytes.Clone(e.Value)
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(a, b state.Entry) int { return strings.Compare(a.Key, b.Key) })
	return list
}

// Layout of the file: cacheMagic | prefix | revision | number of entries | entries, by key: key, revision, value | SHA-256
// of all before. Numbers are varints; texts and values follow their length.
const (
	cacheMagic = "keyhaven state cache 1\n"
	// maxCache bounds the file.
	maxCache = 1 << 30
)

func (s *snapshot) encode(prefix string) []byte {
	b := appendText([]byte(cacheMagic), prefix)
	b = binary.AppendUvarint(b, uint64(s.rev))
	b = binary.AppendUvarint(b, uint64(len(s.entries)))
	keys := make([]string, 0, len(s.entries))
	for key := range s.entries {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		e := s.entries[key]
		b = appendText(b, key)
		b = binary.AppendUvarint(b, uint64(e.Revision))
		b = appendText(b, e.Value)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

func appendText[T string | []byte](b []byte, text T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(text))), text...)
}

var errCache = errors.New("the cache is damaged")

// decodeSnapshot reads what encode wrote for the same prefix.
func decodeSnapshot(b []byte, prefix string) (*snapshot, error) {
	body := len(b) - sha256.Size
	if body < len(cacheMagic) || string(b[:len(cacheMagic)]) != cacheMagic {
		return nil, errCache
	}
	if sum := sha256.Sum256(b[:body]); !bytes.Equal(sum[:], b[body:]) {
		return nil, errCache
	}
	r := reader{b: b[len(cacheMagic):body]}
	if got := string(r.text(state.MaxKeyLen)); got != prefix {
		return nil, fmt.Errorf("the cache is of the installation at %q, not of %q", clip(got), prefix)
	}
	s := &snapshot{rev: state.Revision(r.number()), entries: map[string]state.Entry{}}
	for n := r.number(); n > 0 && !r.bad; n-- {
		key := string(r.text(state.MaxKeyLen))
		e := state.Entry{Key: key, Revision: state.Revision(r.number()), Value: bytes.Clone(r.text(state.MaxValueLen))}
		if !r.bad && state.CheckKey(key) != nil {
			return nil, errCache
		}
		s.entries[key] = e
	}
	if r.bad || len(r.b) > 0 {
		return nil, errCache
	}
	return s, nil
}

// A reader takes numbers and texts off b; bad is set once something was not there.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) number() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.b, r.bad = nil, true
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) text(limit int) []byte {
	n := r.number()
	if n > uint64(limit) || n > uint64(len(r.b)) {
		r.b, r.bad = nil, true
		return nil
	}
	text := r.b[:n]
	r.b = r.b[n:]
	return text
}

// readCache reads the file and says when it was written; one that others may read is refused, as it holds ticket keys.
func readCache(path, prefix string) (*snapshot, time.Time, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, time.Time{}, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, time.Time{}, fmt.Errorf("file %q has mode %04o and is open to others; run: chmod 600 %s", path, info.Mode().Perm(), path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxCache))
	if err != nil {
		return nil, time.Time{}, err
	}
	s, err := decodeSnapshot(b, prefix)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("file %q: %w", path, err)
	}
	return s, info.ModTime(), nil
}

// writeCache replaces the file as a whole.
func writeCache(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name()) //nolint:errcheck // the error that matters is at hand
	}
	return err
}
