// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// streamCloseDelay is the sites' stream_close_delay. Upgraded streams end that long
// after a reload; a reload never ends watches and logs.
const streamCloseDelay = time.Minute

// openStreams are one caller's exec and port-forward, with a connection over the
// latter, and another caller's watch.
type openStreams struct {
	exec, forward, watch *session
	address              string // of the port-forward
	conn                 net.Conn
	object               string // the watched object
	labels               int
}

func startStreams(t *testing.T, p protocol) *openStreams { return startStreamsAs(t, "alice", "bob", p) }

// startStreamsAs is startStreams for the given callers.
func startStreamsAs(t *testing.T, caller, watcher string, p protocol) *openStreams {
	t.Helper()
	o := &openStreams{object: strings.ToLower(caller + "-" + p.name)}
	o.exec = startKubectl(t, theLab.Callers[caller].Kubeconfig, p.env, "exec", "-i", lab.Pod, "--", "cat")
	o.address, o.forward = portForward(t, caller, p, echoServer(t))
	o.conn = dialLocal(t, o.address)
	kubectl(t, "alice", "create", "configmap", o.object)
	t.Cleanup(func() { kubectl(t, "alice", "delete", "configmap", o.object, "--ignore-not-found") })
	o.watch = startKubectl(t, theLab.Callers[watcher].Kubeconfig, nil, "get", "configmaps", "--watch", "--output-watch-events", "--no-headers", "--field-selector", "metadata.name="+o.object)
	o.watch.want(t, "ADDED")
	o.flow(t)
	return o
}

// flow fails the test unless all streams carry data.
func (o *openStreams) flow(t *testing.T) {
	t.Helper()
	o.labels++
	o.exec.echoes(t, fmt.Sprint("line ", o.labels))
	for what, conn := range map[string]net.Conn{"open": o.conn, "new": dialLocal(t, o.address)} {
		if err := roundTrip(conn, noise(100_000)); err != nil {
			t.Fatalf("the %s connection over kubectl port-forward: %v; standard error: %s", what, err, o.forward.stderr.String())
		}
	}
	kubectl(t, "alice", "label", "--overwrite", "configmap", o.object, fmt.Sprint("flow=", o.labels))
	o.watch.want(t, "MODIFIED")
}

func TestReload_EndsNoStream(t *testing.T) {
	forEachProtocol(t, func(t *testing.T, p protocol) {
		defer firstConfig(t)
		load := func(version string) {
			t.Helper()
			if err := theLab.Caddy.Load(withVersion(version)); err != nil {
				t.Fatal(err)
			}
			// Wait for the new config.
			if got := send(t, "bob", portReloaded, get("/api")).Header.Get("X-Version"); got != version {
				t.Fatalf("config %q answers; want %q", got, version)
			}
		}
		// The streams' site stays unchanged; another site changes.
		load("before")
		streams := startStreams(t, p)
		for _, version := range []string{"after", "and-again"} {
			load(version)
			streams.flow(t)
		}
	})
}

func TestReload_StreamsEndAfterCloseDelay(t *testing.T) {
	if !*long {
		t.Skip("takes more than a minute: run with -long")
	}
	if raceDetector() {
		t.Skip("Caddy 2.11.9 has a data race when it closes a WebSocket that has carried data: run without -race")
	}
	var streams []*openStreams
	for _, p := range protocols {
		streams = append(streams, startStreams(t, p))
	}
	if err := theLab.Caddy.Load(withVersion("other")); err != nil {
		t.Fatal(err)
	}
	defer firstConfig(t)
	reloaded := time.Now()
	for time.Since(reloaded) < streamCloseDelay-10*time.Second {
		for _, s := range streams {
			s.flow(t)
		}
		time.Sleep(time.Second) // do not poll for the whole delay
	}
	for i, s := range streams {
		select {
		case <-s.exec.ended:
		case <-time.After(streamCloseDelay):
			t.Errorf("%s: kubectl exec still runs %v after the reload; the delay is %v", protocols[i].name, time.Since(reloaded), streamCloseDelay)
		}
		t.Logf("%s: kubectl exec ended %.1f s after the reload with %v: %s", protocols[i].name, time.Since(reloaded).Seconds(), s.exec.err, s.exec.stderr.String())
		// A watch is not an upgraded stream, so it continues.
		kubectl(t, "alice", "label", "--overwrite", "configmap", s.object, "flow=on")
		s.watch.want(t, "MODIFIED")
	}
}

// raceDetector reports whether the race detector is on.
func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}
