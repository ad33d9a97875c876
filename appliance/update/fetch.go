package update

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"aead.dev/minisign"

	"github.com/keyhaven/keyhaven/appliance/bundle"
)

const (
	// indexTimeout bounds getting an index.
	indexTimeout = time.Minute
	// maxResumes is how often a download goes on after a cut without a byte in between.
	maxResumes = 8
)

// A source is a web server with static files.
type source struct {
	base   *url.URL
	client *http.Client
	keys   []minisign.PublicKey
	timing Timing
	log    *slog.Logger
	last   map[string]answer // by address
}

// An answer is what the server said last, so that it needs to say it only once.
type answer struct {
	etag, modified string
	index          bundle.Index
}

func newSource(c Config) (*source, error) {
	u, err := url.Parse(c.Source)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("update: the update source is no address such as https://updates.example.com/keyhaven") // not quoted: it may hold a password
	}
	u.Path = strings.TrimRight(u.Path, "/") + "/"
	s := &source{base: u, client: c.HTTP, keys: c.Keys, timing: c.Timing, log: c.Log, last: map[string]answer{}}
	if s.client == nil {
		s.client = newClient(c.Proxy)
	}
	return s, nil
}

func newClient(via *url.URL) *http.Client {
	through := environment
	if via != nil {
		through = http.ProxyURL(via)
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                 through,
			DialContext:           (&net.Dialer{Timeout: 30 * time.Second}).DialContext,
			TLSHandshakeTimeout:   30 * time.Second,
			ResponseHeaderTimeout: time.Minute,
			DisableKeepAlives:     true, // a request in six hours
			DisableCompression:    true,
			ForceAttemptHTTP2:     true,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if len(via) >= 5 {
				return errors.New("it redirects more than 5 times")
			}
			if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https" {
				return errors.New("it redirects from https to http")
			}
			return nil
		},
	}
}

// environment is the proxy of the environment. Its error does not quote the address, which may hold a password.
func environment(req *http.Request) (*url.URL, error) {
	u, err := http.ProxyFromEnvironment(req)
	if err != nil {
		return nil, errors.New("the proxy in HTTP_PROXY or HTTPS_PROXY is no address")
	}
	return u, nil
}

// index gets the index of a channel. One older than oldest is refused: it may have been taken back since.
func (s *source) index(ctx context.Context, channel, arch string, oldest time.Time) (bundle.Index, error) {
	ctx, cancel := context.WithTimeout(ctx, indexTimeout)
	defer cancel()
	if err := bundle.CheckChannel(channel); err != nil {
		return bundle.Index{}, err
	}
	u := s.base.JoinPath(channel, arch+".json")
	req, err := s.request(ctx, u)
	if err != nil {
		return bundle.Index{}, err
	}
	last := s.last[u.String()]
	if last.etag != "" {
		req.Header.Set("If-None-Match", last.etag)
	} else if last.modified != "" {
		req.Header.Set("If-Modified-Since", last.modified)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return bundle.Index{}, s.scrub(u, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotModified && (last.etag != "" || last.modified != "") {
		return last.index, current(u, last.index)
	}
	if resp.StatusCode != http.StatusOK {
		return bundle.Index{}, s.refused(u, resp)
	}
	x, err := bundle.ReadIndex(resp.Body, s.keys)
	switch {
	case err != nil:
		return x, s.scrub(u, err)
	case x.Arch != arch || x.Channel != channel:
		return x, fmt.Errorf("%w: the index at %s is for %s of channel %s; publish each where it belongs", bundle.ErrArch, place(u), x.Arch, x.Channel)
	case x.Published.Before(oldest):
		return x, fmt.Errorf("%w: the index at %s is of %s, this device saw one of %s; publish it again", bundle.ErrOlder, place(u),
			x.Published.Format(time.RFC3339), oldest.Format(time.RFC3339))
	}
	s.last[u.String()] = answer{resp.Header.Get("ETag"), resp.Header.Get("Last-Modified"), x}
	return x, current(u, x)
}

// current refuses an index that has expired: somebody keeps newer ones away. A clock that is behind refuses none.
func current(u *url.URL, x bundle.Index) error {
	if x.Expires.IsZero() || time.Now().Before(x.Expires) {
		return nil
	}
	return fmt.Errorf("%w: that at %s was good until %s; publish it again, or look whether something in between keeps an old one", bundle.ErrExpired, place(u),
		x.Expires.Format(time.RFC3339))
}

func (s *source) request(ctx context.Context, u *url.URL) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, s.scrub(u, err)
	}
	req.Header.Set("User-Agent", "keyhaven-appliance")
	return req, nil
}

