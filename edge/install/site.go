package install

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"aead.dev/minisign"

	"github.com/keyhaven/keyhaven/internal/httprelay"
)

// maxVerified bounds how many files are remembered as good.
const maxVerified = 4096

// A Site serves one directory. It is safe for concurrent use. Make one with [New].
type Site struct {
	dir  string
	keys []minisign.PublicKey

	mu       sync.Mutex // guards the fields below
	list     list
	of       [2]stamp // of the list and its signature
	verified map[stamp]string
	faulty   time.Time // when a fault was logged last
}

// New returns a site of a directory, whose list must be signed by one of the keys. The directory is not looked at before it is
// needed, and again whenever it changes.
func New(dir string, keys []minisign.PublicKey) (*Site, error) {
	switch {
	case !filepath.IsAbs(dir):
		return nil, fmt.Errorf("%q is no absolute path", dir)
	case len(keys) == 0:
		return nil, errors.New("there is no key to check the list of checksums with")
	}
	return &Site{dir: dir, keys: keys, verified: map[stamp]string{}}, nil
}

// Check says what keeps the site from being served: no list, or none that a key has signed.
func (s *Site) Check() error {
	root, err := os.OpenRoot(s.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	_, err = s.current(root)
	return err
}

// current returns the list that is in the directory now.
func (s *Site) current(root *os.Root) (list, error) {
	var of [2]stamp
	for i, name := range []string{listName, listSigName} {
		info, err := root.Stat(name)
		if err != nil {
			return nil, err
		}
		of[i] = stampOf(info)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.list != nil && s.of == of {
		return s.list, nil
	}
	s.list = nil
	l, err := readList(root, s.keys)
	if err != nil {
		return nil, err
	}
	s.list, s.of = l, of
	return l, nil
}

// open opens a file of the list if its bytes are those that were signed.
func (s *Site) open(root *os.Root, name, want string) (*os.File, fs.FileInfo, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file", name)
	}
	if err == nil {
		err = s.verify(f, stampOf(info), want)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// verify reads f through, unless it was found good as it is.
func (s *Site) verify(f *os.File, at stamp, want string) error {
	s.mu.Lock()
	got, known := s.verified[at]
	s.mu.Unlock()
	if !known {
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		got = hex.EncodeToString(h.Sum(nil))
		if info, err := f.Stat(); err != nil || stampOf(info) != at {
			return fmt.Errorf("%s was changed while it was read", f.Name())
		}
	}
	if got != want {
		return fmt.Errorf("%s is not the file that was signed", f.Name())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.verified) >= maxVerified {
		clear(s.verified)
	}
	s.verified[at] = got
	return nil
}

// Serve answers a request for a path below the site, which begins with a slash, as it was sent. base is the site's own address
// for people and scripts, without a slash at its end.
func (s *Site) Serve(w http.ResponseWriter, r *http.Request, rawPath, base string, log *slog.Logger) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		refuse(w, r, http.StatusMethodNotAllowed, "The method is not supported", "Files are there to be read.")
		return
	}
	name, err := url.PathUnescape(strings.TrimPrefix(rawPath, "/"))
	if err != nil {
		refuse(w, r, http.StatusBadRequest, "The path is not valid", "It cannot be read.")
		return
	}
	err = s.serve(w, r, name, base)
	switch {
	case err == nil:
	case errors.Is(err, errNotListed):
		refuse(w, r, http.StatusNotFound, "There is no such file", "The directory does not offer it.")
	default:
		if s.mayLog() {
			log.Error("what is to be installed cannot be served", "dir", s.dir, "path", name, "err", err)
		}
		w.Header().Set("Retry-After", "60")
		refuse(w, r, http.StatusServiceUnavailable, "This cannot be served now", "The files are not those that were signed, or are being replaced. Please try again shortly, and tell the operator of the edge if that does not help.")
	}
}

// mayLog lets a line through every ten seconds: visitors cause them at will.
func (s *Site) mayLog() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.faulty) < 10*time.Second {
		return false
	}
	s.faulty = time.Now()
	return true
}

func refuse(w http.ResponseWriter, r *http.Request, status int, heading, text string) {
	allow, retry := w.Header().Get("Allow"), w.Header().Get("Retry-After")
	httprelay.Page{Status: status, Heading: heading, Text: text}.Write(keeping{w, allow, retry}, r, httprelay.RequestID())
}

// keeping is a response that keeps header fields which a page would drop.
type keeping struct {
	http.ResponseWriter
	allow, retry string
}

// WriteHeader implements [http.ResponseWriter].
func (k keeping) WriteHeader(status int) {
	for name, value := range map[string]string{"Allow": k.allow, "Retry-After": k.retry} {
		if value != "" {
			k.Header().Set(name, value)
		}
	}
	k.ResponseWriter.WriteHeader(status)
}

var errNotListed = errors.New("not in the list")

func (s *Site) serve(w http.ResponseWriter, r *http.Request, name, base string) error {
	root, err := os.OpenRoot(s.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	l, err := s.current(root)
	if err != nil {
		return err
	}
	switch name {
	case "":
		b, err := indexPage(base)
		if err != nil {
			return err
		}
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		send(w, r, "text/html; charset=utf-8", hashOf(b), time.Time{}, bytes.NewReader(b))
		return nil
	case scriptName:
		b, err := script(l, base)
		if err != nil {
			return err
		}
		send(w, r, "text/plain; charset=utf-8", hashOf(b), time.Time{}, bytes.NewReader(b))
		return nil
	case listName, listSigName:
		b, err := readFile(root, name, maxList)
		if err != nil {
			return err
		}
		send(w, r, "text/plain; charset=utf-8", hashOf(b), time.Time{}, bytes.NewReader(b))
		return nil
	}
	want, ok := l[name]
	if !ok {
		return errNotListed
	}
	f, info, err := s.open(root, name, want)
	if err != nil {
		return err
	}
	defer f.Close()
	send(w, r, contentType(name), want, info.ModTime(), f)
	return nil
}

func hashOf(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// send sends a file, or what is asked for of it. It changes when its hash does.
func send(w http.ResponseWriter, r *http.Request, kind, hash string, at time.Time, f io.ReadSeeker) {
	h := w.Header()
	h.Set("Content-Type", kind)
	h.Set("ETag", `"`+hash+`"`)
	h.Set("Cache-Control", "no-cache")
	h.Set("X-Content-Type-Options", "nosniff")
	http.ServeContent(w, r, "", at, f)
}

// contentType never makes a browser run what it gets.
func contentType(name string) string {
	switch path.Ext(name) {
	case ".txt", ".asc", ".service", ".yaml", ".minisig", ".sources", ".repo", ".sh":
		return "text/plain; charset=utf-8"
	}
	return "application/octet-stream"
}
