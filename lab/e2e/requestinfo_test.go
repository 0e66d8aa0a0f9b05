// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/rest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// For each spelling, the parser agrees with the API server's audit log. Only
// requests that no client needs are ambiguous.
func TestRequestInfo_AgreesWithAuditLog(t *testing.T) {
	const (
		ns          = "/api/v1/namespaces/default"
		pod         = ns + "/pods/web"
		ordinary    = requestinfo.Ordinary
		interactive = requestinfo.Interactive
		ambiguous   = requestinfo.Ambiguous
	)
	for i, tt := range []struct {
		method, target string
		class          requestinfo.Class
		status         int
	}{
		{"GET", "/version", ordinary, 200},
		{"GET", "/apis/apps/v1", ordinary, 200},
		{"GET", "/api/v1/pods", ordinary, 200},
		{"GET", pod, ordinary, 200},
		{"HEAD", pod, ordinary, 405},
		{"GET", ns + "/pods?fieldSelector=metadata.name%3Dweb", ordinary, 200},
		{"GET", ns + "/pods?watch=true&timeoutSeconds=1", ordinary, 200},
		{"GET", ns + "/pods?watch=nonsense&timeoutSeconds=1", ordinary, 200},
		{"GET", "/api/v1/watch/namespaces/default/pods?timeoutSeconds=1", ordinary, 200},
		{"GET", pod + "/log?tailLines=1", ordinary, 200},
		{"GET", "/api/v1/namespaces/default", ordinary, 200},
		{"GET", "/api/v1/namespaces/default/status", ordinary, 200},
		{"DELETE", ns + "/configmaps?labelSelector=no%3Done", ordinary, 200},
		{"DELETE", ns + "/configmaps/none", ordinary, 404},
		{"POST", ns + "/configmaps", ordinary, 400},
		{"PUT", ns + "/configmaps/none", ordinary, 400},
		{"PATCH", "/apis/apps/v1/namespaces/default/deployments/none/scale", ordinary, 415},
		{"OPTIONS", ns + "/pods", ordinary, 405},
		{"PROPFIND", ns + "/pods", ordinary, 405},

		// Other spellings.
		{"GET", "/api/v1/pods/", ordinary, 200},
		{"GET", ns + "/s%65crets", ordinary, 200},
		{"GET", ns + "/s%65crets/", ordinary, 200},
		{"GET", ns + "/SECRETS", ordinary, 404},
		{"GET", "/API/v1/pods", ordinary, 404},
		{"GET", "http://elsewhere" + ns + "/pods", ordinary, 200},

		// Shells and tunnels. Without an upgrade, the API server refuses exec and attach.
		{"GET", pod + "/exec?command=true&stdout=1", interactive, 400},
		{"POST", pod + "/%65xec?command=true&stdout=1", interactive, 400},
		{"POST", pod + "/exec/?command=true&stdout=1", interactive, 400},
		{"GET", pod + "/attach?stdout=1", interactive, 400},
		{"POST", pod + "/portforward", interactive, 400},
		{"PATCH", pod + "/ephemeralcontainers", interactive, 415},
		{"GET", "/api/v1/watch/namespaces/default/pods/web/exec", interactive, 404},
		{"GET", "/api/v1/proxy/namespaces/default/pods/web", interactive, 404},
		{"GET", "/api/v1/proxy/nodes/none", interactive, 404},
		{"GET", "/api/v1/nodes/none/proxy/", interactive, 404},
		{"GET", ns + "/services/https:none:443/proxy/a%2Fb//c/./d/../e", interactive, 404},
		{"GET", ns + "/services/none/prox%79//x", interactive, 503},

		// Paths that could be read in two ways. No client needs them.
		{"GET", ns + "/secrets%2Fnone", ambiguous, 404},
		{"GET", ns + "/pods%2fweb", ambiguous, 200},
		{"GET", ns + "/pods/web%2Flog?tailLines=1", ambiguous, 200},
		{"GET", "/api/v1/pods%2F", ambiguous, 200},
		{"GET", "//api/v1/pods", ambiguous, 404},
		{"GET", "/api//v1/pods", ambiguous, 404},
		{"GET", "/api/./v1/pods", ambiguous, 404},
		{"GET", "/api/v1/./pods", ambiguous, 404},
		{"GET", "/api/v1/namespaces/kube-system/../default/pods", ambiguous, 404},
		{"GET", "/api/v1/namespaces/kube-system/%2e%2e/default/pods", ambiguous, 404},
		{"GET", ns + "//pods", ambiguous, 404},
		{"GET", ns + "/pods/.", ambiguous, 400},
		{"GET", pod + "//log", ambiguous, 404},
		{"GET", ns + "/services/none//proxy/x", ambiguous, 404},
		{"GET", "/api/v1/watch", ambiguous, 500},
	} {
		t.Run(tt.method+" "+tt.target, func(t *testing.T) {
			raw := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: k8s\r\nConnection: close\r\nContent-Length: 0\r\n", tt.method, tt.target)
			r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(raw + "\r\n")))
			if err != nil {
				t.Fatal(err)
			}
			info := requestinfo.Parse(r)
			if got := info.Class(); got != tt.class {
				t.Errorf("got class %s; want %s", got, tt.class)
			}

			id := fmt.Sprintf("parser-%d-", i)
			audit := tail(t, theLab.Cluster.AuditLog())
			if status := askAPIServer(t, tt.method, raw+"Audit-Id: "+id+"\r\n\r\n"); status != tt.status {
				t.Errorf("the API server answers %d; want %d", status, tt.status)
			}
			if tt.status == http.StatusInternalServerError {
				return // the API server's parser fails before it writes to the audit log
			}
			eventually(t, "the audit log has the request", func() error {
				for _, line := range audit.lines(t) {
					if !strings.Contains(line, id) {
						continue
					}
					var logged auditEvent
					if err := json.Unmarshal([]byte(line), &logged); err != nil {
						t.Fatal(err)
					}
					want := asked{Verb: info.Verb}
					if info.IsResourceRequest {
						want.ObjectRef = &objectRef{info.APIGroup, info.APIVersion, info.Resource, info.Subresource, info.Namespace, info.Name}
					}
					if diff := cmp.Diff(want, asked{logged.Verb, logged.ObjectRef}); diff != "" {
						t.Errorf("(-parser +audit log):\n%s", diff)
					}
					return nil
				}
				return errors.New("no such event")
			})
		})
	}
}

// asked is what a request asks for, according to the audit log.
type asked struct {
	Verb      string
	ObjectRef *objectRef
}

type objectRef struct{ APIGroup, APIVersion, Resource, Subresource, Namespace, Name string }

// askAPIServer writes a raw request to the API server as the administrator, and
// returns the status of the answer.
func askAPIServer(t *testing.T, method, raw string) int {
	t.Helper()
	config := theLab.Cluster.Admin()
	tlsConfig, err := rest.TLSConfigFor(config)
	if err != nil {
		t.Fatal(err)
	}
	server, err := url.Parse(config.Host)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := tls.Dial("tcp", server.Host, tlsConfig)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, raw); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode
}
