package admin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
)

func document(t *testing.T) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(description)
	must(t, err)
	must(t, doc.Validate(t.Context()))
	return doc
}

// Each registered path, method and query parameter is described, and the other way round.
func TestDescriptionHasWhatIsServed(t *testing.T) {
	doc := document(t)
	served := map[string][]string{"GET " + descriptionPath: nil}
	for _, e := range endpoints(api{}) {
		for m, how := range e.methods {
			served[m+" "+e.path] = how.query
		}
	}
	described := map[string]bool{}
	for path, item := range doc.Paths.Map() {
		for m, op := range item.Operations() {
			name := m + " " + path
			described[name] = true
			want, ok := served[name]
			if !ok {
				t.Errorf("%s is described and not served", name)
				continue
			}
			var got, segments []string
			for _, p := range append(slices.Clone(item.Parameters), op.Parameters...) {
				switch p.Value.In {
				case "query":
					got = append(got, p.Value.Name)
				case "path":
					segments = append(segments, "{"+p.Value.Name+"}")
				}
			}
			if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
				t.Errorf("%s: query parameters %v are described, %v are taken", name, got, want)
			}
			for _, s := range segments {
				if !strings.Contains(path, "/"+s) {
					t.Errorf("%s has no %s", name, s)
				}
			}
			for _, status := range []string{"200", "403"} {
				if op.Responses.Value(status) == nil {
					t.Errorf("%s: status %s is not described", name, status)
				}
			}
		}
	}
	for name := range served {
		if !described[name] {
			t.Errorf("%s is served and not described", name)
		}
	}
}

// schemas are the Go types behind the schemas. Those of tunnel configurations and probes stand in their own files.
var schemas = map[string]reflect.Type{
	"Error": reflect.TypeFor[errorBody](), "ErrorDetail": reflect.TypeFor[Error](), "Nothing": reflect.TypeFor[nothing](),
	"VNet": reflect.TypeFor[control.VNetView](), "VNetDetail": reflect.TypeFor[control.VNetDetail](), "VNetNew": reflect.TypeFor[vnetRequest](), "VNetChange": reflect.TypeFor[control.VNetChange](),
	"Tunnel": reflect.TypeFor[control.TunnelView](), "TunnelDetail": reflect.TypeFor[control.TunnelDetail](), "TunnelNew": reflect.TypeFor[tunnelRequest](), "TunnelChange": reflect.TypeFor[control.TunnelChange](),
	"Connector": reflect.TypeFor[control.ConnectorView](), "Session": reflect.TypeFor[control.SessionView](),
	"Route": reflect.TypeFor[control.RouteView](), "RouteNew": reflect.TypeFor[control.RouteSpec](), "RouteAnswer": reflect.TypeFor[control.RouteAnswer](),
	"TokenNew": reflect.TypeFor[tokenRequest](), "JoinGrant": reflect.TypeFor[control.JoinGrant](), "Token": reflect.TypeFor[control.TokenView](),
	"EchoRequest": reflect.TypeFor[EchoRequest](), "Echo": reflect.TypeFor[Echo](),
	"CleanupRequest": reflect.TypeFor[cleanupRequest](), "Cleaned": reflect.TypeFor[control.Cleaned](),
	"PoolConfig": reflect.TypeFor[spec.PoolConfig](), "Endpoint": reflect.TypeFor[spec.Endpoint](), "Monitor": reflect.TypeFor[spec.Monitor](), "Affinity": reflect.TypeFor[spec.Affinity](),
	"Pool": reflect.TypeFor[control.Pool](), "EndpointChange": reflect.TypeFor[control.EndpointChange](),
	"PoolHealth": reflect.TypeFor[balance.PoolHealth](), "EndpointHealth": reflect.TypeFor[balance.EndpointHealth](),
	"PortConfig": reflect.TypeFor[spec.PortConfig](), "Port": reflect.TypeFor[control.Port](),
	"ZoneConfig": reflect.TypeFor[zone.Config](), "Origin": reflect.TypeFor[zone.Origin](), "OriginTLS": reflect.TypeFor[zone.OriginTLS](), "Zone": reflect.TypeFor[control.Zone](),
	"TunnelConfig": reflect.TypeFor[control.TunnelConfigView](), "TunnelConfigNew": reflect.TypeFor[tunnelConfigRequest](), "ConnectorConfig": reflect.TypeFor[control.ConnectorConfig](),
	"Elsewhere": reflect.TypeFor[control.ElsewhereView](), "FlowList": reflect.TypeFor[FlowList](), "Flow": reflect.TypeFor[control.FlowView](), "Edge": reflect.TypeFor[control.EdgeView](),
	"Device": reflect.TypeFor[control.DeviceView](), "DeviceReport": reflect.TypeFor[fleet.Report](), "FailedUpdate": reflect.TypeFor[control.FailedUpdate](), "Directive": reflect.TypeFor[fleet.Directive](),
	"RolloutNew": reflect.TypeFor[control.RolloutSpec](), "RolloutChange": reflect.TypeFor[control.RolloutChange](), "RolloutConfig": reflect.TypeFor[control.RolloutConfig](), "RolloutEvent": reflect.TypeFor[control.RolloutEvent](),
	"Rollout": reflect.TypeFor[control.RolloutView](), "RolloutProgress": reflect.TypeFor[control.RolloutProgress](),
	"Fault": reflect.TypeFor[Fault](), "Status": reflect.TypeFor[Status](),
}

