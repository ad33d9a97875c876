package appliance

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A JoinFunc enrols a connector: it has an edge of the token certify the key in keyFile, which it makes if it is missing, and
// writes the identity to dir, which may be there, empty. It can be called again with the same token and key whatever became
// of an earlier call. Name is what to propose. Via is the proxy by which edges are reached; nil: none.
type JoinFunc func(ctx context.Context, token mtls.JoinToken, keyFile, dir, name string, via *tunnel.ProxyConfig) error

// Files of enrolment in configDir, and directories.
const (
	tokenFile     = "token"          // taken from the card, until it is used up
	keyPrefix     = "join-"          // and the token's id and .pem: the key that is to be certified
	enrolmentFile = "enrolment.json" // what became of the last token

	newIdentity   = identityDir + ".new"   // is being made
	readyIdentity = identityDir + ".ready" // is whole, and takes the place of what is there
)

// An enrolment is what became of the last token.
type enrolment struct {
	TokenID string    `json:"token_id"`
	State   string    `json:"state"` // enrolJoined or enrolRefused
	Reason  string    `json:"reason,omitempty"`
	At      time.Time `json:"at"`
}

const (
	enrolJoined  = "joined"
	enrolRefused = "refused"
)

// enroller moves tokens from the card to an identity. A power cut at any point leaves a state from which it goes on: the token is
// on the card until it is on the data partition, and there until the identity is.
type enroller struct{ host *Host }

func (e enroller) keyFile(id string) string { return e.host.path(configDir, keyPrefix+id+".pem") }

// last returns what became of the last token; the zero value if there was none.
func (e enroller) last() (r enrolment) {
	if b, err := readSmall(e.host.path(configDir, enrolmentFile)); err == nil {
		_ = json.Unmarshal(b, &r) // a damaged one counts for none
	}
	return r
}

func (e enroller) note(r enrolment) error {
	r.At = e.host.Now().UTC()
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(e.host.path(configDir, enrolmentFile), append(b, '\n'), 0o600)
}

// take keeps a token of the card. When it returns nil the token can go from the card. A token that was used up or refused before
// is not kept again.
func (e enroller) take(text string) error {
	token, err := mtls.ParseJoinToken(text)
	if err != nil {
		return err
	}
	if e.last().TokenID == token.ID {
		return nil
	}
	if pending, err := readSmall(e.host.path(configDir, tokenFile)); err == nil && string(pending) == text {
		return nil
	}
	if err := os.MkdirAll(e.host.path(configDir), 0o700); err != nil {
		return err
	}
	return writeFile(e.host.path(configDir, tokenFile), []byte(text), 0o600)
}

// pending returns the token that is to be used, or false if there is none.
func (e enroller) pending() (mtls.JoinToken, bool) {
	b, err := readSmall(e.host.path(configDir, tokenFile))
	if err != nil {
		return mtls.JoinToken{}, false
	}
	token, err := mtls.ParseJoinToken(string(b))
	return token, err == nil
}

// hasIdentity reports whether the connector can run.
func (e enroller) hasIdentity() bool {
	for _, f := range []string{"key.pem", "cert.pem"} {
		if _, err := os.Stat(e.host.path(identityDir, f)); err != nil {
			return false
		}
	}
	return true
}

// join uses the token up and puts the identity in its place, in place of an older one. It returns a [refusal] if the token is
// of no use any more, which it then forgets.
func (e enroller) join(ctx context.Context, join JoinFunc, token mtls.JoinToken, name string, via *tunnel.ProxyConfig) error {
	dir := e.host.path(newIdentity)
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	err := join(ctx, token, e.keyFile(token.ID), dir, name, via)
	if r, refused := errors.AsType[*tunnel.RefusedError](err); refused && !r.Retriable() {
		why := refusalText(err)
		return errors.Join(refusal(why), e.note(enrolment{TokenID: token.ID, State: enrolRefused, Reason: why}), e.forget(token.ID))
	}
	if err != nil {
		return err
	}
	if err := e.settle(); err != nil {
		return err
	}
	if err := e.note(enrolment{TokenID: token.ID, State: enrolJoined}); err != nil {
		return err
	}
	return e.forget(token.ID)
}

// A refusal says that a token is of no use any more.
type refusal string

func (r refusal) Error() string { return string(r) }

// settle makes the new identity the connector's. From the first rename on it is known to be whole; recover goes on from there.
func (e enroller) settle() error {
	dir := e.host.path(newIdentity)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	paths := []string{dir}
	for _, f := range entries {
		paths = append(paths, filepath.Join(dir, f.Name()))
	}
	if err := e.host.chown(connectorUser, paths...); err != nil {
		return err
	}
	for _, p := range paths {
		if err := syncDir(p); err != nil { // a file as well
			return err
		}
	}
	if err := os.RemoveAll(e.host.path(readyIdentity)); err != nil {
		return err
	}
	if err := os.Rename(dir, e.host.path(readyIdentity)); err != nil {
		return err
	}
	return e.recover()
}

