package credential

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFile(t *testing.T) {
	dir := t.TempDir()
	given := filepath.Join(dir, "credentials")
	open := filepath.Join(dir, "open")
	for _, d := range []string{given, open} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"credentials/password": 0o440, "open/password": 0o400, "mine": 0o600, "everybodys": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct{ name, dir, path, want, err string }{
		{"file", "", filepath.Join(dir, "mine"), filepath.Join(dir, "mine"), ""},
		{"file that others may read", "", filepath.Join(dir, "everybodys"), "", "chmod 600"},
		{"no file", "", filepath.Join(dir, "none"), "", "no such file"},
		{"credential", given, "credential:password", filepath.Join(given, "password"), ""},
		{"no credential", given, "credential:pin", "", "LoadCredential=pin:PATH"},
		{"no directory", "", "credential:password", "", "CREDENTIALS_DIRECTORY is not set"},
		{"relative directory", "credentials", "credential:password", "", "CREDENTIALS_DIRECTORY is not set"},
		{"directory for all", open, "credential:password", "", "others must have no access"},
		{"no name", given, "credential:", "", "no name of a credential"},
		{"path for a name", given, "credential:../mine", "", "no name of a credential"},
		{"hidden", given, "credential:.x", "", "no name of a credential"},
		{"directory for a credential", dir, "credential:credentials", "", "others must have no access"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.dir == dir {
				if err := os.Chmod(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("CREDENTIALS_DIRECTORY", tt.dir)
			got, err := File(tt.path)
			if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %q, %v, want %q, %q", got, err, tt.want, tt.err)
			}
		})
	}
}
