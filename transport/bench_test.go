// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"
)

// roundTripFunc is a pool of no connections.
type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// BenchmarkRoundTrip is what the transport adds to sending a request.
func BenchmarkRoundTrip(b *testing.B) {
	s := newAPIServer(b)
	for name, user := range map[string]map[string]any{
		"token":      token,
		"token file": {"tokenFile": writeFile(b, "token", "from-file")},
	} {
		b.Run(name, func(b *testing.B) {
			tr := newTransport(b, trusting(s, user))
			resp := &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}
			tr.cluster.http1 = roundTripFunc(func(*http.Request) (*http.Response, error) { return resp, nil })
			r := newRequest(s, "/api/v1/pods", "User-Agent", "kubectl", "Accept", "application/json", "Impersonate-User", "alice@example.com")
			b.ReportAllocs()
			for b.Loop() {
				if _, err := tr.RoundTrip(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkPools compares the two ways to send short requests, by the CPU time of
// this process alone: the server is another. It is why cluster.send prefers
// HTTP/1.1:
//
//	go test ./transport -run '^$' -bench Pools -benchtime 20000x
func BenchmarkPools(b *testing.B) {
	url, ca := startBenchServer(b)
	tr := newTransport(b, kubeconfig{server: url, cluster: map[string]any{"certificate-authority-data": ca}, user: token})
	for name, pool := range map[string]http.RoundTripper{"HTTP1": tr.cluster.http1, "HTTP2": tr.cluster.http2} {
		for _, callers := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/%d", name, callers), func(b *testing.B) {
				before := cpuTime(b)
				var wg sync.WaitGroup
				for range callers {
					wg.Go(func() {
						for range (b.N + callers - 1) / callers {
							r, err := http.NewRequestWithContext(b.Context(), http.MethodGet, url, nil)
							if err != nil {
								b.Error(err)
								return
							}
							resp, err := pool.RoundTrip(r)
							if err != nil {
								b.Error(err)
								return
							}
							if _, err := io.Copy(io.Discard, resp.Body); err != nil {
								b.Error(err)
							}
							resp.Body.Close()
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64((cpuTime(b)-before).Nanoseconds())/float64(b.N), "cpu-ns/op")
			})
		}
	}
}

// cpuTime returns the CPU time that this process has used.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// startBenchServer starts a process of this test binary that answers every request
// with 2 KB, until it is told to end.
func startBenchServer(b *testing.B) (url string, ca []byte) {
	b.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^TestBenchServer$")
	cmd.Env = append(os.Environ(), "TRANSPORT_BENCH_SERVER=1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		stdin.Close()
		_, _ = io.Copy(io.Discard, stdout)
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	})
	var started struct {
		URL string
		CA  []byte
	}
	if err := json.NewDecoder(stdout).Decode(&started); err != nil {
		b.Fatal(err)
	}
	return started.URL, started.CA
}

// TestBenchServer is the server of BenchmarkPools, in a process of its own.
func TestBenchServer(t *testing.T) {
	if os.Getenv("TRANSPORT_BENCH_SERVER") == "" {
		t.Skip("this is not a test, but the server of BenchmarkPools")
	}
	body := bytes.Repeat([]byte("0123456789abcdef"), 128)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) }))
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := json.NewEncoder(os.Stdout).Encode(map[string]any{"URL": s.URL, "CA": ca}); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, os.Stdin) // until the benchmark closes it
}
