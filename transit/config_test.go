package transit

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	good := write(t, dir, "good", "canary\n", 0o600)
	open := write(t, dir, "open", "canary\n", 0o644)
	base := Config{
		Address: "https://vault.example.net:8200", Keys: []KeyConfig{{Name: "web"}},
		Auth: AuthConfig{Method: AuthTokenFile, TokenFile: good},
	}
	for name, test := range map[string]struct {
		set   func(*Config)
		field string // "" for none
		text  string
	}{
		"minimal":            {func(*Config) {}, "", ""},
		"all":                {func(c *Config) { c.Mount, c.Namespace, c.Batch, c.InFlight = "team/transit", "a/b/", 16, 8 }, "", ""},
		"no address":         {func(c *Config) { c.Address = "" }, "Address", "no address"},
		"plain http":         {func(c *Config) { c.Address = "http://vault.example.net:8200" }, "Address", "plain http to vault.example.net"},
		"http to a name":     {func(c *Config) { c.Address = "http://localhost:8200" }, "Address", "127.0.0.1"},
		"http to loopback":   {func(c *Config) { c.Address = "http://127.0.0.1:8200" }, "", ""},
		"http to loopback 6": {func(c *Config) { c.Address = "http://[::1]:8200" }, "", ""},
		"http to any":        {func(c *Config) { c.Address = "http://0.0.0.0:8200" }, "Address", "plain http"},
		"password":           {func(c *Config) { c.Address = "https://u:canary@vault.example.net" }, "Address", "password"},
		"not a URL":          {func(c *Config) { c.Address = "https://canary%zz" }, "Address", "not a URL"},
		"scheme":             {func(c *Config) { c.Address = "unix:///run/vault" }, "Address", ""},
		"no host":            {func(c *Config) { c.Address = "https://" }, "Address", "server's URL"},
		"query":              {func(c *Config) { c.Address = "https://vault.example.net?token=x" }, "Address", "server's URL"},
		"mount":              {func(c *Config) { c.Mount = "transit/../sys" }, "Mount", "words"},
		"mount, double":      {func(c *Config) { c.Mount = "a//b" }, "Mount", "words"},
		"namespace":          {func(c *Config) { c.Namespace = "a b" }, "Namespace", "words"},
		"no keys":            {func(c *Config) { c.Keys = nil }, "Keys", "no keys"},
		"key name":           {func(c *Config) { c.Keys = []KeyConfig{{Name: "../export/web"}} }, "Keys", "name of a key"},
		"key version":        {func(c *Config) { c.Keys[0].Version = -1 }, "Keys", "version -1"},
		"key twice":          {func(c *Config) { c.Keys = append(c.Keys, c.Keys[0]) }, "Keys", "twice"},
		"batch":              {func(c *Config) { c.Batch = 257 }, "Batch", "1 to 256"},
		"in flight":          {func(c *Config) { c.InFlight = -1 }, "InFlight", "1 to 256"},
		"timeout":            {func(c *Config) { c.Timeout = time.Hour }, "Timeout", "at most 1m0s"},
		"no method":          {func(c *Config) { c.Auth = AuthConfig{} }, "Auth.Method", "approle"},
		"open token":         {func(c *Config) { c.Auth.TokenFile = open }, "Auth.TokenFile", "chmod 600"},
		"no token":           {func(c *Config) { c.Auth.TokenFile = "" }, "Auth.TokenFile", "needs a file"},
		"token missing":      {func(c *Config) { c.Auth.TokenFile = filepath.Join(dir, "none") }, "Auth.TokenFile", "no such file"},
		"relative token":     {func(c *Config) { c.Auth.TokenFile = "token" }, "Auth.TokenFile", "absolute"},
		"token directory":    {func(c *Config) { c.Auth.TokenFile = dir }, "Auth.TokenFile", "neither a regular file"},
		"token with mount":   {func(c *Config) { c.Auth.Mount = "x" }, "Auth.Mount", "take it out"},
		"token with role":    {func(c *Config) { c.Auth.Role = "x" }, "Auth.Role", "take it out"},
		"token with secret":  {func(c *Config) { c.Auth.SecretIDFile = good }, "Auth.SecretIDFile", "take it out"},
		"token, wrapped":     {func(c *Config) { c.Auth.SecretIDWrapped = true }, "Auth.SecretIDWrapped", "take it out"},
		"approle":            {func(c *Config) { c.Auth = AuthConfig{Method: AuthAppRole, RoleIDFile: open, SecretIDFile: good} }, "", ""},
		"approle, open":      {func(c *Config) { c.Auth = AuthConfig{Method: AuthAppRole, RoleIDFile: open, SecretIDFile: open} }, "Auth.SecretIDFile", "chmod 600"},
		"approle, mount": {func(c *Config) {
			c.Auth = AuthConfig{Method: AuthAppRole, Mount: "../x", RoleIDFile: good, SecretIDFile: good}
		}, "Auth.Mount", "words"},
		"kubernetes":       {func(c *Config) { c.Auth = AuthConfig{Method: AuthKubernetes, Role: "r", JWTFile: open} }, "", ""},
		"kubernetes, role": {func(c *Config) { c.Auth = AuthConfig{Method: AuthKubernetes, JWTFile: open} }, "Auth.Role", "needs a role"},
		"ca":               {func(c *Config) { c.TLS.CA = good }, "TLS.CA", "no certificate"},
		"ca missing":       {func(c *Config) { c.TLS.CA = "/none" }, "TLS.CA", "no such file"},
		"cert alone":       {func(c *Config) { c.TLS.Cert = good }, "TLS.Cert", "both"},
		"cert, open key":   {func(c *Config) { c.TLS.Cert, c.TLS.Key = good, open }, "TLS.Cert", "chmod 600"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := base
			cfg.Keys = []KeyConfig{base.Keys[0]}
			test.set(&cfg)
			all := cfg.Check()
			if test.field == "" {
				if len(all) > 0 {
					t.Fatalf("got %v, want no fault", all)
				}
				return
			}
			var f *FieldError
			if len(all) != 1 || !errors.As(all[0], &f) || f.Field != test.field || !strings.Contains(f.Error(), test.text) {
				t.Fatalf("got %v, want a fault of %s: %s", all, test.field, test.text)
			}
			if strings.Contains(f.Error(), "canary") {
				t.Errorf("the error shows a secret: %v", f)
			}
			if _, err := Open(t.Context(), cfg); !errors.As(err, &f) {
				t.Errorf("Open: got %v, want a FieldError", err)
			}
		})
	}
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	for name, test := range map[string]struct {
		text string
		mode os.FileMode
		want string // "" for an error
	}{
		"plain":      {"canary", 0o600, "canary"},
		"line":       {"canary\n", 0o400, "canary"},
		"dos line":   {"canary\r\n", 0o600, "canary"},
		"empty":      {"\n", 0o600, ""},
		"two lines":  {"canary\ncanary\n", 0o600, ""},
		"space":      {"canary x", 0o600, ""},
		"zero":       {"canary\x00", 0o600, ""},
		"too long":   {strings.Repeat("canary", maxSecretFile), 0o600, ""},
		"for others": {"canary", 0o604, ""},
		"writable":   {"canary", 0o620, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := readFile(write(t, dir, strings.ReplaceAll(name, " ", "-"), test.text, test.mode), true)
			if got != test.want || (err == nil) != (test.want != "") {
				t.Errorf("got %q, %v, want %q", got, err, test.want)
			}
			if err != nil && strings.Contains(err.Error(), "canary") {
				t.Errorf("the error shows the secret: %v", err)
			}
		})
	}
}

func TestScrub(t *testing.T) {
	got := secrets{"", "hvs.canary"}.scrub("token hvs.canary\n\x1b[31mred  " + strings.Repeat("ä", 400))
	if strings.Contains(got, "canary") || strings.ContainsAny(got, "\n\x1b") || len(got) > 310 || !strings.HasPrefix(got, "token [redacted] [31mred ä") {
		t.Errorf("got %q", got)
	}
}
