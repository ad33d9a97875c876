package ingressconf

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"strconv"
	"strings"

	"github.com/keyhaven/keyhaven/vnet"
)

// A Scheme is a kind of service.
type Scheme string

// The kinds of service.
const (
	HTTP       Scheme = "http"        // HTTP over TCP
	HTTPS      Scheme = "https"       // HTTP over TLS
	TCP        Scheme = "tcp"         // any bytes over TCP
	UDP        Scheme = "udp"         // packets over UDP
	Unix       Scheme = "unix"        // a Unix socket: HTTP for requests, any bytes for TCP flows
	HTTPStatus Scheme = "http_status" // an answer with that status and no origin
	HelloWorld Scheme = "hello_world" // a page that shows that the way is open
)

// A Service is where a rule leads.
type Service struct {
	Scheme Scheme
	Host   string // with HTTP, HTTPS, TCP and UDP: a canonical address or host name
	Port   uint16 // with HTTP, HTTPS, TCP and UDP
	Path   string // with Unix: the socket's
	Status int    // with HTTPStatus
}

// String returns what ParseService reads.
func (s Service) String() string {
	switch s.Scheme {
	case Unix:
		return "unix:" + s.Path
	case HTTPStatus:
		return "http_status:" + strconv.Itoa(s.Status)
	case HelloWorld:
		return string(HelloWorld)
	}
	return string(s.Scheme) + "://" + s.Addr()
}

// Addr is host:port of a service over TCP or UDP.
func (s Service) Addr() string { return net.JoinHostPort(s.Host, strconv.Itoa(int(s.Port))) }

// Dials reports whether the service is reached over TCP or UDP.
func (s Service) Dials() bool { return s.Port != 0 }

const serviceForms = "write http://host:port, https://host:port, tcp://host:port, udp://host:port, unix:/path, http_status:NNN or hello_world"

// ParseService reads a service.
func ParseService(s string) (Service, error) {
	switch {
	case s == "":
		return Service{}, errors.New("is missing; " + serviceForms)
	case len(s) > maxValue:
		return Service{}, fmt.Errorf("has %d bytes, at most %d are allowed", len(s), maxValue)
	case s == string(HelloWorld):
		return Service{Scheme: HelloWorld}, nil
	}
	if p, ok := strings.CutPrefix(s, "unix:"); ok {
		if !path.IsAbs(p) || path.Clean(p) != p || strings.ContainsFunc(p, control) {
			return Service{}, fmt.Errorf("%q: write unix: and the absolute path of the socket, such as unix:/run/app.sock", s)
		}
		return Service{Scheme: Unix, Path: p}, nil
	}
	if n, ok := strings.CutPrefix(s, "http_status:"); ok {
		code, err := strconv.Atoi(n)
		if err != nil || code < 200 || code > 599 || strconv.Itoa(code) != n {
			return Service{}, fmt.Errorf("%q: the status must be a number from 200 to 599", s)
		}
		return Service{Scheme: HTTPStatus, Status: code}, nil
	}
	return parseURL(s)
}

func control(r rune) bool { return r < ' ' || r == 0x7f }

func parseURL(s string) (Service, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" {
		return Service{}, fmt.Errorf("%q is no service; %s", s, serviceForms)
	}
	svc := Service{Scheme: Scheme(u.Scheme)}
	switch svc.Scheme {
	case HTTP:
		svc.Port = 80
	case HTTPS:
		svc.Port = 443
	case TCP, UDP:
	default:
		return Service{}, fmt.Errorf("%q is no service; %s", s, serviceForms)
	}
	if u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.Opaque != "" || strings.HasSuffix(s, "#") {
		return Service{}, fmt.Errorf("%q: write scheme, host and port alone; the visitor's path is passed on as it is", s)
	}
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return Service{}, fmt.Errorf("%q: the port must be a number from 1 to 65535", s)
		}
		svc.Port = uint16(n)
	} else if svc.Port == 0 || strings.HasSuffix(u.Host, ":") {
		return Service{}, fmt.Errorf("%q: the port is missing; write %s://host:port", s, svc.Scheme)
	}
	if svc.Host, err = canonicalTarget(u.Hostname()); err != nil {
		return Service{}, fmt.Errorf("%q: %w", s, err)
	}
	return svc, nil
}

// canonicalTarget returns the one form of an address or a host name that is dialled.
func canonicalTarget(host string) (string, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Zone() != "" {
			return "", fmt.Errorf("address %q has a zone; write it without", host)
		}
		return a.Unmap().String(), nil
	}
	name, err := vnet.CanonicalHost(host)
	if err != nil {
		return "", err
	}
	if strings.HasPrefix(name, "*.") {
		return "", fmt.Errorf("host %q is a pattern; name one host", host)
	}
	return name, nil
}
