package edge

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/mtls"
)

func TestGroupWithAnIdentityOfItsOwn(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.cfg.KeyServers[0].Identity = filepath.Join(w.dir, "id-edge")
	w.identity = nil
	w.start()
	if out, err := w.sClient("-servername", "a.test"); err != nil {
		t.Errorf("s_client: %v\n%s", err, out)
	}
}

func TestGroupWithoutIdentityIsRefused(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.identity = nil
	for identity, want := range map[string]string{"": "no client certificate", "/nowhere": "/nowhere"} {
		w.cfg.KeyServers[0].Identity = identity
		if _, err := New(w.cfg, w.deps(newMemory(t))); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "key_servers[0]") {
			t.Errorf("identity %q: %v", identity, err)
		}
	}
}

func TestIdentityIsRenewedThroughTheKeyServer(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	id := w.identity.Identity()
	w.vault.renew = func(csr []byte) ([][]byte, error) { return w.owner.IssueCSR(csr, id, 0) }
	w.start()
	old := w.identity.Leaf().SerialNumber
	must(t, w.identity.Renew(t.Context(), w.server.renewShared))
	if got := w.identity.Leaf(); got.SerialNumber.Cmp(old) == 0 || w.identity.Identity() != id {
		t.Error("the certificate is the old one, or another's")
	}
	reread, err := mtls.OpenDir(filepath.Join(w.dir, "id-edge"), nil)
	must(t, err)
	if reread.Leaf().SerialNumber.Cmp(w.identity.Leaf().SerialNumber) != 0 {
		t.Error("the renewed certificate is not in the directory")
	}
	w.vault.renew = func([]byte) ([][]byte, error) { return [][]byte{{1, 2, 3}}, nil }
	if err := w.identity.Renew(t.Context(), w.server.renewShared); err == nil {
		t.Error("garbage was taken for a certificate")
	}
}
