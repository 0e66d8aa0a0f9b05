// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"errors"
	"net/http"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

const (
	// idleTimeout is how long a stream may be silent. It is the kubelet's default.
	idleTimeout = 4 * time.Hour

	// creationTimeout is how long a caller may take to open the parts of a stream.
	// Stop waits for callers that never do.
	creationTimeout = 10 * time.Second
)

// handler returns the part of a kubelet's API through which an API server streams.
func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", s.serveLogs)
	mux.HandleFunc("/", s.passOn)
	return s.counted(mux)
}

// counted returns h for requests that Stop waits for.
func (s *Server) counted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		if s.stopped {
			s.mu.Unlock()
			http.Error(w, "the kubelet is stopped", http.StatusServiceUnavailable)
			return
		}
		s.work.Add(1)
		s.mu.Unlock()
		defer s.work.Done()
		h.ServeHTTP(w, r)
	})
}

// requestedPod returns the pod and container of a request. If they do not exist, it
// answers the request.
func (s *Server) requestedPod(w http.ResponseWriter, r *http.Request) (*pod, bool) {
	p, err := s.pod(podKey{r.PathValue("namespace"), r.PathValue("pod")}, r.PathValue("container"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return nil, false
	}
	return p, true
}

// serveExec runs a command in a pod.
func (s *Server) serveExec(w http.ResponseWriter, r *http.Request) {
	p, ok := s.requestedPod(w, r)
	if !ok {
		return
	}
	command := r.URL.Query()["command"]
	opts, err := remotecommand.NewOptions(r)
	if err == nil && len(command) == 0 {
		err = errors.New("you must specify a command")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	ctx, cancel := s.streamContext(r.Context(), p)
	defer cancel()
	remotecommand.ServeExec(w, r.WithContext(ctx), executor{p}, p.name, "", p.container, command, opts,
		idleTimeout, creationTimeout, remotecommand.SupportedStreamingProtocols)
}

// serveAttach connects the caller with the process of a container.
func (s *Server) serveAttach(w http.ResponseWriter, r *http.Request) {
	p, ok := s.requestedPod(w, r)
	if !ok {
		return
	}
	opts, err := remotecommand.NewOptions(r)
	if err == nil && opts.TTY {
		err = errors.New("containers of the lab's kubelet have no terminal")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	ctx, cancel := s.streamContext(r.Context(), p)
	defer cancel()
	remotecommand.ServeAttach(w, r.WithContext(ctx), executor{p}, p.name, "", p.container, opts,
		idleTimeout, creationTimeout, remotecommand.SupportedStreamingProtocols)
}

// servePortForward connects the caller with ports on loopback.
func (s *Server) servePortForward(w http.ResponseWriter, r *http.Request) {
	p, ok := s.requestedPod(w, r)
	if !ok {
		return
	}
	opts, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	ctx, cancel := s.streamContext(r.Context(), p)
	defer cancel()
	portforward.ServePortForward(w, r.WithContext(ctx), forwarder{ctx}, p.name, "", opts,
		idleTimeout, creationTimeout, portforward.SupportedProtocols)
}
