// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// ways are the pitfalls that are about a way of reaching the proxy rather than about
// an attack: see lab/cmd/conformance.
var ways = []string{honestID, "2", "14", "16", "17", "20b", "36"}

func TestPitfalls_EachHasAttackOrTest(t *testing.T) {
	const root = "../.." // of the project
	attacked := make(map[string]bool)
	for _, a := range attacks() {
		attacked[a.pitfall] = true
		if !slices.ContainsFunc(pitfalls, func(p pitfall) bool { return p.id == a.pitfall }) {
			t.Errorf("an attack names the unknown pitfall %q", a.pitfall)
		}
	}
	for _, p := range pitfalls {
		if !attacked[p.id] && len(p.tests) == 0 && !slices.Contains(ways, p.id) {
			t.Errorf("pitfall %s (%s) has neither an attack nor a test", p.id, p.title)
		}
		for _, test := range p.tests {
			folder, name, _ := strings.Cut(test, ":")
			if !declares(t, filepath.Join(root, folder), name) {
				t.Errorf("pitfall %s names %s, which does not exist", p.id, test)
			}
		}
	}
}

// declares reports whether a test of that name is in folder.
func declares(t *testing.T, folder, test string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	declaration := regexp.MustCompile(`(?m)^func ` + test + `\(`)
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if declaration.Match(source) {
			return true
		}
	}
	return false
}

// proxyOf returns net/http/httputil's proxy with the given director, in front of a
// recorder.
func proxyOf(t *testing.T, director func(*httputil.ProxyRequest)) Proxy {
	t.Helper()
	seen := new(Recorder)
	upstream := httptest.NewServer(seen)
	t.Cleanup(func() { upstream.CloseClientConnections(); upstream.Close() })
	target, err := url.Parse(upstream.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		director(r)
	}})
	t.Cleanup(func() { proxy.CloseClientConnections(); proxy.Close() })
	address := strings.TrimPrefix(proxy.URL, "http://")
	return Proxy{
		Name: t.Name(), Address: address, Host: address, Seen: seen,
		Dial: new(net.Dialer).DialContext,
		Want: Identity{User: "bob@example.com", Groups: []string{"tailnet-readers"}},
	}
}

func asBob(r *httputil.ProxyRequest) {
	r.Out.Header.Set("Impersonate-User", "bob@example.com")
	r.Out.Header.Set("Impersonate-Group", "tailnet-readers")
}

func TestRun_ProxyThatOnlySetsHeadersFails(t *testing.T) {
	results, err := Run(t.Context(), proxyOf(t, asBob), Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"4", "6", "8", "9", "10", "20a", "21"} {
		if i := slices.IndexFunc(results, func(r Result) bool { return r.Pitfall == id }); i < 0 || len(results[i].Failures) == 0 {
			t.Errorf("no attack of pitfall %s succeeds; want one", id)
		}
	}
}

func TestRun_RequestWithoutCallerMustNotArrive(t *testing.T) {
	p := proxyOf(t, asBob)
	p.Nobody = true
	wantHonestToFail(t, p)
}

func TestRun_HonestRequestAsAnotherUserFails(t *testing.T) {
	wantHonestToFail(t, proxyOf(t, func(*httputil.ProxyRequest) {}))
}

