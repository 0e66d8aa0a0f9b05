// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// recorderToken is the proxy's credential for the TLS recorder.
const recorderToken = "the-proxys-own-token"

// recorder is an upstream that keeps the requests it receives. Tests judge the proxy
// by these requests, not by its answers.
type recorder struct {
	addr   string
	server *httptest.Server

	mu       sync.Mutex
	requests []*http.Request
}

func newRecorder(tls bool) (*recorder, error) {
	r := &recorder{}
	r.server = httptest.NewUnstartedServer(r)
	if tls {
		r.server.EnableHTTP2 = true
		r.server.StartTLS()
	} else {
		r.server.Start()
	}
	r.addr = strings.TrimPrefix(strings.TrimPrefix(r.server.URL, "https://"), "http://")
	return r, nil
}

// ServeHTTP answers 200 unless the request's path or query says otherwise:
// /status/CODE?location=URL sets the status and perhaps a Location, and
// ?after=DURATION delays the answer.
func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if strings.HasSuffix(req.URL.Path, "/selfsubjectaccessreviews") {
		return // the proxy asks what its own account may do
	}
	r.mu.Lock()
	r.requests = append(r.requests, req.Clone(req.Context()))
	r.mu.Unlock()
	query := req.URL.Query()
	if after, err := time.ParseDuration(query.Get("after")); err == nil {
		select {
		case <-time.After(after):
		case <-req.Context().Done():
			return
		}
	}
	w.Header().Set("X-Recorded", "yes")
	if location := query.Get("location"); location != "" {
		w.Header().Set("Location", location)
	}
	if code, err := strconv.Atoi(strings.TrimPrefix(req.URL.Path, "/status/")); err == nil {
		w.WriteHeader(code)
	}
}

// take returns the requests since the last call.
func (r *recorder) take() []*http.Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	requests := r.requests
	r.requests = nil
	return requests
}

// writeKubeconfig writes a kubeconfig for the recorder as a cluster.
func (r *recorder) writeKubeconfig(path string) error {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.server.Certificate().Raw})
	return clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"recorder": {Server: r.server.URL, CertificateAuthorityData: ca}},
		AuthInfos:      map[string]*api.AuthInfo{"proxy": {Token: recorderToken}},
		Contexts:       map[string]*api.Context{"recorder": {Cluster: "recorder", AuthInfo: "proxy"}},
		CurrentContext: "recorder",
	}, path)
}
