// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

var long = flag.Bool("long", false, "also run the tests that take minutes")

// silence is longer than any timeout of a minute, such as Caddy's for reads and
// writes that make no progress.
const silence = 75 * time.Second

// ways are the HTTP versions and sites over which clients reach the proxy.
var ways = []struct {
	name, proto string
	url         string   // of the API server's site
	env         []string // for kubectl
}{
	{"HTTP1", "HTTP/1.1", "http://" + lab.ProxyName, nil},
	{"HTTP1 over TLS", "HTTP/1.1", "https://" + lab.ProxyName + "." + lab.Domain, []string{"DISABLE_HTTP2=true"}},
	{"HTTP2", "HTTP/2.0", "https://" + lab.ProxyName + "." + lab.Domain, nil},
}

// All streams are silent at the same time. They are not parallel subtests, as only
// as many of those run at once as there are processors.

func TestLong_SilentStreamsContinue(t *testing.T) {
	if !*long {
		t.Skip("takes more than a minute: run with -long")
	}
	alice := theLab.Callers["alice"]
	log := tail(t, theLab.Log("caddy"))
	var streams []silentStream
	used := make(map[string]string) // protocol by a part of the URI
	for i, way := range ways {
		kubeconfig := fmt.Sprintf("%s.silent%d", alice.Kubeconfig, i)
		if err := alice.WriteKubeconfig(kubeconfig, way.url); err != nil {
			t.Fatal(err)
		}

		object := fmt.Sprint("silent-", i)
		kubectl(t, "alice", "create", "configmap", object)
		t.Cleanup(func() { kubectl(t, "alice", "delete", "configmap", object) })
		watch := startKubectl(t, kubeconfig, way.env, "get", "configmaps", "--watch", "--output-watch-events", "--no-headers", "--field-selector", "metadata.name="+object)
		watch.want(t, "ADDED")
		used[fmt.Sprintf("metadata.name%%3D%s&resourceVersion", object)] = way.proto
		streams = append(streams, silentStream{"watch over " + way.name, watch, func(t *testing.T) {
			kubectl(t, "alice", "label", "configmap", object, "a=b")
			watch.want(t, "MODIFIED")
		}})

		pod := fmt.Sprint("silent-", i)
		runPod(t, pod, "echo before; until [ -e speak ]; do sleep 0.1; done; echo after; sleep 600")
		logs := startKubectl(t, kubeconfig, way.env, "logs", "-f", pod)
		logs.want(t, "before")
		used[fmt.Sprintf("/pods/%s/log?", pod)] = way.proto
		streams = append(streams, silentStream{"logs over " + way.name, logs, func(t *testing.T) {
			kubectl(t, "alice", "exec", pod, "--", "touch", "speak")
			logs.want(t, "after")
		}})
	}
	for _, p := range protocols {
		cat := startKubectl(t, alice.Kubeconfig, p.env, "exec", "-i", lab.Pod, "--", "cat")
		cat.echoes(t, "before")
		streams = append(streams, silentStream{"exec over " + p.name, cat, func(t *testing.T) { cat.echoes(t, "after") }})

		address, forward := portForward(t, "alice", p, echoServer(t))
		conn := dialLocal(t, address)
		if err := roundTrip(conn, noise(1000)); err != nil {
			t.Fatal(err)
		}
		forward.want(t, "Handling connection")
		streams = append(streams, silentStream{"port-forward over " + p.name, forward, func(t *testing.T) {
			if err := roundTrip(conn, noise(1000)); err != nil {
				t.Errorf("the open connection: %v", err)
			}
			if err := roundTrip(dialLocal(t, address), noise(1000)); err != nil {
				t.Errorf("a new connection: %v", err)
			}
		}})
	}

	until := time.Now().Add(silence)
	for _, stream := range streams {
		t.Run(stream.name, func(t *testing.T) {
			stream.session.silentUntil(t, until)
			stream.speak(t)
		})
	}
	// Caddy logs the requests when they end.
	for _, stream := range streams {
		stream.session.stop()
	}
	eventually(t, "the requests are logged", func() error {
		for _, request := range accessLog(t, log) {
			for part, proto := range used {
				if !strings.Contains(request.Request.URI, part) {
					continue
				}
				if request.Request.Proto != proto {
					t.Errorf("%s arrived over %s; want %s", request.Request.URI, request.Request.Proto, proto)
				}
				delete(used, part)
			}
		}
		if len(used) > 0 {
			return fmt.Errorf("missing: %v", used)
		}
		return nil
	})
}

// silentStream is a stream that is silent until speak is called.
type silentStream struct {
	name    string
	session *session
	speak   func(t *testing.T) // fails the test unless the stream carries data again
}

