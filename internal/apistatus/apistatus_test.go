// SPDX-License-Identifier: Apache-2.0

package apistatus_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http/httpguts"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
)

// Every kind of refusal, and how client-go recognizes it.
var refusals = []struct {
	name       string
	err        error
	code       int
	is         func(error) bool
	retryAfter string
}{
	{"Forbidden", apistatus.Forbidden(apistatus.Other, "%q may not", "alice"), 403, apierrors.IsForbidden, ""},
	{"BadRequest", apistatus.BadRequest(apistatus.Other, "%q may not", "alice"), 400, apierrors.IsBadRequest, ""},
	{"MethodNotAllowed", apistatus.MethodNotAllowed(apistatus.Other, "%q may not", "alice"), 405, apierrors.IsMethodNotSupported, ""},
	{"Misdirected", apistatus.Misdirected(apistatus.Other, "%q may not", "alice"), 421, func(err error) bool {
		return apierrors.ReasonForError(err) == "MisdirectedRequest"
	}, ""},
	{"Unavailable", apistatus.Unavailable(apistatus.Other, "%q may not", "alice"), 503, apierrors.IsServiceUnavailable, ""},
	{"TryAgain", apistatus.TryAgain(apistatus.Other, "%q may not", "alice"), 503, func(err error) bool {
		seconds, ok := apierrors.SuggestsClientDelay(err)
		return apierrors.IsServiceUnavailable(err) && ok && seconds == 1
	}, "1"},
}

const message = `tailscale_impersonate: "alice" may not`

// check fails t unless code, header and body answer a request with the refusal.
func check(t *testing.T, code int, header http.Header, body []byte, wantCode int, wantRetryAfter string) {
	t.Helper()
	if code != wantCode {
		t.Errorf("got code %d; want %d", code, wantCode)
	}
	want := http.Header{
		"Content-Type":   {"application/json"},
		"Content-Length": {strconv.Itoa(len(body))},
		"Cache-Control":  {"no-cache, private"},
		"Warning":        {`299 - "tailscale_impersonate: \"alice\" may not"`},
	}
	if wantRetryAfter != "" {
		want["Retry-After"] = []string{wantRetryAfter}
	}
	if diff := cmp.Diff(want, header); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
	var status metav1.Status
	if err := json.Unmarshal(body, &status); err != nil {
		t.Fatalf("body %s: %v", body, err)
	}
	if got, want := status.TypeMeta, (metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}); got != want {
		t.Errorf("got type %v; want %v", got, want)
	}
	if status.Status != metav1.StatusFailure || int(status.Code) != wantCode || status.Message != message {
		t.Errorf("got status %+v; want a failure %d with the message %q", status, wantCode, message)
	}
}

func TestWrite_Status(t *testing.T) {
	for _, tt := range refusals {
		t.Run(tt.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			if err := apistatus.Write(w, httptest.NewRequest("GET", "/", nil), tt.err); err != nil {
				t.Fatal(err)
			}
			check(t, w.Code, w.Header(), w.Body.Bytes(), tt.code, tt.retryAfter)
		})
	}
}

func TestResponse_Status(t *testing.T) {
	for _, tt := range refusals {
		t.Run(tt.name, func(t *testing.T) {
			r := httptest.NewRequest(http.MethodGet, "/api/v1/pods", nil)
			resp, err := apistatus.Response(r, tt.err)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if err := resp.Body.Close(); err != nil {
				t.Fatal(err)
			}
			check(t, resp.StatusCode, resp.Header, body, tt.code, tt.retryAfter)
			if got, want := resp.ContentLength, int64(len(body)); got != want {
				t.Errorf("got content length %d; want %d", got, want)
			}
			if got, want := resp.Status, fmt.Sprintf("%d %s", tt.code, http.StatusText(tt.code)); got != want {
				t.Errorf("got status line %q; want %q", got, want)
			}
			if resp.Request != r {
				t.Error("the response is not for the request")
			}
		})
	}
}

// closing is the body of a request, and records whether it was closed.
type closing struct {
	io.Reader
	closed bool
}

func (c *closing) Close() error {
	c.closed = true
	return errors.New("closing failed")
}

func TestResponse_ClosesRequestBody(t *testing.T) {
	body := &closing{Reader: strings.NewReader("{}")}
	r := httptest.NewRequest(http.MethodPost, "/api/v1/pods", body)
	r.Body = body
	if _, err := apistatus.Response(r, apistatus.Forbidden(apistatus.Other, "no")); err != nil {
		t.Fatal(err)
	}
	if !body.closed {
		t.Error("the body is still open; want it closed")
	}
	// A client's request may have no body.
	r.Body = nil
	if _, err := apistatus.Response(r, apistatus.Forbidden(apistatus.Other, "no")); err != nil {
		t.Fatal(err)
	}
}