// recover finishes what settle began.
func (e enroller) recover() error {
	ready, place := e.host.path(readyIdentity), e.host.path(identityDir)
	if _, err := os.Stat(ready); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := syncDir(filepath.Dir(place)); err != nil {
		return err
	}
	if err := os.RemoveAll(place); err != nil {
		return err
	}
	if err := os.Rename(ready, place); err != nil {
		return err
	}
	return syncDir(filepath.Dir(place))
}

// forget removes the token, and all keys for tokens.
func (e enroller) forget(id string) error {
	errs := []error{}
	if pending, ok := e.pending(); ok && pending.ID == id {
		_, err := remove(e.host.path(configDir, tokenFile))
		errs = append(errs, err)
	}
	keys, err := filepath.Glob(e.host.path(configDir, keyPrefix+"*.pem"))
	errs = append(errs, err)
	for _, k := range keys {
		_, err := remove(k)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// A trouble is why something does not work, and what a person can do.
type trouble struct {
	state State
	text  string
	todo  string
}

func refusalText(err error) string {
	switch {
	case errors.Is(err, tunnel.ErrTokenUsed):
		return "The join token was used before: each one is good for one device."
	case errors.Is(err, tunnel.ErrTokenExpired):
		return "The join token has expired."
	case errors.Is(err, tunnel.ErrTokenUnknown):
		return "The edge does not know the join token: it was deleted, or expired long ago."
	}
	return "The edge refused the join token."
}

// refusedTodo is what to do about a token that is of no use.
const refusedTodo = "Make a new one at the edge (keyhaven-edge tunnel token create NAME), write it into keyhaven.yaml on the card as token:, and start the device again."

// joinTrouble explains why joining failed for now.
func joinTrouble(err error, now time.Time) trouble {
	var dns *net.DNSError
	switch {
	case isClock(err):
		return trouble{StateJoining, fmt.Sprintf("The clock says %s, which cannot be right: the edge's certificate is not valid then. Waiting for a time server.", now.UTC().Format("2 January 2006, 15:04 UTC")),
			"Let the device reach a time server (UDP port 123), or name one in your network under ntp: in keyhaven.yaml."}
	case errors.Is(err, mtls.ErrRefused):
		return trouble{StateJoining, "What answers at the edge's address is not the edge that made the token: the token is for another installation, or something on the way intercepts the connection.",
			"Use a token that this edge made, and look whether a proxy or firewall of your network is in between."}
	case errors.Is(err, tunnel.ErrProxy):
		return trouble{StateJoining, "The proxy does not let it out: " + oneLine(err.Error()), "Look whether address, user and password under proxy: in keyhaven.yaml are right, and whether the proxy allows CONNECT to the edge's port (7844 as a rule)."}
	case errors.As(err, &dns) && dns.IsNotFound:
		return trouble{StateJoining, fmt.Sprintf("The edge's name %s does not exist.", dns.Name), "Look whether the name is right. It comes with the join token; if the edge has moved, make a new token."}
	case errors.As(err, &dns):
		return trouble{StateNoNetwork, "Names cannot be looked up: the network's name server (DNS) does not answer.", "Look whether your router has a connection to the internet, or name a server under network: dns: in keyhaven.yaml, such as 9.9.9.9."}
	case isUnreachable(err):
		return trouble{StateNoNetwork, "The network leads nowhere: there is no way to the edge.", "Look whether your router has a connection to the internet, and whether gateway: in keyhaven.yaml is right if you set one."}
	case errors.Is(err, tunnel.ErrNoAnswer), errors.Is(err, context.DeadlineExceeded):
		return trouble{StateJoining, "The edge does not answer.", "Look whether the edge runs, and whether your network lets UDP and TCP out to its port (7844 as a rule); if it lets nothing out but through a proxy, name that under proxy: in keyhaven.yaml."}
	case errors.Is(err, tunnel.ErrBusy):
		return trouble{StateJoining, "The edge is busy.", "Nothing: the device tries again."}
	case isFull(err), errors.Is(err, fs.ErrPermission):
		return trouble{StateJoining, "The identity cannot be written to the data partition.", "Write the image to another card: this one is full or worn out."}
	}
	return trouble{StateJoining, "Joining fails: " + oneLine(err.Error()), "The device tries again. If this stays so, look whether edge and token are right."}
}

// isClock finds certificates that are not valid at the time that the clock shows.
func isClock(err error) bool {
	if inv, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		return inv.Reason == x509.Expired
	}
	return strings.Contains(err.Error(), "certificate has expired or is not yet valid")
}

// oneLine makes an error fit for a screen: one line, without what may be secret, and not without end.
func oneLine(s string) string {
	s = tokenText.ReplaceAllString(strings.Join(strings.Fields(s), " "), "khj1_…")
	if r := []rune(s); len(r) > 300 {
		s = string(r[:300]) + "…"
	}
	return s
}