// As with kubectl logs | less: when the reader stops reading, all buffers on the way
// fill up, and then the proxy's writes make no progress.
func TestLong_PausedReaderLosesNothing(t *testing.T) {
	if !*long {
		t.Skip("takes more than a minute: run with -long")
	}
	const pod, size = "talkative", 64 << 20
	runPod(t, pod, fmt.Sprintf("yes 0123456789abcdef | head -c %d > text; cat text; echo; echo done; sleep 600", size))
	alice := theLab.Callers["alice"]
	eventually(t, "the pod has printed everything", func() error {
		if last := kubectl(t, "alice", "logs", "--tail=1", pod); last != "done\n" {
			return fmt.Errorf("the last line begins with %.10q", last)
		}
		return nil
	})
	type reader struct {
		name   string
		cmd    *exec.Cmd
		stdout io.Reader
		stderr bytes.Buffer
	}
	var readers []*reader
	start := func(name, kubeconfig string, env []string, args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		t.Cleanup(cancel)
		cmd, err := lab.Kubectl(ctx, kubeconfig, args...)
		if err != nil {
			t.Fatal(err)
		}
		r := &reader{name: name, cmd: cmd}
		cmd.Env, cmd.Stderr = append(cmd.Env, env...), &r.stderr
		if r.stdout, err = cmd.StdoutPipe(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		readers = append(readers, r)
	}
	for i, way := range ways {
		kubeconfig := fmt.Sprintf("%s.paused%d", alice.Kubeconfig, i)
		if err := alice.WriteKubeconfig(kubeconfig, way.url); err != nil {
			t.Fatal(err)
		}
		start("logs over "+way.name, kubeconfig, way.env, "logs", "--limit-bytes="+fmt.Sprint(size), pod)
	}
	// As a control, without the proxy.
	start("logs straight from the API server", theLab.AdminKubeconfig(), nil, "logs", "--limit-bytes="+fmt.Sprint(size), pod)
	// Not over a WebSocket: there kubectl itself gives up when it has not read an
	// answer to its pings for a minute.
	start("exec over SPDY", alice.Kubeconfig, protocols[1].env, "exec", pod, "--", "cat", "text")
	// The test is about time passing.
	time.Sleep(silence)
	for _, r := range readers {
		t.Run(r.name, func(t *testing.T) {
			n, readErr := io.Copy(io.Discard, r.stdout)
			if err := errors.Join(readErr, r.cmd.Wait()); err != nil || n != size {
				t.Errorf("%d of %d bytes arrived: %v: %s", n, size, err, r.stderr.String())
			}
		})
	}
}

func TestLong_LateAnswersArrive(t *testing.T) {
	if !*long {
		t.Skip("takes more than a minute: run with -long")
	}
	var answers sync.WaitGroup
	for _, upstream := range []struct{ name, plain, tls string }{
		{"transport http", portHTTPTransport, portHTTPTransportTLS},
		{"transport kubernetes", portRecorded, portRecordedTLS},
	} {
		for _, way := range ways {
			port := upstream.plain
			if strings.HasPrefix(way.url, "https") {
				port = upstream.tls
			}
			client := httpClient(t, "bob", way.proto)
			for _, method := range []string{"GET", "POST"} {
				answers.Go(func() {
					proto, err := waitForAnswer(t.Context(), client, method, fmt.Sprintf("%s:%s/slow?after=%s", way.url, port, silence))
					if err != nil || proto != way.proto {
						t.Errorf("%s, %s over %s: answered over %q, %v; want %q", upstream.name, method, way.name, proto, err, way.proto)
					}
				})
			}
		}
	}
	answers.Wait()
	plain.take()
	encrypted.take()
}

// waitForAnswer sends a request, with a body if it is a POST, and returns the
// protocol of the answer. It returns an error unless it is the recorder's, and late.
func waitForAnswer(ctx context.Context, client *http.Client, method, url string) (proto string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*silence)
	defer cancel()
	var body io.Reader
	if method == "POST" {
		body = strings.NewReader(strings.Repeat("0123456789", 10_000))
	}
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return "", err
	}
	start := time.Now()
	resp, err := client.Do(req)
	took := time.Since(start)
	if err != nil {
		return "", fmt.Errorf("after %v: %w", took, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.Header.Get("X-Recorded") == "" || took < silence {
		return "", fmt.Errorf("the answer is %s after %v; want the upstream's 200 after at least %v", resp.Status, took, silence)
	}
	return resp.Proto, nil
}

// httpClient returns a client on a caller's device that speaks only one version of
// HTTP.
func httpClient(t *testing.T, caller, proto string) *http.Client {
	t.Helper()
	return clientOf(t, theLab.Callers[caller], proto)
}

// clientOf is [httpClient] for any device.
func clientOf(t *testing.T, caller *lab.Caller, proto string) *http.Client {
	t.Helper()
	ca, err := theLab.Caddy.CA()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal(errors.New("caddy's CA has no certificate"))
	}
	transport := &http.Transport{
		DialContext:     caller.Dial,
		TLSClientConfig: &tls.Config{RootCAs: roots},
		Protocols:       new(http.Protocols),
	}
	transport.Protocols.SetHTTP1(proto == "HTTP/1.1")
	transport.Protocols.SetHTTP2(proto == "HTTP/2.0")
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}