// kubectl reads responses with client-go.
func TestWrite_ClientGoReadsMessage(t *testing.T) {
	for _, tt := range refusals {
		t.Run(tt.name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if err := apistatus.Write(w, r, tt.err); err != nil {
					t.Error(err)
				}
			}))
			defer server.Close()
			var warned warnings
			err := client(t, server.URL).Get().AbsPath("/api/v1/pods").WarningHandler(&warned).MaxRetries(0).Do(t.Context()).Error()
			if !tt.is(err) {
				t.Errorf("got error %#v; want another kind of error", err)
			}
			if err == nil || err.Error() != message {
				t.Errorf("got error %v; want %s", err, message)
			}
			if diff := cmp.Diff(warnings{message}, warned); diff != "" {
				t.Errorf("warnings (-want +got):\n%s", diff)
			}
		})
	}
}

// client-go does not read the Status of a discovery request. For a 403 it prints the text
// of the answer. For other codes it prints a text of its own, and warnings.
func TestWrite_DiscoveryReadsMessage(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := apistatus.Write(w, r, apistatus.Forbidden(apistatus.NoIdentity, "no identity for %q", "jörg")); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	// As k8s.io/client-go/discovery sends them, also to a cluster below a path.
	for path, accept := range map[string]string{
		"/api":            aggregated,
		"/apis":           aggregated,
		"/clusters/a/api": aggregated,
		"/version":        "application/json, */*",
	} {
		_, err := client(t, server.URL).Get().AbsPath(path).SetHeader("Accept", accept).Do(t.Context()).Raw()
		if want := `tailscale_impersonate: no identity for "jörg"`; !apierrors.IsForbidden(err) || err.Error() != want {
			t.Errorf("%s: got error %v; want %s", path, err, want)
		}
	}
}

// aggregated is the Accept header of client-go's requests for /api and /apis.
const aggregated = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"

func TestWrite_TextIsForDiscoveryOnly(t *testing.T) {
	no := apistatus.Forbidden(apistatus.Other, "no")
	for _, tt := range []struct {
		method, path, accept string
		err                  error
		text                 bool
	}{
		{"GET", "/api", aggregated, no, true},
		{"GET", "/apis", aggregated, no, true},
		{"GET", "/version", "application/json, */*", no, true},
		{"GET", "/api", "application/json", no, false},
		{"GET", "/api", "", no, false},
		{"POST", "/api", aggregated, no, false},
		{"GET", "/api/v1/pods", "application/json, */*", no, false},
		{"GET", "/apis/apps/v1", "application/json, */*", no, false},
		{"GET", "/api", aggregated, apistatus.BadRequest(apistatus.Other, "no"), false},
		{"GET", "/api", aggregated, apistatus.TryAgain(apistatus.Other, "no"), false},
		{"GET", "/api", aggregated, errors.New("secret detail"), false},
	} {
		r := httptest.NewRequest(tt.method, tt.path, nil)
		r.Header.Set("Accept", tt.accept)
		w := httptest.NewRecorder()
		if err := apistatus.Write(w, r, tt.err); err != nil {
			t.Fatal(err)
		}
		resp, err := apistatus.Response(r, tt.err)
		if err != nil {
			t.Fatal(err)
		}
		want := "application/json"
		if tt.text {
			want = "text/plain; charset=utf-8"
		}
		for name, header := range map[string]http.Header{"Write": w.Header(), "Response": resp.Header} {
			if got := header.Get("Content-Type"); got != want {
				t.Errorf("%s: %s %s, accepting %q, refused with %v: got type %s; want %s", name, tt.method, tt.path, tt.accept, tt.err, got, want)
			}
		}
	}
}

// warnings are those that kubectl would print.
type warnings []string

func (w *warnings) HandleWarningHeader(code int, _, text string) {
	if code == 299 {
		*w = append(*w, text)
	}
}

// Messages contain text from clients, which must not become a header of its own.
func TestWrite_WarningDoesNotSplitHeaders(t *testing.T) {
	const hostile = "no\r\nSet-Cookie: a=b\x00\x7f\xff"
	w := httptest.NewRecorder()
	if err := apistatus.Write(w, httptest.NewRequest("GET", "/", nil), apistatus.Forbidden(apistatus.Other, "%s", hostile)); err != nil {
		t.Fatal(err)
	}
	for _, warning := range w.Header()["Warning"] {
		if !httpguts.ValidHeaderFieldValue(warning) {
			t.Errorf("got warning %q, which is not valid in a header", warning)
		}
	}
	var status metav1.Status
	if err := json.Unmarshal(w.Body.Bytes(), &status); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(status.Message, "tailscale_impersonate: no\r\nSet-Cookie") {
		t.Errorf("got message %q; want all of it", status.Message)
	}
}

