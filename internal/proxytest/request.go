// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// NewRequest returns a request that came from alice's laptop, with headers given as
// name, value, name, value.
func NewRequest(method, target string, headers ...string) *http.Request {
	r := httptest.NewRequest(method, target, nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	return FromPeer(r, AliceAddr)
}

// FromPeer returns r as if it had come over the tailnet from the address peer, on a
// connection of its own.
func FromPeer(r *http.Request, peer string) *http.Request {
	ctx := context.WithValue(r.Context(), caddy.ReplacerCtxKey, caddy.NewReplacer())
	ctx = context.WithValue(ctx, caddyhttp.VarsCtxKey, make(map[string]any))
	return r.WithContext(tailnet.WithConn(ctx, netip.AddrPortFrom(netip.MustParseAddr(peer), 40000), netip.MustParseAddr(NodeAddr)))
}

// NewConn returns a function that returns requests of alice's, all on one connection.
func NewConn() func() *http.Request {
	ctx := NewRequest("GET", "https://k8s/api").Context()
	return func() *http.Request {
		r := httptest.NewRequest("GET", "https://k8s/api", nil)
		return r.WithContext(context.WithValue(ctx, caddy.ReplacerCtxKey, caddy.NewReplacer()))
	}
}

// Next is a next handler that records what it was called with.
type Next struct{ Got *http.Request }

func (n *Next) ServeHTTP(w http.ResponseWriter, r *http.Request) error {
	n.Got = r.Clone(r.Context())
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// NextFunc is a next handler that does not answer.
type NextFunc func(*http.Request)

func (f NextFunc) ServeHTTP(_ http.ResponseWriter, r *http.Request) error {
	f(r)
	return nil
}

// NoAnswer is a response writer for requests that nothing answers.
type NoAnswer struct{ http.ResponseWriter }

// Serve has h answer r. It returns the answer, and what the next handler got, nil if
// it was not called.
func Serve(t testing.TB, h caddyhttp.MiddlewareHandler, r *http.Request) (*http.Response, *http.Request) {
	t.Helper()
	var n Next
	rec := httptest.NewRecorder()
	if err := h.ServeHTTP(rec, r, &n); err != nil {
		t.Fatalf("ServeHTTP: %v", err)
	}
	return rec.Result(), n.Got
}

// CheckUser checks that h passes r on as user, or refuses it if user is empty.
func CheckUser(t testing.TB, h caddyhttp.MiddlewareHandler, r *http.Request, user string) {
	t.Helper()
	resp, got := Serve(t, h, r)
	switch {
	case got == nil && user != "":
		t.Errorf("refused (%s); want it to be passed on as %s", resp.Status, user)
	case got != nil && !slices.Equal(got.Header["Impersonate-User"], []string{user}):
		t.Errorf("passed on as %v; want %q", got.Header["Impersonate-User"], user)
	}
}

// Refusal is what a client can tell about a refused request.
type Refusal struct {
	Code       int
	Reason     metav1.StatusReason
	RetryAfter string
}

// The refusals.
var (
	BadRequest       = Refusal{http.StatusBadRequest, metav1.StatusReasonBadRequest, ""}
	Forbidden        = Refusal{http.StatusForbidden, metav1.StatusReasonForbidden, ""}
	NotFound         = Refusal{http.StatusNotFound, metav1.StatusReasonNotFound, ""}
	MethodNotAllowed = Refusal{http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, ""}
	Misdirected      = Refusal{http.StatusMisdirectedRequest, "MisdirectedRequest", ""}
	// Unavailable asks the client not to try again by itself, TryAgain to do so.
	Unavailable = Refusal{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, ""}
	TryAgain    = Refusal{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, "1"}
)

// maxRefusal is how long the longest refusal may be, in bytes, whatever was sent.
const maxRefusal = 8 << 10

// ofHost finds what a refusal must not tell callers about the host of the proxy: files,
// sockets and the errors of libraries.
var ofHost = regexp.MustCompile(`/(?:tmp|var|run|data|etc|home)/|\.sock\b|\b(?:dial|read|write) (?:tcp|udp|unix)|\b(?:stat|lstat|open) /|LocalAPI|no such file|connection refused|deadline exceeded|\(?\*\w+\.\w+\)?|EOF`)

// CheckRefused checks that resp is a Kubernetes Status object as want says, with a
// message that holds each of the words, and that it tells nothing about the proxy's host.
func CheckRefused(t testing.TB, resp *http.Response, want Refusal, words ...string) {
	t.Helper()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the answer: %v", err)
	}
	var status metav1.Status
	if err := json.Unmarshal(body, &status); err != nil {
		t.Fatalf("the answer, %s, is not a Status object: %v\n%s", resp.Status, err, body)
	}
	if status.Kind != "Status" || status.APIVersion != "v1" || status.Status != metav1.StatusFailure || int(status.Code) != resp.StatusCode {
		t.Errorf("not a Status of the answer's code: %s", body)
	}
	got := Refusal{resp.StatusCode, status.Reason, resp.Header.Get("Retry-After")}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("refusal differs (-want +got):\n%s%s", diff, body)
	}
	if found := ofHost.FindString(status.Message); found != "" {
		t.Errorf("message %q tells the caller of the proxy's host: %q", status.Message, found)
	}
	if answered := len(body) + len(resp.Header.Get("Warning")); answered > maxRefusal {
		t.Errorf("the refusal has %d bytes; want at most %d", answered, maxRefusal)
	}
	for _, word := range words {
		if !strings.Contains(status.Message, word) {
			t.Errorf("message %q does not mention %q", status.Message, word)
		}
	}
}

// Protected returns the headers of h that carry identity or credentials, in any
// spelling that a server behind the proxy may read as one of them.
func Protected(h http.Header) http.Header {
	out := make(http.Header)
	for name, values := range h {
		folded := strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(name))
		switch {
		case strings.HasPrefix(folded, "impersonate-"), strings.HasPrefix(folded, "x-remote-"),
			folded == "authorization", folded == "x-real-ip":
			out[name] = values
		case folded == "sec-websocket-protocol" && slices.ContainsFunc(strings.Split(strings.Join(values, ","), ","), func(protocol string) bool {
			return strings.HasPrefix(strings.ToLower(strings.TrimSpace(protocol)), "base64url.bearer.authorization.k8s.io.")
		}):
			out[name] = values
		}
	}
	return out
}
