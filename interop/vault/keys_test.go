package vault

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/signer"
	"github.com/keyhaven/keyhaven/transit"
)

func TestEveryKeyTypeAndAlgorithm(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	types := map[string]string{
		"rsa-2048": "RSA 2048", "rsa-3072": "RSA 3072", "ecdsa-p256": "ECDSA P-256",
		"ecdsa-p384": "ECDSA P-384", "ecdsa-p521": "ECDSA P-521", "ed25519": "Ed25519",
	}
	var names []string
	for typ := range types {
		l.make(typ, typ)
		names = append(names, typ)
	}
	b := l.open(l.config(names...))
	for typ, k := range keys(t, b, len(types)) {
		t.Run(typ, func(t *testing.T) {
			info := k.Info()
			if info.Type != types[typ] || info.Extractable || !info.NeverExtractable || !info.Local || info.Home != b.Name() {
				t.Errorf("got %+v", info)
			}
			if _, ok := k.(signer.Decrypter); ok {
				t.Error("the key decrypts: a padding oracle")
			}
			tried := 0
			for _, kind := range []signer.Kind{signer.PKCS1v15, signer.PSS, signer.ECDSA, signer.Ed25519} {
				for _, h := range []crypto.Hash{0, crypto.MD5SHA1, crypto.SHA1, crypto.SHA224, crypto.SHA256, crypto.SHA384, crypto.SHA512} {
					alg := signer.Algorithm{Kind: kind, Hash: h}
					if !k.Supports(alg) {
						if _, err := k.Sign(context.Background(), alg, make([]byte, 32)); !errors.Is(err, signer.ErrUnsupported) {
							t.Errorf("%v %v: got %v, want ErrUnsupported", kind, h, err)
						}
						continue
					}
					tried++
					sign(t, k, alg)
				}
			}
			want := map[string]int{"rsa-2048": 8, "rsa-3072": 8, "ed25519": 1}[typ]
			if want == 0 {
				want = 5 // ECDSA with SHA-1 and four hashes of SHA-2
			}
			if tried != want {
				t.Errorf("tried %d algorithms, want %d", tried, want)
			}
		})
	}
}

// Short integers, leading zeros: over many signatures all forms of ECDSA's DER come along.
func TestManySignatures(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	k := keys(t, l.open(l.config("web")), 1)["web"]
	for range 100 {
		sign(t, k, signer.Algorithm{Kind: signer.ECDSA, Hash: crypto.SHA256})
	}
}

func TestUnfitKeysAreRefusedAndTheRestServes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("good", "ecdsa-p256")
	l.make("takeaway", "ecdsa-p256", "exportable", true)
	l.make("backup", "ecdsa-p256", "allow_plaintext_backup", true)
	l.make("cipher", "aes256-gcm96")
	l.make("mac", "hmac", "key_size", 32)
	l.make("derived", "ed25519", "derived", true)
	l.make("secret", "ecdsa-p256")
	l.make("old", "ecdsa-p256")
	for range 2 {
		l.rotate("old")
	}
	if _, err := l.Do("keys/old/config", map[string]any{"min_decryption_version": 2, "min_encryption_version": 2}); err != nil {
		t.Fatal(err)
	}
	cfg := l.config("good", "takeaway", "backup", "cipher", "mac", "derived", "missing", "secret")
	cfg.Keys = append(cfg.Keys, transit.KeyConfig{Name: "old", Version: 1}, transit.KeyConfig{Name: "old", Version: 9},
		transit.KeyConfig{Name: "old", Version: 2})
	l.write("token", l.NewToken(lifetime(0, 0), "keys/secret"))
	b := l.open(cfg)
	sign(t, keys(t, b, 2)["good"], p256)
	sign(t, keys(t, b, 2)["old"], p256)
	faults := b.Faults()
	want := []string{
		`"takeaway".*exportable.*make a new key`, `"backup".*plain text backups`, `"cipher".*aes256-gcm96.*ed25519`, `"mac".*hmac`,
		`"derived".*derived`, `"missing".*HTTP 404.*no such key`, `"secret".*HTTP 403.*path "transit/keys/secret".*read.*path "transit/sign/secret".*update`,
		`"old".*does not sign with version 1.*2 to 3`, `"old".*no version 9.*latest is 3`,
	}
	if len(faults) != len(want) {
		t.Fatalf("got %d faults, want %d: %v", len(faults), len(want), faults)
	}
	for i, f := range faults {
		if !errors.Is(f, transit.ErrKey) {
			t.Errorf("%v is not an ErrKey", f)
		}
		if !matches(f.Error(), want[i]) {
			t.Errorf("got %q, want %s", f, want[i])
		}
		if !l.log.has("transit key not served") {
			t.Error("the log does not tell")
		}
	}
}

