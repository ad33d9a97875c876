package appliance

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

var sshTypes = []string{"ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa",
	"sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"}

// checkSSHKey checks a line of authorized_keys without options: the type, the key in base64, whose own first word is the
// type again (RFC 4253, section 6.6), and a comment. It never quotes the line, which may be a private key by mistake.
func checkSSHKey(line string) error {
	if strings.Contains(line, "PRIVATE KEY") {
		return errors.New("is a private key, which must never leave your computer; put the line of the file that ends in .pub here, and make a new pair of keys if others can have seen this file")
	}
	if strings.ContainsAny(line, "\r\n") || len(line) > 8<<10 {
		return errors.New("must be one line, as in the file that ends in .pub")
	}
	kind, rest, _ := strings.Cut(line, " ")
	switch {
	case kind == "ssh-dss":
		return errors.New("is a DSA key, which no SSH server takes any more; make another with ssh-keygen -t ed25519")
	case !slices.Contains(sshTypes, kind):
		return errors.New("is no public SSH key; copy the one line of the file that ends in .pub, such as ~/.ssh/id_ed25519.pub, which starts with ssh-ed25519")
	}
	text, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	blob, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(blob) < 4+len(kind) || int(binary.BigEndian.Uint32(blob)) != len(kind) || string(blob[4:4+len(kind)]) != kind || !wholeSSH(blob) {
		return fmt.Errorf("the %s key is damaged or cut off; copy the whole line again", kind)
	}
	return nil
}

// wholeSSH reports whether a key is made of whole strings, three at least but for Ed25519's two, and of nothing else.
func wholeSSH(blob []byte) bool {
	n := 0
	for ; len(blob) > 0; n++ {
		if len(blob) < 4 {
			return false
		}
		size := binary.BigEndian.Uint32(blob)
		if uint64(size) > uint64(len(blob)-4) || size == 0 {
			return false
		}
		blob = blob[4+size:]
	}
	return n >= 2
}
