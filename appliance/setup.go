package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// sources are the names under which accepted files are kept in configDir.
var sources = []string{ConfigNames[0], UserData, NetworkConfig}

// load reads the card and decides what counts: the card, or what was accepted last if the card has a mistake or nothing.
// A token goes to the data partition and from the card.
func (r *runner) load() {
	h := &r.Host
	c := readCard(h.path(cardDir))
	r.mistakes, r.notes = c.faults, c.notes
	if trouble := h.dataTrouble(); trouble != "" {
		r.notes = append(r.notes, trouble)
		r.log.Error("the data partition is not usable", "err", trouble)
	}
	r.notes = append(r.notes, h.bootNotes()...)
	for _, m := range c.faults {
		r.log.Warn("mistake in the configuration", "found", m)
	}
	switch {
	case c.config != nil:
		r.config = c.config
		r.accept(c)
	default:
		kept := readCard(h.path(configDir))
		if len(c.faults) == 0 {
			r.mistakes = append(r.mistakes, noFile)
		}
		if r.config = kept.config; r.config == nil {
			r.config = &Config{}
		} else {
			r.notes = append(r.notes, "Until that is put right, the device goes on with the configuration that it accepted last.")
		}
	}
	r.configure(r.config)
}

const noFile = "keyhaven.yaml is not on the card; put it on the partition KEYHAVEN, which any computer shows when the card is in its reader"

// bootNotes are what the initial system has to tell, a line each.
func (h *Host) bootNotes() []string {
	b, err := readSmall(h.path(runDir, "notes"))
	if err != nil {
		return nil
	}
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' })
}

// accept keeps the card's configuration on the data partition, without the token, which is kept by itself, and then takes the
// token from the card. What cannot be kept stays on the card.
func (r *runner) accept(c card) {
	h := &r.Host
	fail := func(what string, err error) {
		r.log.Error(what, "err", err)
		r.notes = append(r.notes, fmt.Sprintf("%s (%v).", what, oneLine(unwrapPath(err).Error())))
	}
	if t := c.config.Token.Reveal(); t != "" {
		if err := r.enrol.take(t); err != nil {
			fail("The join token cannot be kept on the data partition, so it stays on the card", err)
			return
		}
	}
	if err := r.keep(c); err != nil {
		fail("The configuration cannot be kept on the data partition", err)
	}
	if len(c.tokens) == 0 {
		return
	}
	if h.forgetful() {
		r.notes = append(r.notes, "The join token stays on the card, as the data partition keeps nothing.")
		return
	}
	if err := h.Writable(func(dir string) error { return scrub(dir, c.tokens) }); err != nil {
		fail("The join token could not be removed from the card; delete it there yourself", err)
	}
}

