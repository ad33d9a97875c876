package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/internal/cli"
)

// upcoming is the version that commits before the first tag lead to.
const upcoming = "0.5.0"

// semver is the part of Semantic Versioning 2.0.0 that deb and rpm can write as well: no hyphen but the first, since both
// split a version from a revision there.
var semver = regexp.MustCompile(`^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(-[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)*)?(\+[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)*)?$`)

func checkVersion(v string) error {
	if !semver.MatchString(v) {
		return cli.UsageError("version %q: want MAJOR.MINOR.PATCH[-PRERELEASE][+BUILD] as semver.org has it, without further hyphens", v)
	}
	return nil
}

// render writes a version for one kind of package. A tilde sorts before everything in deb and rpm, as a hyphen does in
// semver.
func render(v, format string) (string, error) {
	if err := checkVersion(v); err != nil {
		return "", err
	}
	switch format {
	case "semver":
		return v, nil
	case "deb", "rpm":
		return strings.Replace(v, "-", "~", 1), nil
	}
	return "", cli.UsageError("--format %q: use semver, deb or rpm", format)
}

// gitVersion names the commit that is checked out at dir. A tag vX.Y.Z is that version. Commits after one are development
// versions of the next patch, or further ones of the same pre-release; without a tag, of upcoming. The number of commits
// orders them, the hash names them.
func gitVersion(ctx context.Context, dir string) (string, error) {
	if shallow, err := git(ctx, dir, "rev-parse", "--is-shallow-repository"); err != nil {
		return "", err
	} else if shallow == "true" {
		return "", errors.New("the history is cut short, so that commits cannot be counted: git fetch --unshallow --tags, or set VERSION")
	}
	hash, err := git(ctx, dir, "rev-parse", "--short=12", "HEAD")
	if err != nil {
		return "", err
	}
	changed, err := git(ctx, dir, "status", "--porcelain", "--untracked-files=no")
	if err != nil {
		return "", err
	}
	build := "+g" + hash
	if changed != "" {
		build += ".dirty"
	}
	tag, err := git(ctx, dir, "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*")
	if err != nil { // no tag
		count, err := git(ctx, dir, "rev-list", "--count", "HEAD")
		return upcoming + "-dev." + count + build, err
	}
	base := strings.TrimPrefix(tag, "v")
	if err := checkVersion(base); err != nil || strings.Contains(base, "+") {
		return "", fmt.Errorf("tag %s is no version: want vMAJOR.MINOR.PATCH[-PRERELEASE]", tag)
	}
	count, err := git(ctx, dir, "rev-list", "--count", tag+"..HEAD")
	switch {
	case err != nil:
		return "", err
	case count == "0" && changed == "":
		return base, nil
	case strings.Contains(base, "-"):
		return base + ".dev." + count + build, nil
	}
	core := semver.FindStringSubmatch(base)
	patch, err := strconv.ParseUint(core[3], 10, 64)
	if err != nil {
		return "", fmt.Errorf("tag %s: %w", tag, err)
	}
	return fmt.Sprintf("%s.%s.%d-dev.%s%s", core[1], core[2], patch+1, count, build), nil
}

func gitEpoch(ctx context.Context, dir string) (time.Time, error) {
	out, err := git(ctx, dir, "log", "-1", "--format=%ct")
	if err != nil {
		return time.Time{}, err
	}
	n, err := strconv.ParseInt(out, 10, 64)
	return time.Unix(n, 0).UTC(), err
}

// git runs git without writing to the repository, and returns what it prints.
func git(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", append([]string{"-C", dir}, args...)...)
	cmd.Env = append(os.Environ(), "GIT_OPTIONAL_LOCKS=0", "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		return "", fmt.Errorf("git %s: %w (outside a git tree set VERSION and SOURCE_DATE_EPOCH)", args[0], err)
	}
	return strings.TrimSpace(string(out)), nil
}