// Each schema has the members of its Go type, no more and no fewer, requires those that are always there, and takes no
// unknown ones.
func TestSchemasAreTheTypes(t *testing.T) {
	doc := document(t)
	for name, ref := range doc.Components.Schemas {
		typ, ok := schemas[name]
		if !ok {
			t.Errorf("schema %s: its Go type is not known to this test", name)
			continue
		}
		s := ref.Value
		if s.AdditionalProperties.Has == nil || *s.AdditionalProperties.Has {
			t.Errorf("schema %s takes unknown members", name)
		}
		members := map[string]bool{} // whether always there
		addMembers(members, typ)
		for m := range s.Properties {
			if _, ok := members[m]; !ok {
				t.Errorf("schema %s: %s has no member %q", name, typ, m)
			}
		}
		for m, always := range members {
			if s.Properties[m] == nil {
				t.Errorf("schema %s lacks the member %q of %s", name, m, typ)
			}
			if required := slices.Contains(s.Required, m); required != always {
				t.Errorf("schema %s: %q is required: %v, but always there: %v", name, m, required, always)
			}
		}
	}
	for name := range schemas {
		if doc.Components.Schemas[name] == nil {
			t.Errorf("there is no schema %s", name)
		}
	}
}

func addMembers(to map[string]bool, t reflect.Type) {
	for f := range t.Fields() {
		name, opts, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-":
		case name == "" && f.Anonymous:
			addMembers(to, f.Type)
		default:
			to[name] = !strings.Contains(opts, "omit")
		}
	}
}

// Every code that the sources name is described.
func TestCodesAreDescribed(t *testing.T) {
	var described []string
	for _, v := range document(t).Components.Schemas["ErrorDetail"].Value.Properties["code"].Value.Enum {
		described = append(described, fmt.Sprint(v))
	}
	found := 0
	for _, file := range []string{"../control/errors.go", "api.go"} {
		b, err := os.ReadFile(file)
		must(t, err)
		for line := range strings.Lines(string(b)) {
			name, rest, ok := strings.Cut(strings.TrimSpace(line), " ")
			if !ok || !strings.HasPrefix(name, "Code") || !strings.Contains(rest, `= "`) {
				continue
			}
			found++
			code := strings.Split(rest, `"`)[1]
			if !slices.Contains(described, code) {
				t.Errorf("the code %q (%s) is not described", code, name)
			}
		}
	}
	if found != len(described) {
		t.Errorf("%d codes in the sources, %d described: %v", found, len(described), described)
	}
}

