// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// Recorder takes the place of the API server and keeps the requests that arrive. It
// switches to the protocol that a request asks to upgrade to, unless the path ends
// in /status/CODE: then it answers with that status.
type Recorder struct {
	next atomic.Int64
	mu   sync.Mutex
	seen map[string][]*http.Request
}

// marker returns a unique path prefix.
func (r *Recorder) marker() string { return "/conformance/" + strconv.FormatInt(r.next.Add(1), 10) }

// take returns the requests whose path starts with marker.
func (r *Recorder) take(marker string) []*http.Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	requests := r.seen[marker]
	delete(r.seen, marker)
	return requests
}

// takeAll returns all requests not taken yet, by marker.
func (r *Recorder) takeAll() map[string][]*http.Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	requests := r.seen
	r.seen = nil
	return requests
}

// ServeHTTP implements [http.Handler].
func (r *Recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	_, _ = io.Copy(io.Discard, req.Body) // also reads the trailers; fails if the body is cut off
	// Look for the marker anywhere in the path, which a proxy may have cleaned.
	path := req.URL.Path
	if i := strings.Index(path, "/conformance/"); i >= 0 {
		number, _, _ := strings.Cut(path[i+len("/conformance/"):], "/")
		r.mu.Lock()
		if r.seen == nil {
			r.seen = make(map[string][]*http.Request)
		}
		r.seen["/conformance/"+number] = append(r.seen["/conformance/"+number], req)
		r.mu.Unlock()
	}
	if _, status, ok := strings.Cut(path, "/status/"); ok {
		if code, err := strconv.Atoi(status); err == nil {
			w.Header().Set("Location", "/elsewhere") // redirects need one
			w.WriteHeader(code)
			return
		}
	}
	protocol := req.Header.Get("Upgrade")
	if protocol == "" {
		return
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", protocol)
}
