package signer

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/keyless"
)

func TestLogLine(t *testing.T) {
	var log bytes.Buffer
	s := NewService(ServiceConfig{Registry: testRegistry(t, false), Policy: mustPolicy(t, everything(edgeOne)),
		Recorder: LogRecorder(slog.New(slog.NewJSONHandler(&log, nil)))})
	digest := bytes.Repeat([]byte{0xd1, 0x9e}, 16)
	_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: digest, SNI: "www.example.com", ClientIP: netip.MustParseAddr("2001:db8::1")})
	wantCode(t, err, 0)
	var line map[string]any
	if err := json.Unmarshal(log.Bytes(), &line); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"level": "INFO", "msg": "operation", "peer": edgeOne, "op": "sign", "scheme": "ecdsa_secp256r1_sha256", "key_ski": skiOf(t, "p256").String(),
		"label": "p256", "home": "memory", "sni": "www.example.com", "visitor": "2001:db8::1", "result": "ok",
	}
	for k, v := range want {
		if line[k] != v {
			t.Errorf("%s: got %v, want %v", k, line[k], v)
		}
	}
	if _, ok := line["dur"]; !ok {
		t.Error("no duration")
	}
	if strings.Contains(log.String(), hex.EncodeToString(digest)) || bytes.Contains(log.Bytes(), digest) {
		t.Error("the digest is in the log")
	}

	log.Reset()
	long := strings.Repeat("a", 60000)
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: keyless.SKI{7}, Payload: digest, SNI: long + "\n"})
	wantCode(t, err, keyless.CodeKeyNotFound)
	if l := log.String(); !strings.Contains(l, `"level":"WARN"`) || !strings.Contains(l, `"reason":"key not found"`) || !strings.Contains(l, keyless.SKI{7}.String()) || len(l) > 1024 {
		t.Errorf("got %d bytes: %.400s", len(l), l)
	}
}

func TestLogRecorderNil(t *testing.T) { LogRecorder(nil).Record(Record{Peer: edgeOne}) }

func TestMetrics(t *testing.T) {
	promReg := prometheus.NewRegistry()
	keys := testRegistry(t, false)
	s := NewService(ServiceConfig{Registry: keys, Policy: mustPolicy(t, everything(edgeOne)), Recorder: Recorders{NewMetrics(promReg, keys)}})
	for range 3 {
		_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)})
		wantCode(t, err, 0)
	}
	for _, name := range []string{"x", "y", "z"} {
		_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: name})
		wantCode(t, err, keyless.CodeBadOpcode)
	}
	families, err := promReg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	want := map[string]float64{
		"keyhaven_signer_keys": 5,
		"keyhaven_signer_operations_total sign ok ecdsa_secp256r1_sha256": 3,
		"keyhaven_signer_operations_total unknown refused ":               3,
		"keyhaven_signer_operation_seconds sign ecdsa_secp256r1_sha256":   3,
		"keyhaven_signer_key_operations_total p256 ok":                    3,
		"keyhaven_signer_key_operations_total other refused":              3,
		"keyhaven_signer_client_operations_total " + edgeOne + " ok":      3,
		"keyhaven_signer_client_operations_total " + edgeOne + " refused": 3,
		"keyhaven_signer_refusals_total opcode":                           3,
	}
	delete(got, "keyhaven_signer_home_seconds memory")
	if len(got) != len(want) {
		t.Errorf("got %d series, want %d: %v", len(got), len(want), got)
	}
	for name, n := range want {
		if got[name] != n {
			t.Errorf("%s: got %v, want %v", name, got[name], n)
		}
	}
}

func BenchmarkRecord(b *testing.B) {
	keys := testRegistry(b, false)
	r := Recorders{LogRecorder(slog.New(slog.NewTextHandler(io.Discard, nil))), NewMetrics(prometheus.NewRegistry(), keys)}
	rec := Record{Peer: edgeOne, Op: "tls-sign", Scheme: "ecdsa_secp256r1_sha256", SKI: skiOf(b, "p256"), Label: "p256", Home: "memory",
		SNI: "www.example.com", ClientIP: netip.MustParseAddr("192.0.2.1"), Result: ResultOK, Duration: 1}
	b.ReportAllocs()
	for b.Loop() {
		r.Record(rec)
	}
}