// matches reports whether the parts of pattern, between .*, follow one another in s.
func matches(s, pattern string) bool {
	for part := range strings.SplitSeq(pattern, ".*") {
		_, rest, ok := strings.Cut(s, part)
		if !ok {
			return false
		}
		s = rest
	}
	return true
}

func (l *lab) rotate(name string) {
	l.t.Helper()
	if _, err := l.Do("keys/"+name+"/rotate", map[string]any{}); err != nil {
		l.t.Fatal(err)
	}
}

func TestRotationServesBothVersions(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	b := l.open(l.config("web"))
	before := keys(t, b, 1)["web"]
	l.rotate("web")
	sign(t, before, p256) // with version 1, as ever
	after := keys(t, b, 1)["web"]
	sign(t, after, p256)
	if fmt.Sprint(before.Public()) == fmt.Sprint(after.Public()) {
		t.Error("Keys did not find the new version")
	}
	cfg := l.config()
	cfg.Keys = []transit.KeyConfig{{Name: "web", Version: 1}, {Name: "web"}, {Name: "web", Version: 2}}
	all, err := l.open(cfg).Keys(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || all[0].Info().SKI != before.Info().SKI || all[1].Info().SKI != after.Info().SKI {
		t.Fatalf("got %v, want versions 1 and 2, each once", all)
	}
	for _, k := range all {
		sign(t, k, p256)
	}
}

// A key that is deleted, or whose version is trimmed, while it is served is gone, and another home may have it.
func TestKeyGone(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	l.make("trimmed", "ecdsa-p256")
	b := l.open(l.config("web", "trimmed"))
	ks := keys(t, b, 2)
	l.rotate("trimmed")
	for _, step := range []struct {
		path string
		data map[string]any
	}{
		{"keys/web/config", map[string]any{"deletion_allowed": true}},
		{"keys/trimmed/config", map[string]any{"min_decryption_version": 2, "min_encryption_version": 2}},
		{"keys/trimmed/trim", map[string]any{"min_available_version": 2}},
	} {
		if _, err := l.Do(step.path, step.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Delete("keys/web"); err != nil {
		t.Fatal(err)
	}
	for name, k := range ks {
		_, err := k.Sign(context.Background(), p256, make([]byte, 32))
		if !errors.Is(err, signer.ErrNotFound) || !errors.Is(err, signer.ErrUnavailable) {
			t.Errorf("%s: got %v, want ErrNotFound and ErrUnavailable", name, err)
		}
		if k.(signer.Healther).Healthy() {
			t.Errorf("%s: still healthy", name)
		}
	}
	if err := b.Check(context.Background()); err != nil {
		t.Errorf("the engine answers, Check says %v", err)
	}
}

// Another key by the same name and version is not the key.
func TestKeyMadeAnew(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	b := l.open(l.config("web"))
	k := keys(t, b, 1)["web"]
	sign(t, k, p256)
	if _, err := l.Do("keys/web/config", map[string]any{"deletion_allowed": true}); err != nil {
		t.Fatal(err)
	}
	if err := l.Delete("keys/web"); err != nil {
		t.Fatal(err)
	}
	l.make("web", "ecdsa-p256")
	eventually(t, "the other key is noticed", func() bool {
		_, err := k.Sign(context.Background(), p256, make([]byte, 32))
		return errors.Is(err, signer.ErrNotFound) && errors.Is(err, signer.ErrUnavailable)
	})
	storm(t, keys(t, b, 1)["web"], p256, 4, 10)
}
