package appliance

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf16"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

const goodFile = "hostname: petcam\nwifi: {country: DE, ssid: Home, password: canary99}\npublish: [{hostname: a.example.com, service: \"http://b:1\"}]\n"

// says runs an agent until its status has all texts.
func (m *machine) says(t *testing.T, a *Agent, texts ...string) Status {
	t.Helper()
	m.run(t, a, func() bool {
		return !slices.ContainsFunc(texts, func(s string) bool { return !strings.Contains(m.status(), s) })
	})
	var st Status
	if err := json.Unmarshal([]byte(m.status()), &st); err != nil {
		t.Fatal(err)
	}
	return st
}

// A card with a mistake is told, and what was accepted before goes on.
func TestMistakeGoesOn(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml": goodFile})
	m.says(t, m.agent(nil), string(StateNoToken))
	m.write(t, cardDir+"/keyhaven.yaml", "hostname: other\nwifi: {country: UK, ssid: Home, password: canary99}\n")
	st := m.says(t, m.agent(nil), string(StateMistake))
	if st.Hostname != "petcam" || len(st.Mistakes) != 1 || !strings.Contains(st.Mistakes[0], "keyhaven.yaml:2: wifi.country") {
		t.Errorf("%+v", st)
	}
	if got := m.read(t, runDir+"/connector.yaml"); !strings.Contains(got, "a.example.com") {
		t.Errorf("the configuration that was accepted is not in force:\n%s", got)
	}
	text := m.read(t, cardDir+"/keyhaven-status.txt")
	for _, want := range []string{"THERE IS A MISTAKE", "did you mean GB?", "accepted last", "\r\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the card's status has no %q:\n%s", want, text)
		}
	}
	if strings.Contains(text+m.log.String()+m.read(t, "/dev/tty1"), "canary") {
		t.Error("a password is told")
	}
	m.connect(t, true)
	if err := writeFile(m.path(identityDir, "key.pem"), []byte("k"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(m.path(identityDir, "cert.pem"), []byte("c"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.says(t, m.agent(nil), string(StateMistake), "connected all the same")
}

func TestFirstMistake(t *testing.T) {
	t.Parallel()
	for name, files := range map[string]map[string]string{
		"broken":     {"keyhaven.yaml": "wifi:\n\tssid: a\n"},
		"none":       {},
		"both":       {"keyhaven.yaml": "hostname: a", "user-data": "hostname: a_b"},
		"other name": {"KEYHAVEN.YAML.txt": "hostnam: a"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, files)
			m.says(t, m.agent(nil), string(StateMistake))
			if got := m.read(t, "/run/systemd/network/20-keyhaven-wired.network"); !strings.Contains(got, "DHCP=yes") {
				t.Errorf("without a configuration the cable gets\n%s", got)
			}
		})
	}
}

// What the Raspberry Pi Imager wrote complements the file, and two files are told.
func TestSeveralFiles(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml.txt": "hostname: second", "keyhaven.yaml": "timezone: UTC", "user-data": imagerUserData, "network-config": imagerNetwork})
	st := m.says(t, m.agent(nil), string(StateNoToken), "kitchen")
	if len(st.Notes) != 1 || !strings.Contains(st.Notes[0], "keyhaven.yaml, keyhaven.yaml.txt") || !st.SSH {
		t.Errorf("%+v", st)
	}
	for _, f := range []string{"keyhaven.yaml", "user-data", "network-config"} {
		if !m.exists(configDir + "/" + f) {
			t.Errorf("%s was not kept", f)
		}
	}
}

func TestCardReadOnly(t *testing.T) {
	t.Parallel()
	token := testToken(t).Reveal()
	m := newMachine(t, map[string]string{"keyhaven.yaml": "token: " + token + "\n"})
	m.readOnly = syscall.EROFS
	m.connect(t, true)
	st := m.says(t, m.agent(joinsAt), string(StateHealthy), "read-only file system")
	if !slices.ContainsFunc(st.Notes, func(s string) bool { return strings.Contains(s, "could not be removed from the card; delete it") }) {
		t.Errorf("%q", st.Notes)
	}
	// The next start finds the token again, which was used up, and takes it off when it can.
	m.readOnly = nil
	m.says(t, m.agent(func(context.Context, mtls.JoinToken, string, string, string, *tunnel.ProxyConfig) error {
		return errors.New("joined twice")
	}), string(StateHealthy))
	if got := m.read(t, cardDir+"/keyhaven.yaml"); strings.Contains(got, "khj1_") {
		t.Errorf("the card holds %s", got)
	}
}

func TestCardPulled(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	if err := os.Remove(m.path(cardDir)); err != nil {
		t.Fatal(err)
	}
	m.readOnly = syscall.EIO
	m.says(t, m.agent(nil), string(StateMistake), "the card cannot be read")
}

func TestDataUnusable(t *testing.T) {
	t.Parallel()
	token := testToken(t).Reveal()
	m := newMachine(t, map[string]string{"keyhaven.yaml": "hostname: petcam\ntoken: " + token + "\n"})
	if err := os.RemoveAll(m.path(dataDir)); err != nil {
		t.Fatal(err)
	}
	m.write(t, dataDir, "not a directory")
	st := m.says(t, m.agent(joinsAt), "The data partition of the card cannot be written")
	if st.Hostname != "petcam" || !strings.Contains(m.read(t, cardDir+"/keyhaven.yaml"), token) {
		t.Errorf("%+v; the token must stay where it is", st)
	}
}

// Memory stands in for a data partition that cannot be used: the token must not go there.
func TestDataInMemory(t *testing.T) {
	t.Parallel()
	token := testToken(t).Reveal()
	m := newMachine(t, map[string]string{"keyhaven.yaml": "token: " + token + "\n"})
	m.write(t, "/proc/mounts", "data /data tmpfs rw 0 0\n")
	m.write(t, runDir+"/notes", "The data partition cannot be used.\n")
	m.connect(t, true)
	m.says(t, m.agent(joinsAt), string(StateHealthy), "cannot be used", "stays on the card")
	if !strings.Contains(m.read(t, cardDir+"/keyhaven.yaml"), token) {
		t.Error("the token is gone from the card")
	}
}

func TestNoNetwork(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml": goodFile})
	m.addresses = nil
	a := m.agent(nil)
	command := a.Host.Command
	for _, tt := range []struct{ flags, want string }{{"[TEMP-DISABLED]", "password is most likely wrong"}, {"[CURRENT]", "no address came"}, {"", "was not found"}} {
		a.Host.Command = func(ctx context.Context, name string, args ...string) ([]byte, error) {
			if name == "wpa_cli" {
				return []byte("0\tHome\tany\t" + tt.flags + "\n"), nil
			}
			return command(ctx, name, args...)
		}
		r := newRunner(a)
		r.boot(t.Context())
		if st := r.status(); st.State != StateStarting {
			t.Errorf("at once it says %s", st.State)
		}
		r.begin = r.begin.Add(-time.Minute)
		r.lookAtWiFi(t.Context())
		if st := r.status(); st.State != StateNoNetwork || !strings.Contains(st.Text, tt.want) || st.Todo == "" {
			t.Errorf("%s: %+v, want %q", tt.flags, st, tt.want)
		}
	}
}

func TestNoEdge(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml": "hostname: a"})
	for _, f := range []string{"key.pem", "cert.pem"} {
		if err := writeFile(m.path(identityDir, f), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.connect(t, false)
	m.says(t, m.agent(nil), "The connector is starting", "spiffe://")
	r := newRunner(m.agent(nil))
	r.boot(t.Context())
	r.begin = r.begin.Add(-connectWithin)
	r.tick(t.Context())
	st := r.status()
	if st.State != StateNoEdge || st.Text != "Edge edge.example.com: no answer" || st.Todo != "look at the edge" || st.Identity == "" {
		t.Errorf("%+v", st)
	}
	if !m.ran("start keyhaven-connector.service") {
		t.Error("the connector was not started")
	}
}

// A clock in 1970 is set to when the image was built, or when the machine ran last.
func TestClock(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml": "hostname: a"})
	m.clock = -time.Since(time.Unix(60, 0))
	h := m.host()
	if moved, err := h.advanceClock(); !moved || err != nil || h.Now().Year() != 2026 {
		t.Errorf("%v, %v: %s", moved, err, h.Now())
	}
	m.clock = 0
	if err := h.saveClock(); err != nil {
		t.Fatal(err)
	}
	m.clock = -24 * time.Hour
	if moved, err := h.advanceClock(); !moved || err != nil || time.Since(h.Now()) > time.Minute {
		t.Errorf("%v, %v: %s", moved, err, h.Now())
	}
	if moved, err := h.advanceClock(); moved || err != nil {
		t.Errorf("a clock that is right was moved: %v", err)
	}
}

func TestRandomSeed(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	h := m.host()
	var seeds []string
	for range 3 {
		if err := h.stirRandomness(); err != nil {
			t.Fatal(err)
		}
		if len(seeds) > 0 && !strings.Contains(m.read(t, "/dev/urandom"), seeds[len(seeds)-1]) {
			t.Error("the kernel did not get what was kept")
		}
		seeds = append(seeds, m.read(t, systemDir+"/random-seed"))
	}
	if seeds[0] == seeds[1] || len(seeds[0]) != seedSize {
		t.Errorf("seeds of %d bytes are alike", len(seeds[0]))
	}
}

// The card is read again when the service manager says so.
func TestReload(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml": goodFile})
	reload := make(chan os.Signal, 1)
	a := m.agent(nil)
	a.Reload = reload
	m.says(t, a, string(StateNoToken))
	m.write(t, cardDir+"/keyhaven.yaml", "hostname: shed\nntp: [pool.ntp.org]\nnetwork: {dns: [9.9.9.9]}\nssh: {keys: [\""+goodKey+"\"]}\n")
	reload <- syscall.SIGHUP
	m.says(t, a, `"hostname": "shed"`, `"ssh": true`)
	for _, want := range []string{"networkctl reload", "stop keyhaven-wifi@wlan0.service", "restart ssh.service", "restart systemd-timesyncd.service", "try-restart keyhaven-connector.service"} {
		if !m.ran(want) {
			t.Errorf("%s was not done: %v", want, m.commands)
		}
	}
	if m.exists(runDir + "/wpa_supplicant.conf") {
		t.Error("the password stays after Wi-Fi was taken out")
	}
	if info, err := os.Stat(m.path(configDir, "keyhaven.yaml")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the accepted copy: %v, %v", info.Mode(), err)
	}
}

// The card is spared: the file is written when it says something else, and not too often.
func TestCardIsSpared(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	r := newRunner(m.agent(nil))
	st := Status{State: StateStarting, Hostname: "a", Version: "1"}
	r.tellCard(st)
	if m.writable != 0 {
		t.Error("it was written before there was something to say")
	}
	st.State = StateNoToken
	r.tellCard(st)
	st.State = StateHealthy
	r.tellCard(st)
	if m.writable != 1 || !strings.Contains(m.read(t, cardDir+"/keyhaven-status.txt"), "WAITING FOR A JOIN TOKEN") {
		t.Errorf("written %d times, want once", m.writable)
	}
	r.shown.cardAt = r.shown.cardAt.Add(-cardSoon)
	r.tellCard(st)
	if m.writable != 2 || !strings.Contains(m.read(t, cardDir+"/keyhaven-status.txt"), "CONNECTED") {
		t.Errorf("another state: written %d times, want twice", m.writable)
	}
	for i := range 20 { // a device that cannot make up its mind
		st.State = []State{StateNoEdge, StateHealthy}[i%2]
		r.shown.cardAt = r.shown.cardAt.Add(-cardSoon)
		r.tellCard(st)
	}
	if m.writable != 1+cardQuick {
		t.Errorf("written %d times, want %d", m.writable, 1+cardQuick)
	}
	m.writable = 2
	st.Camera, st.Update = "camera works: 640x480, 5 pictures a second, 3 visitors", "version 1, gets 2 (40 %)"
	r.shown.cardAt = r.shown.cardAt.Add(-cardEvery)
	r.tellCard(st)
	st.Camera, st.Update = "camera works: 640x480, 6 pictures a second, 4 visitors", "version 1, gets 2 (50 %)"
	r.shown.cardAt = r.shown.cardAt.Add(-cardEvery)
	r.tellCard(st)
	if m.writable != 3 {
		t.Errorf("written %d times, want 3: what changes all the time does not count", m.writable)
	}
	r = newRunner(m.agent(nil)) // the next start
	r.tellCard(st)
	if m.writable != 3 {
		t.Error("a start writes what is there")
	}
	if names, _ := filepath.Glob(m.path(cardDir, "*.TMP")); len(names) > 0 {
		t.Errorf("left behind: %v", names)
	}
}

// A fakeUpdater is an updater in a state.
type fakeUpdater struct{ report fleet.Report }

func (u *fakeUpdater) Run(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
func (u *fakeUpdater) Report() fleet.Report          { return u.report }
func (u *fakeUpdater) Text() string                  { return "version " + u.report.Version }

func TestUpdates(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml": "timezone: UTC\nupdate: {source: \"https://u.example.com\", automatic: false}\n"})
	for _, f := range []string{"key.pem", "cert.pem"} {
		if err := writeFile(m.path(identityDir, f), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.connect(t, true)
	a := m.agent(nil)
	hooks := make(chan UpdateHooks, 8)
	a.Updates = func(h UpdateHooks) (Updater, error) {
		hooks <- h
		return &fakeUpdater{fleet.Report{Product: "keyhaven-appliance", Version: "1.2.3", State: fleet.Writing}}, nil
	}
	m.says(t, a, string(StateUpdating), "version 1.2.3")
	h := <-hooks
	if h.Settings.Source != "https://u.example.com" || *h.Settings.Automatic || h.Location != time.UTC {
		t.Errorf("%+v", h)
	}
	if !h.Healthy() {
		t.Error("the tunnel is up, and the updater is not told")
	}
	a.Updates = func(UpdateHooks) (Updater, error) { return nil, errors.New("no keys") }
	m.says(t, a, "not possible: no keys", string(StateHealthy))
}

func TestCamera(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml": "camera: {hostname: cam.example.com, test: true}\n"})
	if err := os.MkdirAll(m.path("/sys/class/video4linux/video3"), 0o755); err != nil {
		t.Fatal(err)
	}
	a := m.agent(nil)
	r := newRunner(a)
	r.boot(t.Context())
	r.lookAtCamera(t.Context())
	if !m.ran("modprobe vivid") || !m.ran("restart keyhaven-camera.service") {
		t.Errorf("%v", m.commands)
	}
	m.write(t, "/sys/class/video4linux/video3/name", "vivid-000-vid-cap\n")
	r.lookAtCamera(t.Context())
	if got := m.read(t, runDir+"/streamer.env"); !strings.Contains(got, "--device=/dev/video3 ") {
		t.Errorf("the streamer gets %s", got)
	}
	m.write(t, cardDir+"/keyhaven.yaml", "hostname: a\n")
	r.reload(t.Context())
	r.lookAtCamera(t.Context())
	if m.exists(runDir+"/streamer.env") || !m.ran("stop keyhaven-camera.service") {
		t.Error("the camera stays after it was taken out")
	}
}

// The service manager is told when the configuration is rendered.
func TestReady(t *testing.T) {
	m := newMachine(t, map[string]string{"keyhaven.yaml": "hostname: a"})
	path := filepath.Join(m.root, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "60000000")
	said := make(chan string, 16)
	go func() {
		defer close(said)
		for b := make([]byte, 4096); ; {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			said <- string(b[:n])
		}
	}()
	var all []string
	m.run(t, m.agent(nil), func() bool {
		select {
		case s := <-said:
			all = append(all, s)
			if strings.Contains(s, "READY=1") && !m.exists("/run/systemd/network/20-keyhaven-wired.network") {
				t.Error("ready before the network's files are there")
			}
		default:
		}
		text := strings.Join(all, "\n")
		return strings.Contains(text, "READY=1") && strings.Contains(text, "WATCHDOG=1")
	})
	conn.Close()
	for range said {
	}
}

// Every state has a pattern of its own, but for the two in which one waits.
func TestPatterns(t *testing.T) {
	t.Parallel()
	same := map[State]State{StateJoining: StateStarting, StateNoToken: StateRefused}
	seen := map[string]State{}
	for state := range headline {
		p := patterns[state]
		if len(p) == 0 || len(p)%2 != 0 {
			t.Errorf("%s has a pattern of %d times", state, len(p))
		}
		if s, ok := same[state]; ok {
			if !slices.Equal(p, patterns[s]) {
				t.Errorf("%s is not shown as %s", state, s)
			}
			continue
		}
		key := fmt.Sprint(p)
		if other, dup := seen[key]; dup {
			t.Errorf("%s and %s look alike", state, other)
		}
		seen[key] = state
	}
}

func TestLED(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	h := m.host()
	l := findLED(&h)
	if got := m.read(t, "/sys/class/leds/ACT/trigger"); !strings.HasPrefix(got, "none") {
		t.Errorf("the trigger is %q", got)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); l.run(ctx) }()
	l.show(StateNoNetwork)
	l.show(StateUpdating) // in place of what was not shown yet
	changes, last := 0, ""
	for until := time.Now().Add(time.Minute); changes < 6 && time.Now().Before(until); time.Sleep(time.Millisecond) {
		if b, _ := os.ReadFile(l.file); len(b) > 0 && string(b) != last {
			last = string(b)
			changes++
		}
	}
	stop()
	<-done
	if changes < 6 {
		t.Errorf("the LED changed %d times", changes)
	}
	if got := m.read(t, "/sys/class/leds/ACT/brightness"); got != "0" {
		t.Errorf("after the end it is %q", got)
	}
}

// Nothing in a status can act upon a terminal, and the screen's size is kept.
func TestScreen(t *testing.T) {
	t.Parallel()
	st := Status{State: StateMistake, Hostname: "a\x1b[2Jb", Text: strings.Repeat("long words ", 40)}
	for range 60 {
		st.Mistakes = append(st.Mistakes, "keyhaven.yaml:1: a\x9b31m mistake")
	}
	b := string(st.screen())
	if strings.Contains(b, "a\x1b") || strings.Contains(b, "\x9b") {
		t.Error("a control character reaches the screen")
	}
	if n := strings.Count(b, "\r\n"); n > 30 {
		t.Errorf("%d rows", n)
	}
	for _, l := range strings.Split(string(st.file(time.Now())), "\r\n") {
		if len([]rune(l)) > 104 {
			t.Errorf("a line of %d letters", len([]rune(l)))
		}
	}
}

// However an editor wrote the token, it is gone from the card, or else the person is told.
func TestTokenInOtherForms(t *testing.T) {
	t.Parallel()
	token := testToken(t).Reveal()
	wide := func(order binary.AppendByteOrder) string {
		var b []byte
		for _, u := range utf16.Encode([]rune("\ufefftoken: " + token)) { // no line feed at the end
			b = order.AppendUint16(b, u)
		}
		return string(b)
	}
	for name, c := range map[string]struct{ file, note string }{
		"UTF-16, little-endian": {wide(binary.LittleEndian), ""},
		"UTF-16, big-endian":    {wide(binary.BigEndian), ""},
		"twice":                 {"token: " + token + " # " + token + "\n", ""},
		"over two lines":        {"token: \"" + token[:20] + "\\\n  " + token[20:] + "\"\n", "delete it there yourself (it is not written in one piece)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, map[string]string{"keyhaven.yaml": c.file})
			m.connect(t, true)
			st := m.says(t, m.agent(joinsAt), string(StateHealthy), c.note)
			plain := strings.ReplaceAll(m.read(t, cardDir+"/keyhaven.yaml"), "\x00", "")
			if c.note == "" && (strings.Contains(plain, token[:10]) || len(st.Notes) > 0) {
				t.Errorf("the card holds %q; %q", plain, st.Notes)
			}
		})
	}
}

// Programs that take as long as they may do not make the agent look dead, which would have it restarted, during a trial too.
func TestSlowProgramsAreNotDeath(t *testing.T) {
	m := newMachine(t, map[string]string{"keyhaven.yaml": goodFile + "ntp: [a.example.com]\nssh: {keys: [\"" + goodKey + "\"]}\n"})
	synctest.Test(t, func(t *testing.T) {
		a := m.agent(nil)
		command, calls := a.Host.Command, 0
		var r *runner
		a.Host.Command = func(ctx context.Context, name string, args ...string) ([]byte, error) {
			calls++
			time.Sleep(commandTimeout + time.Second) // it is killed then
			if err := r.alive(ctx); err != nil {
				t.Errorf("during %s %q: %v", name, args, err)
			}
			out, _ := command(ctx, name, args...)
			return out, context.DeadlineExceeded
		}
		r = newRunner(a)
		r.started = true
		r.reload(t.Context())
		if calls < 4 {
			t.Errorf("%d programs ran", calls)
		}
	})
}