// place is as much of an address as may be shown: its user, password and query may be secret.
func place(u *url.URL) string { return u.Scheme + "://" + u.Host + u.EscapedPath() }

// scrub takes the address, which may hold a password, out of an error of net/http, and names the place.
func (s *source) scrub(u *url.URL, err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	return fmt.Errorf("%s: %w", place(u), err)
}

// refused is the error of a status that is no success.
func (s *source) refused(u *url.URL, resp *http.Response) error {
	hint := "look at the web server's log"
	switch resp.StatusCode {
	case http.StatusNotFound, http.StatusGone:
		hint = "is update.source right, and is this channel published for this architecture?"
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired:
		hint = "the server or a proxy wants to know who asks; updates are public files"
	}
	return fmt.Errorf("%s: the server answers %d %s; %s", place(u), resp.StatusCode, http.StatusText(resp.StatusCode), hint)
}

// A download is the body of a bundle, which goes on by ranges when a connection is cut. Its end is io.EOF only if size and
// SHA-256 are those of the index.
type download struct {
	s        *source
	ctx      context.Context
	u        *url.URL
	rel      bundle.Release
	progress func(done, total int64)

	body   io.ReadCloser
	cancel context.CancelFunc
	stall  *time.Timer
	etag   string
	off    int64
	tries  int
	hash   hash.Hash
	err    error
}

// download begins to get a bundle that the index of a channel names. The context is good for all of it.
func (s *source) download(ctx context.Context, channel string, rel bundle.Release) (*download, error) {
	ref, err := url.Parse(rel.URL)
	if err != nil {
		return nil, fmt.Errorf("%w: the address of %s is none", bundle.ErrFormat, rel.Version)
	}
	u := s.base.JoinPath(channel, "x").ResolveReference(ref)
	return &download{s: s, ctx: ctx, u: u, rel: rel, hash: sha256.New(), progress: func(int64, int64) {}}, nil
}

