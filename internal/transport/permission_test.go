// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	authorizationv1 "k8s.io/api/authorization/v1"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// What kube-apiserver 1.37 answers where the proxy's account may not impersonate: without
// rights, with those of another group, and in protobuf.
const (
	refusesUser     = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"users \"alice@example.com\" is forbidden: User \"system:serviceaccount:tailscale-impersonate:proxy\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope","reason":"Forbidden","details":{"name":"alice@example.com","kind":"users"},"code":403}` + "\n"
	refusesRequest  = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"pods is forbidden: User \"system:serviceaccount:tailscale-impersonate:proxy\" cannot impersonate-on:user-info:list resource \"pods\" in API group \"\" in the namespace \"default\"","reason":"Forbidden","details":{"kind":"pods"},"code":403}` + "\n"
	refusesProtobuf = "k8s\x00\n\f\n\x02v1\x12\x06Status\x12\xdd\x01\n\x06\n\x00\x12\x00\x1a\x00\x12\aFailure\x1a\xab\x01pods is forbidden: User \"system:serviceaccount:tailscale-impersonate:proxy\" cannot impersonate-on:user-info:list resource \"pods\" in API group \"\" in the namespace \"default\"\"\tForbidden*\x0e\n\x00\x12\x00\x1a\x04pods(\x002\x000\x93\x03\x1a\x00\"\x00"
)

// limitedServer is an API server that answers each request with 403 and a body, and says
// what the account that asks may do.
type limitedServer struct {
	*proxytest.APIServer
	// allow are the permissions, as "impersonate groups viewers".
	allow []string
	asked atomic.Int32
}

func newLimitedServer(t *testing.T, body string, allow ...string) *limitedServer {
	t.Helper()
	s := &limitedServer{APIServer: proxytest.NewAPIServer(t), allow: allow}
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path != "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews" {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, body)
			return
		}
		s.asked.Add(1)
		var review authorizationv1.SelfSubjectAccessReview
		decoder := json.NewDecoder(r.Body)
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&review); err != nil || review.Kind != "SelfSubjectAccessReview" || review.APIVersion != "authorization.k8s.io/v1" {
			t.Errorf("got a %s of %s (%v); want a review of the account itself", review.Kind, review.APIVersion, err)
		}
		for name := range proxytest.Protected(r.Header) {
			if name != "Authorization" {
				t.Errorf("a review of the account itself has the header %s", name)
			}
		}
		if a := review.Spec.ResourceAttributes; a != nil {
			may := a.Verb + " " + a.Resource
			review.Status.Allowed = slices.Contains(s.allow, may) || slices.Contains(s.allow, may+" "+a.Name)
		}
		w.WriteHeader(http.StatusCreated)
		if err := json.NewEncoder(w).Encode(review); err != nil {
			t.Error(err)
		}
	})
	return s
}

const listPods = "/api/v1/namespaces/default/pods"

func TestForbidden_NamesWhatProxysAccountLacks(t *testing.T) {
	websocket := []string{"Connection", "Upgrade", "Upgrade", "websocket"}
	for name, tt := range map[string]struct {
		answer  string
		allow   []string
		headers []string
		want    string
	}{
		"no rights":    {answer: refusesUser, want: `users "alice@example.com" is forbidden: the proxy's account cannot impersonate resource "users"`},
		"newer form":   {answer: refusesRequest, want: `pods is forbidden: the proxy's account cannot impersonate-on:user-info:list resource "pods" in API group "" in the namespace "default"`},
		"protobuf":     {answer: refusesProtobuf, want: `cannot impersonate resource "users"`},
		"an upgrade":   {answer: refusesUser, headers: websocket, want: `cannot impersonate resource "users"`},
		"other groups": {answer: refusesRequest, allow: []string{"impersonate users", "impersonate groups tailnet-readers"}, want: `groups "b" is forbidden: the proxy's account cannot impersonate resource "groups"`},
		"no audit":     {answer: refusesUser, allow: []string{"impersonate users", "impersonate groups"}, want: `userextras`},
	} {
		t.Run(name, func(t *testing.T) {
			s := newLimitedServer(t, tt.answer, tt.allow...)
			tr := newTransport(t, trusting(s.APIServer, token))
			logs := logOf(tr)
			id := *alice
			id.RequestID = "f00"
			r := newRequest(s.APIServer, listPods, tt.headers...)
			resp := roundTrip(t, tr, r.WithContext(impersonate.NewContext(r.Context(), &id)))
			// The discovery of kubectl prints this header and not the message.
			if warning := resp.Header.Get("Warning"); !strings.Contains(warning, "the proxy's account may not act as alice@example.com") {
				t.Errorf("got Warning %q", warning)
			}
			proxytest.CheckRefused(t, resp, proxytest.Forbidden, tt.want, "caddy tailscale-impersonate rbac")
			entries := logs.FilterMessage("request refused").All()
			if len(entries) != 1 || entries[0].ContextMap()["code"] != "no_permission" {
				t.Errorf("logged %v; want one refusal, no_permission", entries)
			}
		})
	}
}