// keep writes the files of the card to the data partition, tokens overwritten.
func (r *runner) keep(c card) error {
	dir := r.Host.path(configDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var errs []error
	for _, name := range sources {
		from, ok := c.contents[name]
		if !ok {
			_, err := remove(filepath.Join(dir, name))
			errs = append(errs, err)
			continue
		}
		_, err := update(filepath.Join(dir, name), overwritten(from, c.tokens), 0o600)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// apply sets the machine up by the configuration. Each part is tried, whatever becomes of the others.
func (r *runner) apply(ctx context.Context) {
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{{"name", r.applyName}, {"time", r.applyTime}, {"network", r.applyNetwork}, {"wifi", r.applyWiFi}, {"ssh", r.applySSH}, {"connector", r.applyConnector}} {
		r.lives()
		if err := step.do(ctx); err != nil {
			r.log.Error("part of the setup failed", "op", step.name, "err", err)
			r.notes = append(r.notes, fmt.Sprintf("Setting up the %s failed: %s", step.name, oneLine(err.Error())))
		}
	}
}

func (r *runner) hostname() string { return orElse(string(r.config.Hostname), defaultHostname) }

func (r *runner) applyName(context.Context) error {
	h := &r.Host
	_, err := update(h.path("/etc/hosts"), hosts(r.config), 0o644)
	_, err2 := update(h.path("/etc/hostname"), []byte(r.hostname()+"\n"), 0o644)
	return errors.Join(err, err2, writeDevice(h.path("/proc/sys/kernel/hostname"), []byte(r.hostname())))
}

func (r *runner) applyTime(ctx context.Context) error {
	h := &r.Host
	zone := filepath.Join("../usr/share/zoneinfo", filepath.FromSlash(orElse(r.config.TimeZone, "UTC")))
	link := h.path("/etc/localtime")
	var errs []error
	if old, err := os.Readlink(link); err != nil || old != zone {
		_, err := remove(link)
		errs = append(errs, err, os.Symlink(zone, link))
	}
	file := h.path("/run/systemd/timesyncd.conf.d/keyhaven.conf")
	var changed bool
	var err error
	if len(r.config.NTP) > 0 {
		changed, err = update(file, timeServers(r.config), 0o644)
	} else {
		changed, err = remove(file)
	}
	if changed {
		errs = append(errs, r.systemctl(ctx, "--no-block", "restart", unitTime))
	}
	return errors.Join(append(errs, err)...)
}

func (r *runner) applyNetwork(ctx context.Context) error {
	dir := r.Host.path("/run/systemd/network")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	files := networkFiles(r.config)
	old, err := filepath.Glob(filepath.Join(dir, "*-keyhaven-*.network"))
	if err != nil {
		return err
	}
	changed := false
	for _, path := range old {
		if _, ok := files[filepath.Base(path)]; !ok {
			gone, err := remove(path)
			if err != nil {
				return err
			}
			changed = changed || gone
		}
	}
	for name, b := range files {
		wrote, err := update(filepath.Join(dir, name), b, 0o644)
		if err != nil {
			return err
		}
		changed = changed || wrote
	}
	if changed && r.started { // at the start it has not run yet
		_, err = r.Host.Command(ctx, "networkctl", "reload")
	}
	return err
}

func (r *runner) applyWiFi(ctx context.Context) error {
	file := r.Host.path(runDir, "wpa_supplicant.conf")
	if len(r.config.WiFi.Networks) == 0 {
		had, err := remove(file)
		if had {
			err = errors.Join(err, r.systemctl(ctx, "--no-block", "stop", unitWiFi(r.wireless())))
		}
		return err
	}
	changed, err := update(file, wpaSupplicant(r.config), 0o600)
	if err != nil || !changed {
		return err
	}
	return errors.Join(r.unblockRadio(), r.systemctl(ctx, "--no-block", "restart", unitWiFi(r.wireless())))
}

// wireless is the interface for Wi-Fi.
func (r *runner) wireless() string {
	if strings.HasPrefix(r.config.Network.Interface, "wl") {
		return r.config.Network.Interface
	}
	return "wlan0"
}

// unblockRadio undoes the switch that keeps radios silent until a country is known.
func (r *runner) unblockRadio() error {
	switches, err := filepath.Glob(r.Host.path("/sys/class/rfkill/*"))
	errs := []error{err}
	for _, s := range switches {
		if b, err := readSmall(filepath.Join(s, "type")); err != nil || strings.TrimSpace(string(b)) != "wlan" {
			continue
		}
		if b, err := readSmall(filepath.Join(s, "soft")); err == nil && strings.TrimSpace(string(b)) == "1" {
			errs = append(errs, writeDevice(filepath.Join(s, "soft"), []byte("0")))
		}
	}
	return errors.Join(errs...)
}

func (r *runner) applySSH(ctx context.Context) error {
	h := &r.Host
	file := h.path(runDir, "ssh/authorized_keys")
	if len(r.config.SSH.Keys) == 0 {
		had, err := remove(file)
		if had {
			err = errors.Join(err, r.systemctl(ctx, "--no-block", "stop", unitSSH))
		}
		return err
	}
	key := h.path(systemDir, "ssh/ssh_host_ed25519_key")
	if err := r.hostKey(ctx, key); err != nil {
		return err
	}
	changed, err := update(file, authorizedKeys(r.config), 0o644)
	if err != nil || !changed {
		return err
	}
	return r.systemctl(ctx, "--no-block", "restart", unitSSH)
}

// hostKey makes the key of the SSH server, once. A power cut leaves none or a whole one.
func (r *runner) hostKey(ctx context.Context, path string) error {
	if info, err := os.Stat(path); err == nil && info.Size() > 0 {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	fresh := path + ".new"
	for _, p := range []string{fresh, fresh + ".pub"} {
		if _, err := remove(p); err != nil {
			return err
		}
	}
	if _, err := r.Host.Command(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", fresh); err != nil {
		return err
	}
	if err := errors.Join(syncDir(fresh), os.Rename(fresh+".pub", path+".pub"), os.Rename(fresh, path)); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func (r *runner) applyConnector(ctx context.Context) error {
	b, err := connectorYAML(r.config)
	if err != nil {
		return err
	}
	if err := r.applyProxy(); err != nil {
		return err
	}
	changed, err := update(r.Host.path(runDir, "connector.yaml"), b, 0o644)
	if changed && r.started && err == nil {
		err = r.systemctl(ctx, "--no-block", "try-restart", unitConnector)
	}
	return err
}

// systemctl asks the service manager.
func (r *runner) systemctl(ctx context.Context, args ...string) error {
	_, err := r.Host.Command(ctx, "systemctl", args...)
	r.lives()
	return err
}