// Read gives what comes next. An error is final.
func (d *download) Read(p []byte) (int, error) {
	for d.err == nil {
		if d.off == d.rel.Size {
			d.err = d.end()
			break
		}
		if d.body == nil {
			if d.err = d.open(); d.err != nil || d.body == nil {
				continue
			}
		}
		d.stall.Reset(d.s.timing.Stalled)
		n, err := d.body.Read(p[:min(int64(len(p)), d.rel.Size-d.off)])
		if n > 0 {
			d.hash.Write(p[:n])
			d.off += int64(n)
			d.tries = 0
			d.progress(d.off, d.rel.Size)
		}
		if err != nil && d.off < d.rel.Size {
			d.cut(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, d.err
}

// end compares the whole.
func (d *download) end() error {
	d.Close()
	if got := hex.EncodeToString(d.hash.Sum(nil)); got != d.rel.SHA256 {
		return fmt.Errorf("%w: the SHA-256 of %s is %s, the index says %s; publish both again", bundle.ErrCorrupt, place(d.u), got, d.rel.SHA256)
	}
	return io.EOF
}

// cut ends a connection that failed, and waits before the next.
func (d *download) cut(err error) {
	d.Close()
	if d.ctx.Err() != nil {
		d.err = context.Cause(d.ctx)
		if errors.Is(d.ctx.Err(), context.DeadlineExceeded) {
			d.err = fmt.Errorf("%s: only %d of %d bytes came within %v; is the network fast enough?", place(d.u), d.off, d.rel.Size, d.s.timing.Total)
		}
		return
	}
	if errors.Is(err, context.Canceled) {
		err = fmt.Errorf("no byte came for %v", d.s.timing.Stalled)
	}
	if d.tries++; d.tries > maxResumes {
		d.err = fmt.Errorf("gave up after %d of %d bytes, %d times without a byte more: %w", d.off, d.rel.Size, d.tries, d.s.scrub(d.u, err))
		return
	}
	d.s.log.Info("a download was cut and goes on", "from", place(d.u), "done", d.off, "size", d.rel.Size, "err", d.s.scrub(d.u, err))
	wait := backoff(d.s.timing.Resume, d.tries, time.Minute)
	select {
	case <-d.ctx.Done():
	case <-time.After(wait + chance(wait/4)):
	}
}

// open asks for the rest. A nil error without a body asks for another attempt.
func (d *download) open() error {
	if d.ctx.Err() != nil {
		d.cut(d.ctx.Err())
		return d.err
	}
	ctx, cancel := context.WithCancel(d.ctx)
	d.cancel = cancel
	req, err := d.s.request(ctx, d.u)
	if err != nil {
		return err
	}
	if d.off > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", d.off))
		if d.etag != "" && !strings.HasPrefix(d.etag, "W/") {
			req.Header.Set("If-Range", d.etag)
		}
	}
	d.stall = time.AfterFunc(d.s.timing.Stalled, cancel)
	resp, err := d.s.client.Do(req)
	if err != nil {
		d.cut(err)
		return d.err
	}
	d.body = resp.Body
	return d.accept(resp)
}

// accept looks at an answer's head.
func (d *download) accept(resp *http.Response) error {
	switch {
	case resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests:
		d.cut(d.s.refused(d.u, resp))
		return d.err
	case resp.StatusCode == http.StatusPartialContent && d.off > 0:
		if got, want := resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-%d/%d", d.off, d.rel.Size-1, d.rel.Size); got != want {
			return fmt.Errorf("%w: %s answers with %q, not %q; publish bundle and index again", bundle.ErrCorrupt, place(d.u), clip(got), want)
		}
		return nil
	case resp.StatusCode != http.StatusOK:
		return d.s.refused(d.u, resp)
	}
	if resp.ContentLength >= 0 && resp.ContentLength != d.rel.Size {
		return fmt.Errorf("%w: %s has %d bytes, the index says %d; publish both again", bundle.ErrCorrupt, place(d.u), resp.ContentLength, d.rel.Size)
	}
	if d.off == 0 {
		d.etag = resp.Header.Get("ETag")
		return nil
	}
	if tag := resp.Header.Get("ETag"); tag != d.etag {
		return fmt.Errorf("%w: %s changed during the download; it is begun anew later", bundle.ErrCorrupt, place(d.u))
	}
	return d.skip()
}

// skip reads over what has come before, for a server that knows no ranges.
func (d *download) skip() error {
	buf := make([]byte, 32<<10)
	for left := d.off; left > 0; {
		d.stall.Reset(d.s.timing.Stalled)
		n, err := d.body.Read(buf[:min(int64(len(buf)), left)])
		left -= int64(n)
		if err != nil && left > 0 {
			d.cut(err)
			return d.err
		}
	}
	return nil
}

// Close ends the connection.
func (d *download) Close() error {
	if d.stall != nil {
		d.stall.Stop()
	}
	if d.body != nil {
		d.body.Close()
		d.body = nil
	}
	if d.cancel != nil {
		d.cancel()
	}
	return nil
}

func clip(s string) string {
	return string(bytes.ToValidUTF8([]byte(s[:min(len(s), 100)]), []byte("?")))
}