// A witness is a transport that holds each reply, and each request that was not refused as malformed, against the
// description.
type witness struct {
	t      testing.TB
	router routers.Router
	next   http.RoundTripper
	seen   map[string]bool // "GET /v1/vnets 200"
}

func newWitness(t testing.TB, next http.RoundTripper) *witness {
	doc, err := openapi3.NewLoader().LoadFromData(description)
	if err != nil {
		t.Fatal(err)
	}
	doc.Servers = nil
	r, err := gorillamux.NewRouter(doc)
	if err != nil {
		t.Fatal(err)
	}
	return &witness{t, r, next, map[string]bool{}}
}

func (w *witness) RoundTrip(req *http.Request) (*http.Response, error) {
	var sent []byte
	if req.Body != nil {
		sent, _ = io.ReadAll(req.Body)
		req.Body = io.NopCloser(bytes.NewReader(sent))
	}
	resp, err := w.next.RoundTrip(req)
	if err != nil {
		return resp, err
	}
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(got))
	w.check(req, sent, resp, got)
	return resp, nil
}

func (w *witness) check(req *http.Request, sent []byte, resp *http.Response, got []byte) {
	again := req.Clone(context.Background())
	again.Body = io.NopCloser(bytes.NewReader(sent))
	route, params, err := w.router.FindRoute(again)
	if err != nil {
		if resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusMethodNotAllowed {
			w.t.Errorf("%s %s: status %d for what is not described", req.Method, req.URL, resp.StatusCode)
		}
		return
	}
	name := fmt.Sprintf("%s %s %d", req.Method, route.Path, resp.StatusCode)
	w.seen[name] = true
	in := &openapi3filter.RequestValidationInput{Request: again, PathParams: params, Route: route,
		Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true}}
	if resp.StatusCode == http.StatusOK {
		if err := openapi3filter.ValidateRequest(context.Background(), in); err != nil {
			w.t.Errorf("%s: the edge takes a request that the description refuses: %v", name, err)
		}
	}
	out := &openapi3filter.ResponseValidationInput{RequestValidationInput: in, Status: resp.StatusCode, Header: resp.Header,
		Body: io.NopCloser(bytes.NewReader(got)), Options: in.Options}
	if err := openapi3filter.ValidateResponse(context.Background(), out); err != nil {
		w.t.Errorf("%s: the reply is not as described: %v\n%s", name, err, got)
	}
}

// watched is a client all of whose requests are held against the description.
func watched(t *testing.T, path string) (*Client, *witness) {
	c := dial(t, path)
	w := newWitness(t, c.http.Transport)
	c.http.Transport = w
	return c, w
}

// The witness is able to fail.
func TestWitnessObjects(t *testing.T) {
	fake := &recordingTB{TB: t}
	w := newWitness(fake, roundTripper(func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(`[{"id":"x","surplus":1}]`))}, nil
	}))
	req, err := http.NewRequest(http.MethodGet, "http://"+hostName+"/v1/vnets", nil)
	must(t, err)
	if _, err := w.RoundTrip(req); err != nil || fake.errors != 1 {
		t.Errorf("%d objections, %v, want one", fake.errors, err)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

type recordingTB struct {
	testing.TB
	errors int
}

func (r *recordingTB) Errorf(string, ...any) { r.errors++ }

func TestDescriptionIsServed(t *testing.T) {
	c := dial(t, serve(t))
	req, err := c.request(t.Context(), request{method: get, path: descriptionPath})
	must(t, err)
	resp, err := c.http.Do(req)
	must(t, err)
	b, err := io.ReadAll(resp.Body)
	must(t, errors.Join(err, resp.Body.Close()))
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/yaml" || !bytes.Equal(b, description) {
		t.Errorf("status %d, %d bytes of %s", resp.StatusCode, len(b), resp.Header.Get("Content-Type"))
	}
}