func wantHonestToFail(t *testing.T, p Proxy) {
	t.Helper()
	results, err := Run(t.Context(), p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != 1 || results[0].Pitfall != honestID || len(results[0].Failures) != 1 {
		t.Errorf("got %+v; want one failure, that of an honest request", results)
	}
}

func TestRun_UnansweredHonestRequestIsError(t *testing.T) {
	for _, nobody := range []bool{false, true} {
		p := proxyOf(t, asBob)
		p.Nobody = nobody
		p.Dial = func(context.Context, string, string) (net.Conn, error) { return nil, io.EOF }
		if _, err := Run(t.Context(), p, Options{}); err == nil {
			t.Errorf("an unreachable proxy (Nobody: %v): got no error", nobody)
		}
	}
}

// The functions of package impersonate withstand all attacks on headers, even in a
// proxy that does nothing else for its security: like Caddy's, it removes the
// headers that Connection names after all other changes.
func TestRun_ImpersonatePackagePassesHeaderAttacks(t *testing.T) {
	seen := new(Recorder)
	upstream := httptest.NewServer(seen)
	t.Cleanup(func() { upstream.CloseClientConnections(); upstream.Close() })
	target, err := url.Parse(upstream.URL)
	if err != nil {
		t.Fatal(err)
	}
	forward := &httputil.ReverseProxy{
		Director: func(r *http.Request) { r.URL.Scheme, r.URL.Host = target.Scheme, target.Host }, //nolint:staticcheck // Rewrite would remove the headers earlier
		ErrorLog: log.New(io.Discard, "", 0),
	}
	bob := impersonate.Identity{User: "bob@example.com", Groups: []string{"tailnet-readers"}}
	proxy := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		impersonate.StripClient(r.Header)
		if r.Method == http.MethodConnect {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		bob.SetHeaders(r.Header)
		r.Trailer = nil
		forward.ServeHTTP(w, r)
	}))
	proxy.EnableHTTP2 = true
	proxy.Config.ErrorLog = log.New(io.Discard, "", 0)
	proxy.StartTLS()
	t.Cleanup(func() { proxy.CloseClientConnections(); proxy.Close() })
	address := strings.TrimPrefix(proxy.URL, "https://")
	results, err := Run(t.Context(), Proxy{
		Name: t.Name(), Address: address, Host: address, TLS: true, Seen: seen, From: "127.0.0.1",
		Dial: new(net.Dialer).DialContext,
		Want: Identity{User: bob.User, Groups: bob.Groups},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	passed := 0
	for _, r := range results {
		if r.Pitfall == "20a" || r.Pitfall == "39" {
			continue // about who sends the request, or about answers
		}
		passed += r.Passed
		for _, f := range r.Failures {
			t.Errorf("attack %d over %s (pitfall %s): %s\n%s", f.Attack, f.Protocol, f.Pitfall, f.Reason, f.Request)
		}
	}
	if passed < 500 {
		t.Errorf("only %d attacks arrived with bob's identity", passed)
	}
}

// A failure names its attack, which sends the same request again, and has the
// request as a shell command.
func TestFailure_CanBeReplayed(t *testing.T) {
	p := proxyOf(t, asBob)
	results, err := Run(t.Context(), p, Options{First: true})
	if err != nil {
		t.Fatal(err)
	}
	var failures []Failure
	for _, r := range results {
		failures = append(failures, r.Failures...)
	}
	if len(failures) != 1 {
		t.Fatalf("got %d failures; want the first", len(failures))
	}
	again, err := Run(t.Context(), p, Options{Only: failures[0].Attack})
	if err != nil {
		t.Fatal(err)
	}
	if len(again) != 1 || again[0].Tried != 1 || len(again[0].Failures) != 1 || again[0].Failures[0] != failures[0] {
		t.Errorf("the second time got %+v; want %+v", again, failures[0])
	}
	printed := 0
	for i, a := range attacks() {
		if !a.in(http1) || strings.Contains(a.bytesFor(p, "/conformance/0"), "\x00") || i%50 != 0 {
			continue // a shell cannot pass on NUL; a sample of the others is enough
		}
		printed++
		out, err := exec.CommandContext(t.Context(), "sh", "-c", a.show(p, http1)).Output()
		if err != nil {
			t.Fatal(err)
		}
		if want := a.bytesFor(p, "/conformance/0"); string(out) != want {
			t.Errorf("attack %d: the command prints %q; want %q", i+1, out, want)
		}
	}
	if printed == 0 {
		t.Error("no command was tried")
	}
}

func TestRecorder_AnswersWithStatusInPath(t *testing.T) {
	seen := new(Recorder)
	w := httptest.NewRecorder()
	seen.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/conformance/7/status/403", nil))
	if w.Code != http.StatusForbidden || len(seen.take("/conformance/7")) != 1 {
		t.Errorf("answered %d; want 403, and the request to be kept", w.Code)
	}
}

// A proxy that repeats in its answers what clients write fails, over both protocols.
func TestRun_AnswerThatRepeatsAMegabyteFails(t *testing.T) {
	p := proxyOf(t, asBob)
	target, err := url.Parse("http://" + p.Address)
	if err != nil {
		t.Fatal(err)
	}
	forward := httputil.NewSingleHostReverseProxy(target)
	proxy := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if origin := r.Header.Get("Origin"); origin != "" {
			http.Error(w, strconv.Quote(origin), http.StatusForbidden)
			return
		}
		forward.ServeHTTP(w, r)
	}))
	proxy.EnableHTTP2 = true
	proxy.StartTLS()
	t.Cleanup(func() { proxy.CloseClientConnections(); proxy.Close() })
	p.Address, p.TLS = strings.TrimPrefix(proxy.URL, "https://"), true
	attack := slices.IndexFunc(attacks(), func(a attack) bool { return a.answer > 0 && len(a.fields) > 0 && a.fields[0].name == "Origin" })
	results, err := Run(t.Context(), p, Options{Only: attack + 1})
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != 2 {
		t.Errorf("got results of %d protocols; want 2", len(results))
	}
	for _, r := range results {
		if len(r.Failures) != 1 || !strings.Contains(r.Failures[0].Reason, "answered with") {
			t.Errorf("%s: got %d failures; want one about the length of the answer", r.Protocol, len(r.Failures))
		}
	}
}