// Callers, pods and aggregated API servers choose these texts. Only what the API server
// says about the account counts.
func TestForbidden_TextAloneIsPassedOn(t *testing.T) {
	may := []string{"impersonate users", "impersonate groups"}
	for name, body := range map[string]string{
		"forged":      refusesUser,
		"in a name":   `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"pods \" cannot impersonate resource\" is forbidden: User \"alice@example.com\" cannot get resource \"pods\" in API group \"\" in the namespace \"default\"","reason":"Forbidden","details":{"name":" cannot impersonate resource","kind":"pods"},"code":403}`,
		"of a caller": `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"pods is forbidden: User \"alice@example.com\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\"","reason":"Forbidden","details":{"kind":"pods"},"code":403}`,
		"long":        strings.Repeat(refusesUser, 100),
		"empty":       "",
	} {
		t.Run(name, func(t *testing.T) {
			s := newLimitedServer(t, body, may...)
			tr := newTransport(t, trusting(s.APIServer, token))
			const requests = 50
			for range requests {
				resp := roundTrip(t, tr, newRequest(s.APIServer, listPods))
				got, err := io.ReadAll(resp.Body)
				if err != nil || resp.StatusCode != http.StatusForbidden || string(got) != body {
					t.Fatalf("got %s, %q, %v; want the answer as it is", resp.Status, got, err)
				}
			}
			// At most one question for each request, and those that are cached.
			if asked := s.asked.Load(); asked > requests+3 {
				t.Errorf("%d requests made the proxy ask %d times", requests, asked)
			}
		})
	}
}

// An answer that does not end is passed on as it comes.
func TestForbidden_StreamIsPassedOn(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	done := make(chan struct{})
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, "one ")
		_ = http.NewResponseController(w).Flush()
		<-done
		_, _ = io.WriteString(w, "two")
	})
	tr := newTransport(t, trusting(s, token))
	resp, err := tr.RoundTrip(newRequest(s, listPods))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	close(done)
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "one two" {
		t.Errorf("got %q, %v", body, err)
	}
}

// While it is unknown what the account lacks, the API server's own words have to do.
func TestForbidden_UnknownReasonIsPassedOn(t *testing.T) {
	s := proxytest.NewAPIServer(t)
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden) // reviews as well
		_, _ = io.WriteString(w, refusesUser)
	})
	tr := newTransport(t, trusting(s, token))
	resp := roundTrip(t, tr, newRequest(s, listPods))
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != refusesUser {
		t.Errorf("got %q, %v", body, err)
	}
}

func TestCheckPermission_LogsWhatIsMissing(t *testing.T) {
	for name, tt := range map[string]struct {
		allow []string
		want  string
	}{
		"none":       {nil, `users "*" is forbidden: the proxy's account cannot impersonate resource "users"`},
		"older form": {[]string{"impersonate users"}, ""},
		"newer form": {[]string{"impersonate:user-info users"}, ""},
		"one user":   {[]string{"impersonate users alice@example.com"}, `users "*" is forbidden`},
	} {
		t.Run(name, func(t *testing.T) {
			s := newLimitedServer(t, "", tt.allow...)
			tr := newTransport(t, trusting(s.APIServer, token))
			core, logs := observer.New(zapcore.DebugLevel)
			tr.logger = zap.New(core)
			tr.checkPermission(t.Context())
			got := ""
			for _, entry := range logs.All() {
				fields := entry.ContextMap()
				got += fmt.Sprint(entry.Message, fields["missing"], fields["command"])
			}
			if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
				t.Errorf("logged %q; want %q", got, tt.want)
			}
			if tt.want != "" && !strings.Contains(got, "caddy tailscale-impersonate rbac") {
				t.Errorf("logged %q; want the command that helps", got)
			}
		})
	}
}

// A review that fails says nothing about the account.
func TestCheckPermission_UnreachableIsNoWarning(t *testing.T) {
	tr := newTransport(t, kubeconfig{server: "https://" + closedPort(t), user: token})
	core, logs := observer.New(zapcore.DebugLevel)
	tr.logger = zap.New(core)
	tr.checkPermission(t.Context())
	if entries := logs.All(); len(entries) != 1 || entries[0].Level != zapcore.DebugLevel {
		t.Errorf("logged %v; want one line at level debug", entries)
	}
}
