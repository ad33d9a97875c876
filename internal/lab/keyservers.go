package lab

import (
	"context"
	"path/filepath"
)

// KeyServerPlan is one key server of the first site, with an identity and an audit log of its own.
type KeyServerPlan struct {
	Name   string // the identity's
	Listen string // host:port
	Ops    string // loopback host:port
}

// A KeyServer is one running key server.
type KeyServer struct {
	KeyServerPlan
	AuditDir string
	Proc     *Process
}

// keyServers are the plans of all key servers, the first site's first.
func (p *Plan) keyServers() []KeyServerPlan {
	site := p.Sites[0]
	return append([]KeyServerPlan{{Name: "ks1", Listen: site.KeyServer, Ops: site.KeyServerOps}}, p.KeyServers...)
}

// keyServerFile names a file of the i-th key server. The first has the plain name.
func (l *Lab) keyServerFile(i int, ext string) string {
	base := "keyserver"
	if i > 0 {
		base += "-" + l.Plan.keyServers()[i].Name
	}
	return l.Path(base + ext)
}

func (l *Lab) auditDir(i int) string {
	if i == 0 {
		return l.Path("audit")
	}
	return l.keyServerFile(i, "-audit")
}

func (l *Lab) keyServerConfig(i int) obj {
	var hosts, decrypt []string
	for _, z := range l.Plan.Zones {
		hosts = append(hosts, z.Host)
		if z.Decrypt {
			decrypt = append(decrypt, z.Host)
		}
	}
	token := obj{"uri": l.Token.URI()}
	if len(decrypt) > 0 {
		token["decrypt"] = decrypt
	}
	var clients []obj
	for e := range l.Plan.edges() {
		id := "spiffe://" + KeyDomain + "/edge/" + edgeName(e)
		clients = append(clients, obj{"id": id, "keys": hosts, "operations": []string{"tls-sign"}, "schemes": []string{"*"}, "snis": hosts},
			obj{"id": id, "operations": []string{"renew"}})
		if len(decrypt) > 0 {
			clients = append(clients, obj{"id": id, "keys": decrypt, "operations": []string{"decrypt"}, "snis": decrypt})
		}
	}
	plan, dir := l.Plan.keyServers()[i], l.keyServerFile(i, "")
	return obj{
		"listen": plan.Listen, "ops": obj{"listen": plan.Ops}, "modules": []string{l.Token.Module}, "ca_dir": l.Path("key-ca"),
		"tls":    obj{"cert": filepath.Join(dir, "cert.pem"), "key": filepath.Join(dir, "key.pem"), "ca": filepath.Join(dir, "ca.pem")},
		"tokens": []obj{token}, "clients": clients, "legacy": obj{"decrypt": len(decrypt) > 0},
		"control": l.keyServerFile(i, ".sock"), "audit": obj{"mode": "required", "dir": l.auditDir(i), "key_file": l.Path("audit.key"), "checkpoint": "5s"},
	}
}

// prepareKeyServers makes the processes of the key servers, not yet started.
func (l *Lab) prepareKeyServers(program string) {
	level := "debug" // which has a line for each signature, though the audit log has a record of it
	if l.Plan.Quiet {
		level = "warn"
	}
	for i, plan := range l.Plan.keyServers() {
		config := l.keyServerFile(i, ".yaml")
		name := filepath.Base(l.keyServerFile(i, ""))
		l.KeyServers = append(l.KeyServers, &KeyServer{plan, l.auditDir(i),
			l.process(name, l.Plan.Sites[0].NS, program, "run", "--config", config, "--log-format", "json", "--log-level", level)})
	}
	l.KeyServer = l.KeyServers[0].Proc
}

// RestartKeyServer ends a key server, in order or by a kill, starts it again and waits until it is ready.
func (l *Lab) RestartKeyServer(ctx context.Context, k *KeyServer, kill bool) error {
	if err := k.Proc.restart(kill); err != nil {
		return err
	}
	return l.awaitReady(ctx, k.Proc, k.Ops)
}
