package mtls

import (
	"errors"
	"io/fs"
	"os"
)

// A key and its certificate are two files, and a crash may fall between the writing of one and the other. So the
// certificate decides. Key and roots are first written beside their places, with the suffix ".new"; renaming the
// certificate into place is the one step that changes the identity; then the others follow. A reader takes the key that
// fits the certificate, from its place or from beside it. A reader never writes; a writer first settles what an
// interrupted one has left, so that the only copy of a key in use is never written over.

const stagedSuffix = ".new"

// settled says where the parts of an identity were found.
type settled struct{ keyStaged, rootsStaged bool }

// load reads an identity from its files.
func load(c SourceConfig) (loaded, error) {
	// Another process may replace the files between two reads of ours; that is over after one more try.
	const tries = 3
	var err error
	for range tries {
		var l loaded
		if l, _, err = loadOnce(c); err == nil {
			return l, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	return loaded{}, err
}

func loadOnce(c SourceConfig) (loaded, settled, error) {
	certPEM, err := readFile(c.CertFile)
	if err != nil {
		return loaded{}, settled{}, err
	}
	keyPEM, err := readSecretFile(c.KeyFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return loaded{}, settled{}, err
	}
	rootsPEM, rootsErr := readFile(c.RootsFile)
	if rootsErr != nil && !errors.Is(rootsErr, fs.ErrNotExist) {
		return loaded{}, settled{}, rootsErr
	}
	if err = errors.Join(err, rootsErr); err == nil {
		var l loaded
		if l, err = assemble(c, certPEM, keyPEM, rootsPEM); err == nil {
			return l, settled{}, nil
		}
	}
	// The roots are moved into place before the key, so staged roots count only together with a staged key.
	stagedKey, stagedErr := readSecretFile(c.KeyFile + stagedSuffix)
	if stagedErr != nil {
		return loaded{}, settled{}, err
	}
	if l, stagedErr := assemble(c, certPEM, stagedKey, rootsPEM); stagedErr == nil {
		return l, settled{keyStaged: true}, nil
	}
	if stagedRoots, stagedErr := readFile(c.RootsFile + stagedSuffix); stagedErr == nil {
		if l, stagedErr := assemble(c, certPEM, stagedKey, stagedRoots); stagedErr == nil {
			return l, settled{keyStaged: true, rootsStaged: true}, nil
		}
	}
	return loaded{}, settled{}, err
}

// writeFiles replaces an identity. Nil roots stay as they are.
func writeFiles(c SourceConfig, keyPEM, certPEM, rootsPEM []byte) error {
	for _, step := range writeSteps(c, keyPEM, certPEM, rootsPEM) {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// writeSteps returns the writing of an identity as steps between any two of which a crash may fall.
func writeSteps(c SourceConfig, keyPEM, certPEM, rootsPEM []byte) []func() error {
	steps := []func() error{func() error { return settle(c) }}
	if rootsPEM != nil {
		steps = append(steps, func() error { return replaceFile(c.RootsFile+stagedSuffix, rootsPEM, 0o644) })
	}
	steps = append(steps,
		func() error { return replaceFile(c.KeyFile+stagedSuffix, keyPEM, 0o600) },
		func() error { return replaceFile(c.CertFile, certPEM, 0o644) },
	)
	if rootsPEM != nil {
		steps = append(steps, func() error { return moveFile(c.RootsFile+stagedSuffix, c.RootsFile) })
	}
	return append(steps, func() error { return moveFile(c.KeyFile+stagedSuffix, c.KeyFile) })
}

// settle completes an interrupted writing that had replaced the certificate, and clears one that had not.
func settle(c SourceConfig) error {
	_, where, err := loadOnce(c)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil // what is there cannot be used; it is about to be replaced
	}
	if where.rootsStaged {
		if err := moveFile(c.RootsFile+stagedSuffix, c.RootsFile); err != nil {
			return err
		}
	}
	if where.keyStaged {
		if err := moveFile(c.KeyFile+stagedSuffix, c.KeyFile); err != nil {
			return err
		}
	}
	for _, path := range []string{c.KeyFile + stagedSuffix, c.RootsFile + stagedSuffix} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