func TestTryAgain_OnlyItIsRetriedByClientGo(t *testing.T) {
	for _, tt := range refusals {
		t.Run(tt.name, func(t *testing.T) {
			requests := 0
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests++
				if requests > 1 {
					w.WriteHeader(http.StatusOK)
					return
				}
				if err := apistatus.Write(w, r, tt.err); err != nil {
					t.Error(err)
				}
			}))
			defer server.Close()
			err := client(t, server.URL).Get().AbsPath("/api/v1/pods").Do(t.Context()).Error()
			want := 1
			if tt.retryAfter != "" {
				want = 2
			}
			if requests != want || (err == nil) != (want == 2) {
				t.Errorf("got %d requests and error %v; want %d requests", requests, err, want)
			}
		})
	}
}

func client(t *testing.T, url string) rest.Interface {
	t.Helper()
	v1 := schema.GroupVersion{Version: "v1"}
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, v1)
	client, err := rest.RESTClientFor(&rest.Config{
		Host: url,
		ContentConfig: rest.ContentConfig{
			GroupVersion:         &v1,
			NegotiatedSerializer: serializer.NewCodecFactory(scheme).WithoutConversion(),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

type failing struct{ http.ResponseWriter }

func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// Caddy would log the error, with all headers of the request.
func TestWrite_WriteErrorIsNotReturned(t *testing.T) {
	if err := apistatus.Write(failing{httptest.NewRecorder()}, httptest.NewRequest("GET", "/", nil), apistatus.Forbidden(apistatus.Other, "no")); err != nil {
		t.Errorf("got error %v; want none", err)
	}
}

// A cause is for the log: neither the answer nor the text of the error has it.
func TestBecause_CauseIsNotAnswered(t *testing.T) {
	cause := errors.New("stat /run/secrets/token: no such file")
	err := fmt.Errorf("wrapped: %w", apistatus.Because(cause, apistatus.Unavailable(apistatus.NoCredentials, "no credentials")))
	if got := apistatus.Cause(err); got != cause { //nolint:errorlint // this very error
		t.Errorf("got cause %v; want %v", got, cause)
	}
	if errors.Is(err, cause) || strings.Contains(err.Error(), "/run") {
		t.Errorf("the error %v gives its cause away", err)
	}
	if !apierrors.IsServiceUnavailable(err) || apistatus.ReasonOf(err) != apistatus.NoCredentials {
		t.Errorf("the kind of the refusal is lost in %#v", err)
	}
	w := httptest.NewRecorder()
	if err := apistatus.Write(w, httptest.NewRequest("GET", "/", nil), err); err != nil {
		t.Fatal(err)
	}
	resp, err := apistatus.Response(httptest.NewRequest("GET", "/", nil), err)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	if answer := fmt.Sprint(w.Header(), w.Body, resp.Header, string(body)); strings.Contains(answer, "/run") {
		t.Errorf("the answer gives the cause away: %s", answer)
	}
	if got := apistatus.Cause(apistatus.Forbidden(apistatus.Other, "no")); got != nil {
		t.Errorf("got cause %v of a refusal without one", got)
	}
}

// Messages contain text from clients, which must not be used as a format.
func TestForbidden_ArgumentsAreNoFormat(t *testing.T) {
	err := apistatus.Forbidden(apistatus.Other, "host %q", "%s%d\r\n\x00{env.SECRET}")
	if got, want := err.Error(), `tailscale_impersonate: host "%s%d\r\n\x00{env.SECRET}"`; got != want {
		t.Errorf("got message %s; want %s", got, want)
	}
}

func TestWrite_OtherErrorsAreNotDisclosed(t *testing.T) {
	w := httptest.NewRecorder()
	if err := apistatus.Write(w, httptest.NewRequest("GET", "/", nil), errors.New("secret detail")); err != nil {
		t.Fatal(err)
	}
	if w.Code != http.StatusInternalServerError || strings.Contains(w.Body.String(), "secret detail") {
		t.Errorf("got %d %s; want a 500 without the text of the error", w.Code, w.Body)
	}
	var status metav1.Status
	if err := json.Unmarshal(w.Body.Bytes(), &status); err != nil || status.Kind != "Status" {
		t.Errorf("got body %s (%v); want a Status object", w.Body, err)
	}
}

func TestWrite_WrappedRefusal(t *testing.T) {
	w := httptest.NewRecorder()
	if err := apistatus.Write(w, httptest.NewRequest("GET", "/", nil), fmt.Errorf("wrapped: %w", apistatus.Forbidden(apistatus.Guard, "no"))); err != nil {
		t.Fatal(err)
	}
	if w.Code != http.StatusForbidden {
		t.Errorf("got code %d; want 403", w.Code)
	}
}
