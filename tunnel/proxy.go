package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	// maxProxyAnswer bounds the head of a proxy's answer.
	maxProxyAnswer = 16 << 10
	// maxPasswordFile bounds what is read of PasswordFile.
	maxPasswordFile = 4 << 10
)

// Validate reports what is wrong with p, except for what only an attempt can show.
func (p *ProxyConfig) Validate() error {
	_, err := p.parse()
	return err
}

func (p *ProxyConfig) parse() (*url.URL, error) {
	u, err := url.Parse(p.URL)
	if err != nil {
		return nil, fmt.Errorf("%w: the URL does not parse; it must be http://host:port or https://host:port", ErrProxy)
	}
	switch {
	case u.User != nil:
		return nil, fmt.Errorf("%w: the URL holds a user; put it into user and password_file", ErrProxy)
	case u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		return nil, fmt.Errorf("%w: the URL %q must be http://host:port or https://host:port", ErrProxy, p.URL)
	case !validPort(u.Port()):
		return nil, fmt.Errorf("%w: the port of the URL %q must be from 1 to 65535", ErrProxy, p.URL)
	case p.User == "" && p.PasswordFile != "":
		return nil, fmt.Errorf("%w: there is a password file but no user", ErrProxy)
	case strings.ContainsAny(p.User, ":\r\n"):
		return nil, fmt.Errorf("%w: the user name holds a colon or a line end", ErrProxy)
	}
	return u, nil
}

// validPort reports whether a URL may have the port, which may be absent.
func validPort(port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return port == "" || err == nil && n > 0
}

// dial opens a connection to addr through the proxy.
func (p *ProxyConfig) dial(ctx context.Context, dialer *net.Dialer, addr string) (net.Conn, error) {
	u, err := p.parse()
	if err != nil {
		return nil, err
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	at := net.JoinHostPort(u.Hostname(), port)
	conn, err := dialer.DialContext(ctx, "tcp", at)
	if err != nil {
		return nil, fmt.Errorf("%w %s: cannot be reached; is its address right? (%w)", ErrProxy, at, err)
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) }) //nolint:errcheck // it fails anyway, then
	through, err := p.connect(ctx, conn, u, addr)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close() //nolint:errcheck // nothing is left to lose
		return nil, fmt.Errorf("%w %s: %w", ErrProxy, at, err)
	}
	return through, nil
}

// connect asks the proxy for a connection to addr.
func (p *ProxyConfig) connect(ctx context.Context, conn net.Conn, u *url.URL, addr string) (net.Conn, error) {
	conn.SetDeadline(time.Now().Add(tcpDialTimeout)) //nolint:errcheck // Write would fail too
	if u.Scheme == "https" {
		secure := tls.Client(conn, &tls.Config{ServerName: u.Hostname(), MinVersion: tls.VersionTLS12})
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, fmt.Errorf("TLS handshake: %w", err)
		}
		conn = secure
	}
	request := "CONNECT " + addr + " HTTP/1.1\r\nHost: " + addr + "\r\n"
	if p.User != "" {
		credentials, err := p.credentials()
		if err != nil {
			return nil, err
		}
		request += "Proxy-Authorization: Basic " + credentials + "\r\n"
	}
	if _, err := io.WriteString(conn, request+"\r\n"); err != nil {
		return nil, err
	}
	status, err := readProxyAnswer(conn)
	if err != nil {
		return nil, err
	}
	if err := p.statusError(status, addr); err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Time{})
}

// credentials reads the password. No error holds any of it.
func (p *ProxyConfig) credentials() (string, error) {
	var password []byte
	if p.PasswordFile != "" {
		f, err := os.Open(p.PasswordFile)
		if err != nil {
			return "", fmt.Errorf("password file: %w", err)
		}
		defer f.Close() //nolint:errcheck // only read
		if password, err = io.ReadAll(io.LimitReader(f, maxPasswordFile+1)); err != nil {
			return "", fmt.Errorf("password file: %w", err)
		}
		if len(password) > maxPasswordFile {
			return "", fmt.Errorf("password file %s: longer than %d bytes", p.PasswordFile, maxPasswordFile)
		}
		password = bytes.TrimSuffix(bytes.TrimSuffix(password, []byte("\n")), []byte("\r"))
	}
	return base64.StdEncoding.EncodeToString(append([]byte(p.User+":"), password...)), nil
}

// readProxyAnswer reads the head of the answer and no byte more, since what follows belongs to the connection, and returns
// the status code. See RFC 9112, section 4.
func readProxyAnswer(r io.Reader) (int, error) {
	var head []byte
	var b [1]byte
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) && !bytes.HasSuffix(head, []byte("\n\n")) {
		if len(head) == maxProxyAnswer {
			return 0, fmt.Errorf("its answer has a head of more than %d bytes; is it an HTTP proxy?", maxProxyAnswer)
		}
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return 0, fmt.Errorf("no whole answer; is it an HTTP proxy? (%w)", unexpectedEOF(err))
		}
		head = append(head, b[0])
	}
	// HTTP-version SP 3DIGIT, see RFC 9112, section 4.
	line, ok := strings.CutPrefix(string(head), "HTTP/1.")
	if !ok || len(line) < 5 || line[0] < '0' || line[0] > '9' || line[1] != ' ' {
		return 0, errNoProxy
	}
	status, err := strconv.ParseUint(line[2:5], 10, 16)
	if err != nil {
		return 0, errNoProxy
	}
	return int(status), nil
}

var errNoProxy = errors.New("its answer is not HTTP/1; is it an HTTP proxy?")

// statusError says what to do about a refusal.
func (p *ProxyConfig) statusError(status int, addr string) error {
	switch {
	case status >= 200 && status < 300:
		return nil
	case status == 407 && p.User == "":
		return fmt.Errorf("it wants a user and a password (407): set user and password_file")
	case status == 407:
		return fmt.Errorf("it does not accept the user %q and the password (407)", p.User)
	case status == 403, status == 405:
		return fmt.Errorf("it does not allow connections to %s (%d): have it allow CONNECT to this host and port", addr, status)
	case status == 502, status == 503, status == 504:
		return fmt.Errorf("it cannot reach %s (%d)", addr, status)
	}
	return fmt.Errorf("it answers CONNECT to %s with status %d", addr, status)
}
